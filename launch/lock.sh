#!/usr/bin/env bash
# Writes launch/locks/py311.txt, py312.txt and py313.txt: the version of every package that a pod installs, for each
# Python. Versions stay where setup.py still allows them; options go to `uv pip compile`, and choose what may change.
#
#   launch/lock.sh [--dry-run] [OPTION …]         after a change of setup.py
#   launch/lock.sh --upgrade                      the newest versions of everything
#   launch/lock.sh --upgrade-package jax          of one package, and of what it needs
set -euo pipefail
script="$(basename "$0")"
# shellcheck source=launch/commands.sh
source "$(dirname "$0")/commands.sh"
dry_run=no
if [ "${1:-}" = --dry-run ]; then
  dry_run=yes
  shift
fi
cd "$(dirname "$0")/.."
environment="$(mktemp -d)"
trap 'rm -rf "$environment"' EXIT
run source launch/environment.sh
run python -m venv "$environment"
run "$environment/bin/pip" install --quiet uv
for version in 3.11 3.12 3.13; do
  # The extras are those that pod.sh installs, and the machines are those of Cloud TPU VMs and of launch/Dockerfile.
  run "$environment/bin/uv" pip compile --quiet setup.py --extra tpu --extra gcs --extra s3 --extra eval \
    --python-version "$version" --python-platform x86_64-manylinux_2_35 --no-emit-index-url \
    --annotation-style line --custom-compile-command launch/lock.sh \
    --output-file "launch/locks/py${version/./}.txt" "$@"
done
