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
  echo "emu_jax needs Python 3.11 or newer on the PATH, with its venv module; none of python3, python3.13, python3.12, python3.11 and python is one" >&2
  return 2
}

if [ -z "${VIRTUAL_ENV:-}" ]; then
  if [ ! -x .venv/bin/python ]; then
    python="$(find_python)"
    "$python" -m venv .venv
  fi
  source .venv/bin/activate
fi

# Installs the package in place, once for every state of setup.py.
install_emu_jax() {
  local stamp="$VIRTUAL_ENV/.emu_jax-$(echo "$1" | tr -dc 'a-z,')-$(cksum < setup.py | cut -d' ' -f1)"
  [ -e "$stamp" ] && return
  python -m pip install --quiet --disable-pip-version-check --upgrade pip
  python -m pip install --quiet --disable-pip-version-check -e "$1"
  touch "$stamp"
}
