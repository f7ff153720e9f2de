"""Pretraining: all of Emu on interleaved documents (`interleaved.py`)."""

from __future__ import annotations

from emu_jax.errors import UserError
from emu_jax.models import emu
from emu_jax.train.tasks.interleaved import Interleaved


class Pretrain(Interleaved):
    """Trains every parameter."""

    timings = ("decode", "draw")

    def check_model(self, model: emu.EmuConfig) -> None:
        if model.llama.quantised:
            raise UserError(
                f"config.model.llama.quantised={model.llama.quantised}: integers are not trained; pretrain float32 or "
                "bfloat16 parameters, or train adapters beside them with config.objective=instruct"
            )
