# shellcheck shell=bash
# Sourced by the scripts beside it: a virtual environment, and the package in it.

# Prints the first Python that is new enough; a name on the PATH need not be one that runs (pyenv's shims).
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

# Makes .venv; where no Python is new enough, FETCH_PYTHON=yes brings one of its own.
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

# Installs the package in place, once for every state of setup.py.
install_emu_jax() {
  local stamp
  stamp="$VIRTUAL_ENV/.emu_jax-$(echo "$1" | tr -dc 'a-z,')-$(cksum < setup.py | cut -d' ' -f1)"
  [ -e "$stamp" ] && return
  python -m pip install --quiet --disable-pip-version-check --upgrade pip
  python -m pip install --quiet --disable-pip-version-check -e "$1"
  touch "$stamp"
}
