# shellcheck shell=bash
# Sourced by the scripts with --dry-run. They set `script` (their name) and `dry_run` (yes or no); `read_words` can set
# `dry_run` for them.

refuse() {
  echo "launch/${script:?}: $1" >&2
  exit 2
}

# Quotes words for a shell.
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

# Refuses to continue without a program, unless commands are only printed.
need_program() {
  [ "${dry_run:?}" = yes ] || command -v "$1" > /dev/null ||
    refuse "$1 is not on the PATH; install it, or look at the commands with --dry-run"
}

# Runs a command, or prints it.
run() {
  need_program "$1"
  if [ "$dry_run" = yes ]; then quoted "$@"; else "$@"; fi
}

# Runs a line of shell, or prints it.
run_line() {
  if [ "$dry_run" = yes ]; then echo "$1"; else bash -o pipefail -c "$1"; fi
}

# read_words WORD…: sets dry_run, folder (absolute; empty if not given) and overrides, or refuses.
read_words() {
  dry_run=no
  folder=''
  overrides=()
  local word
  for word; do
    case "$word" in
      --dry-run) dry_run=yes ;;
      --config.*=*) overrides+=("$word") ;;
      '' | -*) refuse "'$word' is not an argument; expected [--dry-run] [FOLDER] [--config.a.b=value …]" ;;
      *)
        [ -z "$folder" ] || refuse "'$word' is a second folder, after $folder; expected one"
        case "$word" in
          /*) folder="$word" ;;
          *) folder="$PWD/$word" ;;
        esac
        ;;
    esac
  done
}

# fetch WHAT LINE HINT: runs a line of shell that makes WHAT in `partial`, then moves the complete file to `download`.
fetch() {
  [ -e "${download:?}/$1" ] || run_line "cd $(quoted "${partial:?}") && $2 && mv $1 .." ||
    refuse "$1 was not downloaded; $3"
}

# Big Buck Bunny, 58 MB: only the source package holds the video.
fetch_video() {
  fetch moviepy-2.2.1.tar.gz "python -m pip download --quiet --no-deps --no-binary=moviepy moviepy==2.2.1" \
    "see pip's message above"
}
