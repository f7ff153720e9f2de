"""What a config leaves open until the devices are known: the mesh, micro-batches, and what is kept for gradients.

    train.mesh.slice = 0             the number of slices
    train.mesh.fsdp = 0              ┐
    model.<part>.remat = "auto"      ├ by the entry of `config.train.fits` for the kind of chip
    optimizer.accumulate_steps = 0   ┘ so many that a device holds no more rows at a time than the entry says

So one config is the same run, batch for batch, on whatever slice is to be had.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from emu_jax.chips import CHIPS, known_chip
from emu_jax.errors import UserError, build

PARTS = ("vision", "causal", "llama")


@dataclasses.dataclass(frozen=True)
class Fit:
    """An entry of `config.train.fits`: what fits a device of one kind.

    Attributes:
      rows: rows of a batch that a device holds at a time.
      fsdp: devices over which FSDP shards the parameters; 0: all of a slice.
      vision, causal, llama: `remat` of these parts.
    """

    rows: int = 1
    fsdp: int = 0
    vision: str = "full"
    causal: str = "full"
    llama: str = "full"

    def __post_init__(self):
        if self.rows < 1 or self.fsdp < 0:
            raise UserError(
                f"config.train.fits: rows={self.rows}, fsdp={self.fsdp}; expected 1 or more, and 0 (all devices of a "
                "slice) or more"
            )


def fit(config: ConfigDict, devices: Sequence[jax.Device], rows_per_device: int = 0) -> ConfigDict:
    """The config with what it leaves open filled in for these devices; the same config where it leaves nothing open.

    Devices of a kind that `config.train.fits` does not name get the entry that needs least memory, `Fit()`.

    Args:
      rows_per_device: rows of a batch for every data-parallel device, where a plan replaces the config's batch.

    Raises:
      UserError: the batch cannot be cut into equal micro-batches that fit.
    """
    mesh, model = config.train.mesh, config.get("model", {})
    parts = [part for part in PARTS if model.get(part, {}).get("remat", "") == "auto"]
    accumulates = config.optimizer.get("accumulate_steps", 1)
    if mesh.get("slice", 1) and mesh.get("fsdp", 1) and not parts and accumulates:
        return config
    config = config.copy_and_resolve_references()
    mesh, model = config.train.mesh, config.get("model", {})
    kind = next((name for name, chip in CHIPS.items() if chip is known_chip(devices[0].device_kind)), "")
    entries = config.train.get("fits", {})
    for name in entries:
        if name not in CHIPS:
            raise UserError(f"config.train.fits.{name}: no known kind of chip; expected some of {', '.join(CHIPS)}")
    found = build(Fit, f"config.train.fits.{kind}", entries[kind]) if kind in entries else Fit()
    for part in parts:
        model[part].remat = getattr(found, part)
    if mesh.get("slice", 1) == 0:
        mesh.slice = len({getattr(device, "slice_index", None) or 0 for device in devices})
    size = len(devices) // max(math.prod(mesh.get(axis, 1) for axis in ("slice", "tensor", "context")), 1)
    if mesh.get("fsdp", 1) == 0:
        mesh.fsdp = math.gcd(size, found.fsdp)
    if not accumulates:
        shards = size * mesh.get("slice", 1)  # over which rows are sharded, if the mesh is one of these devices
        config.optimizer.accumulate_steps = 1 if rows_per_device else _micro_batches(config, shards, found.rows)
    return config


def _micro_batches(config: ConfigDict, shards: int, rows: int) -> int:
    """The smallest number of equal micro-batches of a batch in which no shard has more than `rows` rows."""
    batch = config.data.batch_rows
    if not batch:
        raise UserError(
            "config.optimizer.accumulate_steps=0 is chosen for a known batch, and config.data.batch_rows=0 is measured "
            "from the data; set one of them"
        )
    least = -(-batch // (shards * rows))
    choices = (count for count in range(max(least, 1), batch + 1) if batch % (count * shards) == 0)
    count = next(choices, 0)
    if not count:
        step = shards * rows
        raise UserError(
            f"config.data.batch_rows={batch} cannot be cut into micro-batches for {shards} devices that hold rows; "
            f"expected a multiple of {shards}, such as {max(round(batch / step), 1) * step}"
        )
    return count
