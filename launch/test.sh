#!/usr/bin/env bash
# Installs what the tests need and runs them (about 20 minutes on 2 cores). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
install_emu_jax '.[test,convert,eval]'
# Idle workers take over tests of busy ones.
python -m pytest -n auto --maxprocesses=4 --dist worksteal "$@"
