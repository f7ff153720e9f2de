# shellcheck shell=bash
# Sourced by the scripts that have --dry-run; they set `script`, their name, and `dry_run`, yes or no.

refuse() {
  echo "launch/${script:?}: $1" >&2
  exit 2
}

# The words as a shell reads them back.
quoted() {
  local word line='' quote="'" escaped="'\\''"
  for word; do
    case "$word" in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//$quote/$escaped}'" ;;
    esac
    line="$line $word"
  done
  echo "${line# }"
}

# Refuses to go on without a program, unless commands are only printed.
need_program() {
  [ "${dry_run:?}" = yes ] || command -v "$1" > /dev/null ||
    refuse "$1 is not on the PATH; install it, or look at the commands with --dry-run"
}

# Runs a command, or prints it.
run() {
  need_program "$1"
  if [ "$dry_run" = yes ]; then quoted "$@"; else "$@"; fi
}

# The same for a line of shell.
run_line() {
  if [ "$dry_run" = yes ]; then echo "$1"; else bash -o pipefail -c "$1"; fi
}
