#!/usr/bin/env bash
# First contact, in four to ten minutes on 2 CPU cores: emu-mini, the model in the box, captions an image, draws a name and
# answers a question; then a fresh Emu is trained on the embedded images, scored while it learns, and
# runs/quickstart/report.html is written. Needs only Python 3.11+. Run again, it resumes.
#   launch/quickstart.sh --all     also trains a VAE and a U-Net that draw, and tunes the model to chat
#   launch/quickstart.sh --full    emu-mini's own recipe: hours (launch/emu_mini.sh)
# WORKDIR=DIR: another work directory. DECODER_STEPS=N: limits the trainings that --all adds to N steps each. Further
# arguments go to the first `emu-jax train`, e.g. launch/quickstart.sh --config.train.steps=20000
set -euo pipefail
cd "$(dirname "$0")/.."
chain=quick
case "${1:-}" in
  --all) chain=all && shift ;;
  --full) shift && exec launch/emu_mini.sh "$@" ;;
esac
# shellcheck source=launch/environment.sh
source launch/environment.sh
if [ "$chain" = all ]; then install_emu_jax '.[eval]'; else install_emu_jax .; fi
workdir="${WORKDIR:-runs/quickstart}"

# Prints a command, then runs it.
show() {
  printf '\n$'
  printf ' %q' "$@"
  printf '\n'
  "$@"
}

if [ ! -s "$workdir/box/drawing.png" ]; then
  mkdir -p "$workdir/box"
  # The first of the held-out images: a role and a skin tone that were each seen in training, but never together.
  name="$(python -c 'import sys
from PIL import Image
from emu_jax.data.fluent_emoji import examples
first = examples("heldout_combinations", 256)[0]
Image.fromarray(first.pixels).save(sys.argv[1])
print(first.caption)' "$workdir/box/image.png")"
  show emu-jax generate --model emu-mini --prompt "$workdir/box/image.png"
  show emu-jax chat --model emu-mini --image "$workdir/box/image.png" --drawings "$workdir/box" --message "what is this?"
  show emu-jax generate --model emu-mini --prompt "$name" --out "$workdir/box/drawing.png"
fi

show emu-jax train --config configs/quickstart.py --workdir "$workdir" --score-every 500 "$@"
if [ "$chain" = all ]; then
  steps=()
  [ -z "${DECODER_STEPS:-}" ] || steps=("--config.train.steps=$DECODER_STEPS")
  show emu-jax train --config configs/vae.py --workdir "$workdir/vae" "${steps[@]}"
  [ -s "$workdir/latents/index.json" ] ||
    show emu-jax precompute --model "$workdir" --vae "$workdir/vae" --out "$workdir/latents"
  show emu-jax train --config configs/decoder.py --workdir "$workdir/unet" --config.data.source="$workdir/latents" "${steps[@]}"
  show emu-jax train --config configs/instruct.py:mini --workdir "$workdir/chat" --config.init.emu="$workdir" \
    --config.tokenizer.path="$workdir" "${steps[@]}"
fi
show emu-jax evaluate --model "$workdir"
