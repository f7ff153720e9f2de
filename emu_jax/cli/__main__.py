"""`python -m emu_jax.cli`: the console script without an installed entry point."""

import sys

from emu_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
