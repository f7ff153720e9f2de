"""A task that stalls: `--config.objective=tests.train.stalling:Stalling`; in the environment STALL=PHASE:COUNT:SECONDS.

PHASE is `reading` (the COUNTth batch comes SECONDS late; the first one is read before the run starts), `computing` (in
the COUNTth run of the loss the device waits) or `saving` (so does the position in the data, when it is first asked for
after COUNT batches). COUNT * is every time.
"""

import dataclasses
import os
import time
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from emu_jax.train.tasks.interleaved import PackedInputs
from emu_jax.train.tasks.pretrain import Pretrain

PHASE, COUNT, SECONDS = os.environ.get("STALL", "none:0:0").split(":")


class Stalls:
    """Called often; sleeps at the call that STALL names."""

    def __init__(self, phase: str):
        self._active, self._calls = phase == PHASE, 0

    def __call__(self) -> None:
        self._calls += 1
        if self._active and COUNT in ("*", str(self._calls)):
            time.sleep(float(SECONDS))


class StallingStream:
    def __init__(self, stream):
        self._stream, self._reading, self._read = stream, Stalls("reading"), 0

    def __next__(self):
        self._reading()
        self._read += 1
        return next(self._stream)

    def get_state(self):
        # By batches, not by calls: process 0 asks more often than the others.
        if PHASE == "saving" and COUNT in ("*", str(self._read)):
            time.sleep(float(SECONDS))
        return self._stream.get_state()

    def __getattr__(self, name):
        return getattr(self._stream, name)


class Stalling(Pretrain):
    @classmethod
    def open(cls, config: ConfigDict, own: Callable) -> PackedInputs:
        inputs = super().open(config, own)
        return dataclasses.replace(inputs, stream=StallingStream(inputs.stream))

    def __init__(self, config: ConfigDict, inputs: PackedInputs | None = None):
        super().__init__(config, inputs)
        self._computing = Stalls("computing")

    def loss(self, *args, **kwargs):
        jax.debug.callback(self._computing)
        return super().loss(*args, **kwargs)
