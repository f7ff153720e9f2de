#!/usr/bin/env bash
# Trains a small Emu on the embedded pictures and writes runs/quickstart/report.html. Needs Python 3.11+ alone.
# Arguments go to `emu-jax train`, e.g. launch/quickstart.sh --config.train.minutes=60
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
install_emu_jax .
workdir="${WORKDIR:-runs/quickstart}"
emu-jax train --config configs/quickstart.py --workdir "$workdir" "$@"
emu-jax evaluate --model "$workdir"
