# shellcheck shell=bash
# Sourced by tpu-vm.sh and gke.sh: reads and checks `[--dry-run] [--env FILE] COMMAND` (one of `commands`) and the
# environment file. Sets `command`, `commit` and `train` (the arguments of `emu-jax train`).

# shellcheck source=launch/commands.sh
source "$(dirname "$0")/commands.sh"

# need VARIABLE PATTERN EXPECTED
need() {
  [[ "${!1:-}" =~ ^($2)$ ]] || refuse "$1='${!1:-}'; expected $3; set it in $env_file"
}

# ---- the command line ------------------------------------------------------------------------------------------------
script="$(basename "$0")"
dry_run=no
env_file=launch/pod.env
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) dry_run=yes ;;
    --env)
      [ $# -gt 1 ] || break
      case "$2" in
        /*) env_file="$2" ;;
        *) env_file="$PWD/$2" ;;
      esac
      shift
      ;;
    *) break ;;
  esac
  shift
done
command="${1:-}"
[[ $# -eq 1 && " ${commands:?} " == *" $command "* ]] ||
  refuse "'$*' is not a command; expected [--dry-run] [--env FILE] and one of: $commands"

# ---- the environment file --------------------------------------------------------------------------------------------
cd "$(dirname "$0")/.." || exit
[ -f "$env_file" ] || refuse "$env_file: no such file; copy launch/pod.env.example there and fill it in"
bash -n "$env_file" 2> /dev/null || refuse "$env_file: bash cannot read it; expected lines like those of launch/pod.env.example"
# shellcheck source=launch/pod.env.example
source "$env_file"
need PROJECT '[a-z0-9][-a-z0-9.:]*' 'a Google Cloud project'
need ZONE '[a-z]+-[a-z]+[0-9]+-[a-z]' 'a zone such as us-east5-a'
need NAME '[a-z]([-a-z0-9]{0,37}[a-z0-9])?' 'at most 39 lower-case letters, digits and hyphens, a letter first'
need ACCELERATOR_TYPE 'v[0-9]+[a-z]*-[0-9]+' 'an accelerator type such as v4-64, v5litepod-256, v5p-128 or v6e-256'
need SLICES '[1-9][0-9]*' 'a number of slices, 1 or more'
need CAPACITY 'on-demand|spot|reserved' 'on-demand, spot or reserved'
need CONFIG '[^-].*\.py(:.*)?' 'a config such as configs/pretrain.py:14b'
need WORKDIR '/.+' 'a folder that every worker sees, as in /mnt/emu/runs/14b; a bucket must be mounted'
need COMMIT '[^-].*' 'a commit of this repository, such as HEAD'
commit="$(git rev-parse --verify --quiet --short=12 "$COMMIT^{commit}")" ||
  refuse "COMMIT='$COMMIT'; expected a commit of this repository; set it in $env_file"
git cat-file -e "$commit:${CONFIG%%:*}" 2> /dev/null ||
  refuse "CONFIG='$CONFIG'; expected a file of commit $commit; commit it, or set CONFIG in $env_file"
for word in ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}; do # works for empty arrays in old bashes
  [[ "$word" == --config.*=* ]] ||
    refuse "ARGUMENTS has '$word'; expected words like --config.a.b=value; set it in $env_file, in quotes where it has spaces"
done
train=(--config "$CONFIG" --workdir "$WORKDIR" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"})
[ "$SLICES" = 1 ] || train+=("--config.train.mesh.slice=$SLICES")

# Warns about changes that the pod will not get.
warn_of_changes() {
  [ "$COMMIT" != HEAD ] || git diff --quiet HEAD ||
    echo "launch/$script: uncommitted changes stay on this machine; the pod gets commit $commit" >&2
}
