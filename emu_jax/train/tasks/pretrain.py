"""Pretraining: all of Emu on interleaved documents (`interleaved.py`)."""

from __future__ import annotations

from emu_jax.errors import UserError
from emu_jax.models import emu
from emu_jax.train.tasks.interleaved import Interleaved


class Pretrain(Interleaved):
    """Trains every parameter."""

    timings = ("decode", "draw")

    def check_model(self, model: emu.EmuConfig) -> None:
        if model.llama.int8:
            raise UserError(
                "config.model.llama.int8=True: integers are not trained; pretrain float32 or bfloat16 parameters, or "
                "train adapters beside int8 ones with config.objective=instruct"
            )
