#!/usr/bin/env bash
# Trains a small Emu on the embedded images, trains a VAE and a U-Net that draw from its embeddings, tunes it to chat,
# and writes runs/quickstart/report.html. Needs only Python 3.11+. DECODER_STEPS=N limits the last three trainings to N
# steps each. Arguments go to the first `emu-jax train`, e.g. launch/quickstart.sh --config.train.minutes=60
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
install_emu_jax '.[eval]'
workdir="${WORKDIR:-runs/quickstart}"
emu-jax train --config configs/quickstart.py --workdir "$workdir" "$@"
steps=()
[ -z "${DECODER_STEPS:-}" ] || steps=("--config.train.steps=$DECODER_STEPS")
emu-jax train --config configs/vae.py --workdir "$workdir/vae" "${steps[@]}"
[ -s "$workdir/latents/index.json" ] ||
  emu-jax precompute --model "$workdir" --vae "$workdir/vae" --out "$workdir/latents"
emu-jax train --config configs/decoder.py --workdir "$workdir/unet" --config.data.source="$workdir/latents" "${steps[@]}"
emu-jax train --config configs/instruct.py:mini --workdir "$workdir/chat" --config.init.emu="$workdir" \
  --config.tokenizer.path="$workdir" "${steps[@]}"
emu-jax evaluate --model "$workdir"
