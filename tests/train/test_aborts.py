"""What runs when C code aborts a process, in whatever thread, and whatever the main thread waits for."""

import signal
import subprocess
import sys

import pytest

ABORTS = """
import os, signal, threading, time
from emu_jax.train import aborts
aborts.handle(lambda: os._exit(69) if LEAVES else print("not our cause", flush=True))
if RESETS:
    aborts.reset()
threading.Timer(0.1, os.abort).start()
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("leaves", "resets", "code", "said"),
    [(True, False, 69, ""), (False, False, -signal.SIGABRT, "not our cause\n"), (True, True, -signal.SIGABRT, "")],
)
def test_an_abort(leaves, resets, code, said):
    program = f"LEAVES, RESETS = {leaves}, {resets}\n{ABORTS}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, said), done.stderr
