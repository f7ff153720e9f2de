#!/usr/bin/env bash
# launch/tpu-vm.sh runs this on every worker: install EXTRAS | start ARGUMENTS | status | log | stop.
# The job is `emu-jax ARGUMENTS`, which starts again by itself where that can help (`again`); its log and process id are
# in ~/emu_jax_job.
set -euo pipefail
cd "$(dirname "$0")/.."
job="$HOME/emu_jax_job"
mkdir -p "$job"

# Whether the job runs; after a reboot another process may have its id.
running() {
  [ -s "$job/pid" ] && grep -qas launch/worker.sh "/proc/$(cat "$job/pid")/cmdline"
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
  PATH="$PWD/.venv/bin:$PATH" setsid launch/worker.sh again "$@" >> "$job/log" 2>&1 < /dev/null &
  echo $! > "$job/pid"
  echo "$(hostname): started, process $!"
}

# Runs `emu-jax ARGUMENTS` until it ends with an exit code after which a restart does not help: 0 (finished), 2 (an error
# of the user's), 70 (diverged) or 130; after all others (69: another worker was lost; 75: what passes; a crash) it waits
# and starts it again. It gives up after 10 short runs in a row.
again() {
  local code began first="${RESTART_SECONDS:-15}" pause short=0 stopping=no
  trap 'stopping=yes' TERM # emu-jax saves before it exits
  pause="$first"
  while true; do
    echo "--- $(date -u +%FT%TZ) emu-jax $*"
    began=$SECONDS
    emu-jax "$@" && code=0 || code=$?
    echo "--- $(date -u +%FT%TZ) ended with exit code $code"
    case $code in 0 | 2 | 70 | 130) return ;; esac
    if [ $((SECONDS - began)) -gt 600 ]; then
      short=0 pause="$first"
    fi
    short=$((short + 1))
    if [ "$short" -gt 10 ]; then
      echo "--- 10 restarts in a row have not helped: given up"
      return
    fi
    if [ "$stopping" = no ]; then
      echo "--- starts again in $pause s"
      sleep "$pause" &
      wait $! || true # SIGTERM ends it
    fi
    [ "$stopping" = no ] || return 0
    pause=$((2 * pause < 300 ? 2 * pause : 300))
  done
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
  install | start | again | status | log | stop) "$@" ;;
  *)
    echo "launch/worker.sh: '${1:-}' is not a command; expected install EXTRAS, start ARGUMENTS, status, log or stop" >&2
    exit 2
    ;;
esac
