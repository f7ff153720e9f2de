#!/usr/bin/env bash
# Trains emu-mini (configs/emu_mini.py): its parts on the embedded images; then scores them and packs them into
# runs/emu-mini/packed. By estimate four hours on 2 CPU cores; the same command resumes. Arguments go to every training.
# WORKDIR=DIR: another work directory. ON=gpu: with JAX for NVIDIA's GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
install_emu_jax '.[eval]'
[ "${ON:-cpu}" = cpu ] || python -m pip install --quiet --disable-pip-version-check 'jax[cuda12]'
workdir="${WORKDIR:-runs/emu-mini}"
emu-jax train --config configs/emu_mini.py:emu --workdir "$workdir" --score-every 5000 "$@"
emu-jax train --config configs/emu_mini.py:vae --workdir "$workdir/vae" "$@"
[ -s "$workdir/latents/index.json" ] ||
  emu-jax precompute --model "$workdir" --vae "$workdir/vae" --out "$workdir/latents"
emu-jax train --config configs/emu_mini.py:unet --workdir "$workdir/unet" --config.data.source="$workdir/latents" "$@"
emu-jax train --config configs/emu_mini.py:chat --workdir "$workdir/chat" --config.init.emu="$workdir" \
  --config.tokenizer.path="$workdir" "$@"
emu-jax evaluate --model "$workdir"
[ -d "$workdir/packed" ] ||
  emu-jax export --from "$workdir" --to "$workdir/packed" --format packed --dtype bfloat16
python launch/emu_mini_card.py "$workdir" "$workdir/packed"
