"""Instruction tuning: low-rank adapters of Emu's language model on chats and documents (`interleaved.py`)."""

from __future__ import annotations

from ml_collections import ConfigDict

from emu_jax.errors import UserError
from emu_jax.models import emu, lora
from emu_jax.train.tasks.interleaved import Interleaved, PackedInputs
from emu_jax.train.tasks.task import OwnRows


class Instruct(Interleaved):
    """Trains adapters beside the language model's kernels; every other parameter is frozen, as in the paper.

    The kernels may be int8 (`quantise.py`), as in QLoRA: gradients flow through them but are never taken with
    respect to them.
    """

    instruct = True

    @classmethod
    def open(cls, config: ConfigDict, own: OwnRows) -> PackedInputs:
        if config.model.llama.quantised == "int4":
            # JAX 0.10.2 compiles a step for another layout of int4 than that of its arguments.
            raise UserError(
                "config.model.llama.quantised=int4: adapters are trained over int8 or floating point; convert with "
                "--quantise int8"
            )
        if config.model.llama.quantised and not (config.get("init", None) or {}).get("emu", ""):
            kind = config.model.llama.quantised
            raise UserError(
                f"config.model.llama.quantised={kind}: adapters on integers need weights to begin with; name a "
                f"checkpoint of `emu-jax convert --quantise {kind}` in config.init.emu"
            )
        return super().open(config, own)

    def check_model(self, model: emu.EmuConfig) -> None:
        if model.llama.lora_rank == 0:
            raise UserError(
                "config.model.llama.lora_rank=0; the objective instruct trains adapters, expected 1 or more"
            )

    def may_train(self, path: str) -> bool:
        return lora.is_adapter(path)
