"""A small tuned model with a decoder behind an engine, and behind a real server in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from emu_jax import Emu
from emu_jax.serve.engine import Engine
from emu_jax.serve.limits import Limits

KEY = "a-key-of-the-tests-1234"
SLOTS = ("--text-slots", "3", "--drawing-slots", "2")  # everywhere, so that programs are compiled once
LIMITS = Limits(text_slots=3, drawing_slots=2, waiting=6, seconds=60.0)


@pytest.fixture(scope="session")
def model(instructed, drawing) -> Emu:
    """Adapters beside the weights, and a visual decoder."""
    return Emu.load(instructed, decoder=drawing)


@pytest.fixture(scope="session")
def engine(model) -> Iterator[Engine]:
    """Started; tests must leave it idle."""
    engine = Engine(model, LIMITS)
    engine.start()
    engine.compiled.wait()
    yield engine
    engine.close(0)


class Server:
    """`emu-jax serve` in a process; `address` is where it listens."""

    def __init__(self, *arguments: str, key: str | None = None, patience: float = 300.0):
        environment = {name: value for name, value in os.environ.items() if name != "EMU_JAX_API_KEY"}
        if key is not None:
            environment["EMU_JAX_API_KEY"] = key
        self.process = subprocess.Popen(
            [sys.executable, "-m", "emu_jax.cli", "serve", "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        self.lines: list[str] = []
        # A thread: two lines that come at once would both be read by the first `readline`, and `select` sees none left.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.address = self._wait(patience)

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)

    def _wait(self, seconds: float) -> str:
        """The address, once all programs are compiled; either may be told first."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._reader.is_alive():
            addresses = [line.split()[0] for line in self.lines if line.startswith("http://")]
            if addresses and any("all programs are compiled" in line for line in self.lines):
                return addresses[0]
            time.sleep(0.05)
        self.process.kill()
        raise AssertionError(f"the server did not start:\n{''.join(self.lines)}")

    @property
    def port(self) -> int:
        return int(self.address.rsplit(":", 1)[1])

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self._reader.join()


@pytest.fixture(scope="session")
def served(instructed, drawing) -> Iterator[Server]:
    """Served with small limits; tests must leave it idle."""
    server = Server(
        *("--checkpoint", str(instructed), "--decoder", str(drawing), "--name", "tiny"),
        *(*SLOTS, "--waiting", "8", "--body-seconds", "0.5", "--head-seconds", "5", "--decode-seconds", "5"),
        *("--half-closed-seconds", "0.01"),  # so that one that has left is cancelled before a small model is done
    )
    yield server
    assert server.stop() == 0, server.lines
