# Sourced by the scripts beside it: a virtual environment, and the package in it.

if [ -z "${VIRTUAL_ENV:-}" ]; then
  if [ ! -x .venv/bin/python ]; then
    python="$(command -v python3.13 || command -v python3.12 || command -v python3.11 || command -v python3)"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
      || { echo "emu_jax needs Python 3.11 or newer; $python is $("$python" --version 2>&1)" >&2; exit 2; }
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
