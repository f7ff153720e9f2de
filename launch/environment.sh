# shellcheck shell=bash
# Sourced by the other scripts: makes a virtual environment and installs the package in it.

# Large pages: XLA allocates a step's memory anew, and the kernel would fill it in pages of 4 kB (Linux with glibc 2.35).
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

# Prints the first Python that is new enough. A name on the PATH may not run (pyenv's shims).
find_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11 python; do
    if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  return 2
}

# Makes .venv. If no Python is new enough, FETCH_PYTHON=yes downloads one.
make_environment() {
  local python
  if python="$(find_python)"; then
    "$python" -m venv .venv
  elif [ "${FETCH_PYTHON:-}" = yes ]; then
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --python 3.12 .venv
  else
    echo "emu_jax needs Python 3.11 or newer on the PATH, with its venv module; none of python3, python3.13, python3.12, python3.11 and python is one" >&2
    return 2
  fi
}

if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -x .venv/bin/python ] || make_environment
  # shellcheck disable=SC1091  # made by venv
  source .venv/bin/activate
fi

# install_emu_jax '.[EXTRA,…]' [pinned|FILE]: installs the package in place, once for each version of setup.py and of the
# lock, or of a file of constraints.
# `pinned` installs the versions of launch/locks, so that all machines of a run, and those that replace them, are alike.
install_emu_jax() {
  local stamp lock="${2:-/dev/null}"
  if [ "${2:-}" = pinned ]; then
    lock="launch/locks/$(python -c 'import sys; print("py%d%d" % sys.version_info[:2])').txt"
    if [ ! -e "$lock" ]; then
      echo "$lock: no such file; expected a Python of launch/lock.sh, which writes these files" >&2
      return 2
    fi
  fi
  stamp="$VIRTUAL_ENV/.emu_jax-$(echo "$1" | tr -dc 'a-z0-9,')-$(cat setup.py "$lock" | cksum | cut -d' ' -f1)"
  [ -e "$stamp" ] && return
  python -m pip install --quiet --disable-pip-version-check --upgrade pip
  python -m pip install --quiet --disable-pip-version-check --constraint "$lock" -e "$1"
  touch "$stamp"
}
