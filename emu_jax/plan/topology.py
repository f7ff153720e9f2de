"""TPU slices that are not at hand: their devices as the TPU compiler describes them, and what a chip can do.

In: a name such as `v5p:4x4x4` (chips along the slice's axes). Out: devices for a mesh, on which steps compile but
cannot run. It needs libtpu (`pip install 'emu-jax[plan]'`), no TPU. `here` stands for the devices at hand.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax

from emu_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation's published figures, a chip.

    Attributes:
      accelerator: the prefix of its accelerator types; cores: what those count a chip.
      flops: bfloat16 peak, FLOP/s. hbm: bytes. bandwidth: of HBM, bytes/s.
      interconnect: bytes/s that a chip sends to all its neighbours in a slice together, and as many it receives.
      network: bytes/s that a chip sends to other slices, over the data-centre network.
    """

    accelerator: str
    cores: int
    flops: float
    hbm: float
    bandwidth: float
    interconnect: float
    network: float


GIB = float(1 << 30)
# Google's pages on each generation ("System architecture"); they give the interconnect in both directions together.
# The network of v5e is a pod's 6.4 Tbit/s over its 256 chips; v4's and v6e's are not published by chip, taken as v5e's.
CHIPS = {
    "v4": Chip("v4", 2, 275e12, 32 * GIB, 1228e9, 300e9, 3.1e9),
    "v5e": Chip("v5litepod", 1, 197e12, 16 * GIB, 819e9, 200e9, 3.1e9),
    "v5p": Chip("v5p", 2, 459e12, 95 * GIB, 2765e9, 600e9, 6.25e9),
    "v6e": Chip("v6e", 1, 918e12, 32 * GIB, 1638e9, 400e9, 3.1e9),
}
# What JAX calls their devices.
KINDS = {
    "v4": ("TPU v4",),
    "v5litepod": ("TPU v5 lite", "TPU v5e"),
    "v5p": ("TPU v5", "TPU v5p"),
    "v6e": ("TPU v6 lite", "TPU v6e"),
}
# Peak FLOP/s in bfloat16, dense, by the beginning of what JAX calls the device; from NVIDIA's data sheets.
GPUS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
HERE = "here"
EXPECTED = (
    "a generation and the chips along its axes, as in v5p:4x4x4, v5e:16x16, v6e:16x16 or v4:4x4x4; 2*v5p:4x4x4 for "
    "two slices; or here"
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """One slice or several: their chip, how many, and their devices, one a chip."""

    name: str
    chip: Chip
    chips: int
    devices: list[jax.Device]


def describe(name: str) -> Topology:
    """The slices of that name, or the devices at hand: `here`.

    Raises:
      UserError: no such topology, or libtpu is absent or in use.
    """
    if name == HERE:
        return _here()
    match = re.fullmatch(r"(?:(?P<slices>[1-9]\d*)\*)?(?P<kind>\w+):(?P<axes>\d+(x\d+){1,2})", name)
    if match is None or match["kind"] not in CHIPS:
        raise UserError(f"--topology {name}: unknown; expected {EXPECTED}")
    kind, axes, slices = match["kind"], match["axes"], int(match["slices"] or 1)
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
        more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
        if kind == "v4":  # both cores of a chip as one device, as they run
            more["chip_config_name"] = "megacore"
        devices = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{axes}", **more).devices
    except Exception as error:  # libtpu raises JaxRuntimeError, RuntimeError or ValueError, with the reason as its text
        reason = str(error).strip().partition("\n")[0][:200]
        if "lockfile" in reason or "in use" in reason:
            raise UserError(f"--topology {name}: the TPU compiler is in use by another process; wait for it") from error
        raise UserError(f"--topology {name}: the TPU compiler knows no such slice ({reason})") from error
    return Topology(name, chip, chips * slices, list(devices))


def peak_flops(kind: str) -> float:
    """Of a device that JAX calls so, FLOP/s in bfloat16; 0 where that is not known."""
    for chip in CHIPS.values():
        if kind in KINDS[chip.accelerator]:
            return chip.flops
    known = [name for name in GPUS if kind.startswith(name)]
    return GPUS[max(known, key=len)] if known else 0.0


def _here() -> Topology:
    devices = jax.devices()
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    if memory is None:  # a CPU's devices share the machine's
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(devices)
    kind = devices[0].device_kind
    known = next((chip for chip in CHIPS.values() if kind in KINDS[chip.accelerator]), None)
    chip = known or Chip(kind, 1, peak_flops(kind) or math.nan, float(memory), math.nan, math.nan, math.nan)
    return Topology(HERE, chip, len(devices), devices)
