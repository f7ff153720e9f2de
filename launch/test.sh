#!/usr/bin/env bash
# Installs what the tests need and runs them, on the Python at hand. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
# PyTorch, with which weights and outputs are compared: from Python 3.12 on its wheels bring gigabytes of CUDA, and the
# tests that need it are skipped.
extras=test,eval
if python -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then extras+=,compare,convert; fi
install_emu_jax ".[$extras]" tests/constraints.txt
# Idle workers take over tests of busy ones.
python -m pytest -n auto --maxprocesses=4 --dist worksteal "$@"
