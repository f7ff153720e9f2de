#!/usr/bin/env bash
# The ablation table at `mini` size: trains and evaluates every config of configs/ablations with three seeds, on the
# embedded pairs and the storyboards of Big Buck Bunny, then writes one table to FOLDER/compare.{json,md,png}.
# Needs only Python 3.11+ and downloads 58 MB. Finished runs are skipped; an interrupted run resumes from its last
# checkpoint. 33 runs of 1,500 steps take about 3 hours on 2 CPU cores.
#
#   launch/ablations.sh [--dry-run] [FOLDER] [--config.a.b=value …]        default FOLDER: runs/ablations
#   STEPS=500 SEEDS='0 1' ABLATIONS='base no_storyboards' launch/ablations.sh        fewer of each
set -euo pipefail
script="$(basename "$0")"
# shellcheck source=launch/commands.sh
source "$(dirname "$0")/commands.sh"
read_words "$@"
cd "$(dirname "$0")/.."
folder="${folder:-runs/ablations}"

# Name of a run, without its seed -> config.
declare -A configs=(
  [base]=base.py:mini
  [no_storyboards]=no_storyboards.py:mini
  [no_regression]=no_regression.py:mini
  [no_causal_transformer]=no_causal_transformer.py:mini
  [bidirectional_queries]=bidirectional_queries.py:mini
  [queries_32]=queries.py:mini-32
  [queries_64]=queries.py:mini-64
  [frozen_vision]=frozen_vision.py:mini
  [frozen_vision_random]=frozen_vision.py:mini-random
  [regression_weight_1]=regression_weight.py:mini-1
  [regression_weight_16]=regression_weight.py:mini-16
)
# The base comes first: the others are compared with it, and frozen_vision takes its encoder.
all='base no_storyboards no_regression no_causal_transformer bidirectional_queries regression_weight_1'
all="$all regression_weight_16 frozen_vision frozen_vision_random queries_32 queries_64"
read -ra names <<< "${ABLATIONS:-$all}"
read -ra seeds <<< "${SEEDS:-0 1 2}"
for name in "${names[@]}"; do
  [ -n "${configs[$name]:-}" ] || refuse "ABLATIONS: '$name' is unknown; choose among $all"
done
for number in "${seeds[@]}" ${STEPS:+"$STEPS"}; do
  case "$number" in
    *[!0-9]*) refuse "SEEDS, STEPS: '$number' is not a whole number" ;;
  esac
done

run source launch/environment.sh
run install_emu_jax '.[prepare]'

# ---- storyboards -----------------------------------------------------------------------------------------------------
if [ ! -e "$folder/data/bunny/manifest.json" ]; then
  download="$folder/download"
  partial="$download/partial"
  run rm -rf "$partial"
  run mkdir -p "$partial"
  fetch_video
  run rm -rf "$partial"
  run python launch/mixture_data.py "$download" "$folder/raw" bunny
  run emu-jax prepare storyboards --in "$folder/raw/bunny" --out "$folder/data/bunny" --image-size 64
fi

# ---- runs; they share a compilation cache ----------------------------------------------------------------------------
run export JAX_COMPILATION_CACHE_DIR="$folder/cache" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2
runs=()
for name in "${names[@]}"; do
  for seed in "${seeds[@]}"; do
    runs+=("$folder/$name-$seed")
  done
done
for seed in "${seeds[@]}"; do
  for name in "${names[@]}"; do
    workdir="$folder/$name-$seed"
    [ ! -s "$workdir/scores.json" ] || continue
    settings=(--config.train.seed="$seed" --config.data.mixture.storyboard.source="$folder/data/bunny")
    [ -z "${STEPS:-}" ] || settings+=(--config.train.steps="$STEPS")
    [ "$name" != frozen_vision ] || settings+=(--config.init.vision="$folder/base-$seed")
    run emu-jax train --config "configs/ablations/${configs[$name]}" --workdir "$workdir" "${settings[@]}" \
      "${overrides[@]}"
    run emu-jax evaluate --model "$workdir" --split heldout_combinations
  done
done

# ---- the table -------------------------------------------------------------------------------------------------------
run emu-jax compare "${runs[@]}" --out "$folder" --markdown
