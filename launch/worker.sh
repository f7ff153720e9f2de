#!/usr/bin/env bash
# launch/tpu-vm.sh runs this on every worker: install EXTRAS | start ARGUMENTS | status | log | stop.
# The job is `emu-jax ARGUMENTS`; its log and process id are in ~/emu_jax_job.
set -euo pipefail
cd "$(dirname "$0")/.."
job="$HOME/emu_jax_job"
mkdir -p "$job"

# Whether the job runs; after a reboot another process may have its id.
running() {
  [ -s "$job/pid" ] && grep -qas emu-jax "/proc/$(cat "$job/pid")/cmdline"
}

install() {
  # shellcheck disable=SC2034  # environment.sh reads it
  local FETCH_PYTHON=yes
  # shellcheck source=launch/environment.sh
  source launch/environment.sh
  install_emu_jax ".[$1]" pinned
  echo "$(hostname): installed $(command -v emu-jax), $(python -V)"
}

start() {
  if running; then
    echo "launch/worker.sh: $(hostname): a job is already running, process $(cat "$job/pid"); stop it first" >&2
    exit 2
  fi
  # A separate session outlives the connection and can be stopped as a whole.
  # shellcheck disable=SC2016  # expanded there
  PATH="$PWD/.venv/bin:$PATH" setsid bash -c '
    trap : TERM # emu-jax saves before it exits
    echo "--- $(date -u +%FT%TZ) emu-jax $*"
    emu-jax "$@" && code=0 || code=$?
    echo "--- $(date -u +%FT%TZ) ended with exit code $code"
  ' emu-jax "$@" >> "$job/log" 2>&1 < /dev/null &
  echo $! > "$job/pid"
  echo "$(hostname): started, process $!"
}

status() {
  if running; then
    echo "$(hostname): running, process $(cat "$job/pid")"
  else
    echo "$(hostname): no job is running"
  fi
  [ ! -e "$job/log" ] || tail -n 1 "$job/log"
}

log() {
  tail -n 100 -F "$job/log"
}

# Stops the job and waits at most 10 minutes for it to save: a TPU serves one process at a time.
stop() {
  local group
  running || return 0
  group="$(cat "$job/pid")"
  kill -TERM -- "-$group"
  for _ in $(seq 1200); do
    running || return 0
    sleep 0.5
  done
  kill -KILL -- "-$group"
}

case "${1:-}" in
  install | start | status | log | stop) "$@" ;;
  *)
    echo "launch/worker.sh: '${1:-}' is not a command; expected install EXTRAS, start ARGUMENTS, status, log or stop" >&2
    exit 2
    ;;
esac
