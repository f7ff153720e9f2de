#!/usr/bin/env bash
# The ablation table at `micro` size: trains and evaluates every config of configs/ablations with eight seeds, on the
# embedded pairs of people and the storyboards of Big Buck Bunny, then writes one table to FOLDER/compare.{json,md,png}.
# Needs only Python 3.11+ and downloads 58 MB. Finished runs are skipped; an interrupted run resumes from its last
# checkpoint. docs/ablations.md says how long the 128 runs take.
#
#   launch/ablations.sh [--dry-run] [FOLDER] [--config.a.b=value …]        default FOLDER: runs/ablations
#   STEPS=500 SEEDS='0 1' ABLATIONS='base no_storyboards' launch/ablations.sh        fewer of each
#   ABLATIONS='head_l2 head_flow' launch/ablations.sh runs/heads        visual heads (docs/visual-heads.md)
#   JOBS=2 launch/ablations.sh        2 runs at a time, each on a core of its own (default: 1, on all cores; needs Linux)
set -euo pipefail
script="$(basename "$0")"
# shellcheck source=launch/commands.sh
source "$(dirname "$0")/commands.sh"
read_words "$@"
cd "$(dirname "$0")/.."
folder="${folder:-runs/ablations}"

# Name of a run, without its seed -> config.
declare -A configs=(
  [base]=base.py:micro
  [no_storyboards]=no_storyboards.py:micro
  [no_storyboards_steps]=no_storyboards.py:micro-steps
  [no_regression]=no_regression.py:micro
  [no_causal_transformer]=no_causal_transformer.py:micro
  [bidirectional_queries]=bidirectional_queries.py:micro
  [regression_weight_1]=regression_weight.py:micro-1
  [regression_weight_16]=regression_weight.py:micro-16
  [frozen_vision]=frozen_vision.py:micro
  [frozen_vision_random]=frozen_vision.py:micro-random
  [published_objective]=published_objective.py:micro
  [not_standardised]=published_objective.py:micro-raw
  [live_targets]=published_objective.py:micro-live
  [queries_32]=queries.py:micro-32
  [queries_32_compute]=queries.py:micro-32-compute
  [queries_64_compute]=queries.py:micro-64-compute
  [head_l2]=visual_head.py:drawn-l2
  [head_l1]=visual_head.py:drawn-l1
  [head_smooth_l1]=visual_head.py:drawn-smooth_l1
  [head_cosine]=visual_head.py:drawn-cosine
  [head_infonce]=visual_head.py:drawn-infonce
  [head_flow]=visual_head.py:drawn-flow
  [head_codes]=visual_head.py:drawn-codes
  [head_queries]=visual_head.py:drawn-queries
)
all='base no_storyboards no_storyboards_steps no_regression no_causal_transformer bidirectional_queries'
all="$all regression_weight_1 regression_weight_16 frozen_vision frozen_vision_random published_objective"
all="$all not_standardised live_targets queries_32 queries_32_compute queries_64_compute"
# A table of their own, with head_l2 as its base: they predict emu-mini's embeddings, and its decoder draws.
heads='head_l2 head_l1 head_smooth_l1 head_cosine head_infonce head_flow head_codes head_queries'
encoders=' frozen_vision published_objective ' # begin from the encoder of the base of their seed
read -ra names <<< "${ABLATIONS:-$all}"
read -ra seeds <<< "${SEEDS:-0 1 2 3 4 5 6 7}"
jobs="${JOBS:-1}"
for name in "${names[@]}"; do
  [ -n "${configs[$name]:-}" ] || refuse "ABLATIONS: '$name' is unknown; choose among $all $heads"
done
for number in "${seeds[@]}" "$jobs" ${STEPS:+"$STEPS"}; do
  case "$number" in
    *[!0-9]*) refuse "SEEDS, JOBS, STEPS: '$number' is not a whole number" ;;
  esac
done
[ "$jobs" -ge 1 ] || refuse "JOBS: $jobs runs at a time; expected 1 or more"
[ "$jobs" -eq 1 ] || need_program taskset

run source launch/environment.sh
run install_emu_jax '.[prepare]'

# ---- pairs and storyboards; visual heads need none, but codes need a codebook ----------------------------------------
for name in "${names[@]}"; do
  case "$name" in
    head_codes) run emu-jax train --config configs/codebook.py --workdir "$folder/codebook" ;;
    head_*) ;;
    *) reads=yes ;;
  esac
done
[ -z "${reads:-}" ] || run python launch/ablation_data.py "$folder/data/people"
if [ -n "${reads:-}" ] && [ ! -e "$folder/data/bunny/manifest.json" ]; then
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

# train_and_score NAME SEED
train_and_score() {
  local workdir="$folder/$1-$2" settings scoring=(--split heldout_combinations --fixed-space emu-mini)
  [ ! -s "$workdir/scores.json" ] || return 0
  settings=(--config.train.seed="$2" --config.data.seed="$2")
  case "$1" in
    head_codes) settings+=(--config.init.codebook="$folder/codebook") ;;&
    head_*) scoring+=(--decoder emu-mini) ;;
    *)
      settings+=(--config.data.mixture.pairs.source="$folder/data/people")
      settings+=(--config.data.mixture.storyboard.source="$folder/data/bunny")
      ;;
  esac
  [ -z "${STEPS:-}" ] || settings+=(--config.train.steps="$STEPS")
  [[ "$encoders" != *" $1 "* ]] || settings+=(--config.init.vision="$folder/base-$2")
  run emu-jax train --config "configs/ablations/${configs[$1]}" --workdir "$workdir" "${settings[@]}" "${overrides[@]}"
  run emu-jax evaluate --model "$workdir" "${scoring[@]}"
}

# share JOB NAME…: all runs of these names whose turn is the job's.
share() {
  local job="$1" number=0 seed name
  shift
  [ "$jobs" -eq 1 ] || run taskset -cp "$job" "$BASHPID" > /dev/null
  for seed in "${seeds[@]}"; do
    for name; do
      if ((number++ % jobs == job)); then train_and_score "$name" "$seed"; fi
    done
  done
}

# all_jobs NAME…: all runs of these names.
all_jobs() {
  local started=() job failed=no
  if [ "$jobs" -eq 1 ]; then # in the foreground, where Ctrl-C reaches the run
    share 0 "$@"
    return
  fi
  trap 'trap "" TERM; kill -TERM 0; wait; exit 130' INT TERM # runs in the background ignore Ctrl-C
  for ((job = 0; job < jobs; job++)); do
    share "$job" "$@" &
    started+=("$!")
  done
  for job in "${started[@]}"; do wait "$job" || failed=yes; done
  trap - INT TERM
  [ "$failed" = no ] || refuse "a run failed; see its message above, and start again: what is finished stays"
}

others=()
for name in "${names[@]}"; do
  [ "$name" = base ] || others+=("$name")
done
[ "${#others[@]}" -eq "${#names[@]}" ] || all_jobs base
[ "${#others[@]}" -eq 0 ] || all_jobs "${others[@]}"

# ---- the table -------------------------------------------------------------------------------------------------------
runs=()
for name in "${names[@]}"; do
  for seed in "${seeds[@]}"; do
    runs+=("$folder/$name-$seed")
  done
done
run emu-jax compare "${runs[@]}" --out "$folder" --markdown
