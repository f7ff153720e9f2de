# shellcheck shell=bash
# Sourced by tpu-vm.sh and gke.sh: reads and checks `[--dry-run] [--env FILE] COMMAND [ARGUMENT …]` (one of `commands`)
# and the environment file. Sets `command`, `commit`, `job` (the words after `emu-jax`), `environment` (what comes before
# a program of a worker: nothing, or `env NAME=value … `) and `extras` (of setup.py, which the workers install).

# shellcheck source=launch/commands.sh
source "$(dirname "$0")/commands.sh"

# need VARIABLE PATTERN EXPECTED
need() {
  [[ "${!1:-}" =~ ^($2)$ ]] || refuse "$1='${!1:-}'; expected $3; set it in $env_file"
}

# need_list VARIABLE EXAMPLE WORD…: VARIABLE is a list, or unset, and these are its words.
need_list() {
  local name="$1" example="$2" word
  shift 2
  [[ "$(declare -p "$name" 2> /dev/null || echo 'declare -a')" == 'declare -a'* ]] ||
    refuse "$name is no list; expected words in parentheses, as in $name=($example); set it in $env_file"
  for word; do
    # A worker gets one line of shell.
    [[ "$word" != *$'\n'* ]] || refuse "$name has a line break in '${word%%$'\n'*}…'; expected words of one line; set it in $env_file"
  done
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
[[ $# -gt 0 && " ${commands:?} " == *" $command "* ]] ||
  refuse "'$*' is not a command; expected [--dry-run] [--env FILE] and one of: $commands"
shift
case "$command" in
  run | resume)
    [[ $# -eq 0 || "$1" == -* ]] || refuse "'$1' is not an argument of the job; expected one such as --reshard-data"
    ;;
  *) [ $# -eq 0 ] || refuse "'$1': $command takes no arguments; those of the job follow run and resume" ;;
esac

# ---- the environment file --------------------------------------------------------------------------------------------
cd "$(dirname "$0")/.." || exit
[ -f "$env_file" ] || refuse "$env_file: no such file; copy launch/pod.env.example there and fill it in"
bash -n "$env_file" 2> /dev/null || refuse "$env_file: bash cannot read it; expected lines like those of launch/pod.env.example"
# What the file may leave out.
JOB=train
NETWORK='' SUBNETWORK='' INTERNAL_IPS=no SSH=external-ip SERVICE_ACCOUNT='' LABELS='' MOUNT=''
unset ENVIRONMENT ARGUMENTS
# shellcheck source=launch/pod.env.example
source "$env_file"
need PROJECT '[a-z0-9][-a-z0-9.:]*' 'a Google Cloud project'
need ZONE '[a-z]+-[a-z]+[0-9]+-[a-z]' 'a zone such as us-east5-a'
need NAME '[a-z]([-a-z0-9]{0,37}[a-z0-9])?' 'at most 39 lower-case letters, digits and hyphens, a letter first'
need ACCELERATOR_TYPE 'v[0-9]+[a-z]*-[0-9]+' 'an accelerator type such as v4-64, v5litepod-256, v5p-128 or v6e-256'
need SLICES '[1-9][0-9]*' 'a number of slices, 1 or more'
need CAPACITY 'on-demand|spot|reserved' 'on-demand, spot or reserved'
need NETWORK '([a-z0-9][-a-z0-9_./:]*)?' "a VPC network, or nothing for the project's default"
need SUBNETWORK '([a-z0-9][-a-z0-9_./:]*)?' "a subnetwork, or nothing for the network's"
need INTERNAL_IPS 'yes|no' 'yes or no'
need SERVICE_ACCOUNT '([-a-z0-9]+@[-a-z0-9.]+)?' "an account's address, or nothing for the project's default"
need LABELS '([a-z][-a-z0-9_]*=[-a-z0-9_]*(,[a-z][-a-z0-9_]*=[-a-z0-9_]*)*)?' 'name=value,name=value, or nothing'
need COMMIT '[^-].*' 'a commit of this repository, such as HEAD'
commit="$(git rev-parse --verify --quiet --short=12 "$COMMIT^{commit}")" ||
  refuse "COMMIT='$COMMIT'; expected a commit of this repository; set it in $env_file"
need_list ENVIRONMENT EMU_JAX_TIMEOUT=300 ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"} # works for empty arrays in old bashes
need_list ARGUMENTS --config.train.steps=1000 ${ARGUMENTS[@]+"${ARGUMENTS[@]}"} "$@"

# ---- the job ---------------------------------------------------------------------------------------------------------
environment=''
for word in ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"}; do
  [[ "$word" =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
    refuse "ENVIRONMENT has '$word'; expected words like NAME=value; set it in $env_file, in quotes where it has spaces"
  environment="${environment:-env }$(quoted "$word") "
done
need JOB 'train|evaluate|precompute' 'train, evaluate or precompute'
extras=tpu,gcs,s3
if [ "$JOB" = train ]; then
  need CONFIG '[^-].*\.py(:.*)?' 'a config such as configs/pretrain.py:14b'
  git cat-file -e "$commit:${CONFIG%%:*}" 2> /dev/null ||
    refuse "CONFIG='$CONFIG'; expected a file of commit $commit; commit it, or set CONFIG in $env_file"
  need WORKDIR '/.+|gs://[^/]+/.+' 'a folder of a bucket, as in gs://my-bucket/runs/14b, or of a file share that every worker sees'
  job=(train --config "$CONFIG" --workdir "$WORKDIR")
else
  # They compute on one host: those of a slice would do the same work again.
  need ACCELERATOR_TYPE "${one_host:?}" "a slice of one host for JOB=$JOB: $one_host"
  need SLICES 1 "1 for JOB=$JOB"
  job=("$JOB")
  [ "$JOB" = precompute ] || extras="$extras,eval"
fi
for word in ${ARGUMENTS[@]+"${ARGUMENTS[@]}"} "$@"; do
  [[ ! "$word" =~ ^--(config|workdir)(=|$) ]] || refuse "'$word' is no argument; set CONFIG and WORKDIR in $env_file"
  job+=("$word")
done
[ "$SLICES" = 1 ] || job+=("--config.train.mesh.slice=$SLICES")

# Warns about changes that the pod will not get.
warn_of_changes() {
  [ "$COMMIT" != HEAD ] || git diff --quiet HEAD ||
    echo "launch/$script: uncommitted changes stay on this machine; the pod gets commit $commit" >&2
}
