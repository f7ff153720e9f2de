"""TPU slices that are not at hand: their devices as the TPU compiler describes them, and what a chip can do.

In: a name such as `v5p:4x4x4` (chips along the slice's axes). Out: devices for a mesh, on which steps compile but
cannot run. It needs libtpu (`pip install 'emu-jax[plan]'`), no TPU.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re

import jax

from emu_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation's published figures, a chip.

    Attributes:
      accelerator: the prefix of its accelerator types; cores: what those count a chip.
      flops: bfloat16 peak, FLOP/s. hbm: bytes. bandwidth: of HBM, bytes/s.
      interconnect: bytes/s that a chip sends to and receives from all its neighbours in a slice, together.
    """

    accelerator: str
    cores: int
    flops: float
    hbm: float
    bandwidth: float
    interconnect: float


GIB = float(1 << 30)
# Google's "System architecture" pages of each generation; interconnect as bidirectional Gbit/s a chip.
CHIPS = {
    "v4": Chip("v4", 2, 275e12, 32 * GIB, 1228e9, 2400e9 / 8),
    "v5e": Chip("v5litepod", 1, 197e12, 16 * GIB, 819e9, 1600e9 / 8),
    "v5p": Chip("v5p", 2, 459e12, 95 * GIB, 2765e9, 4800e9 / 8),
    "v6e": Chip("v6e", 1, 918e12, 32 * GIB, 1638e9, 3584e9 / 8),
}
EXPECTED = "a generation and the chips along its axes, as in v5p:4x4x4, v5e:16x16, v6e:16x16 or v4:4x4x4"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: its chip, how many, and its devices: one a chip, or (v4) one a core."""

    name: str
    chip: Chip
    chips: int
    devices: list[jax.Device]

    @property
    def chips_per_device(self) -> float:
        return self.chips / len(self.devices)


def describe(name: str) -> Topology:
    """The slice of that name.

    Raises:
      UserError: no such topology, or libtpu is absent or in use.
    """
    kind, _, axes = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", axes):
        raise UserError(f"--topology {name}: unknown; expected {EXPECTED}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology {name}: the TPU compiler is not installed; run `pip install 'emu-jax[plan]'`")
    chip, chips = CHIPS[kind], math.prod(map(int, axes.split("x")))
    # The compiler asks a TPU machine's metadata otherwise.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE=f"{chip.accelerator}-{chips * chip.cores}",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
    )
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # libtpu raises JaxRuntimeError, RuntimeError or ValueError, with the reason as its text
        reason = str(error).strip().partition("\n")[0][:200]
        if "lockfile" in reason or "in use" in reason:
            raise UserError(f"--topology {name}: the TPU compiler is in use by another process; wait for it") from error
        raise UserError(f"--topology {name}: the TPU compiler knows no such slice ({reason})") from error
    return Topology(name, chip, chips, list(devices))
