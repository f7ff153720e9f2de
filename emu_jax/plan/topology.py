"""TPU slices that you do not have: their devices as the TPU compiler describes them.

In: a name such as `v5p:4x4x4` (chips along the slice's axes), or `here` for this machine's devices. Out: devices for a
mesh, on which steps compile but cannot run. It needs libtpu (`pip install 'emu-jax[plan]'`), but no TPU.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax

from emu_jax.chips import CHIPS, Chip, known_chip, peak_flops
from emu_jax.errors import UserError

THIS_MACHINE = "here"  # the name of this machine's devices
EXPECTED = (
    "a generation and the chips along its axes, as in v5p:4x4x4, v5e:16x16, v6e:16x16, tpu7x:4x4x4 or v4:4x4x4; "
    "2*v5p:4x4x4 for two slices; or here"
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more slices: their kind of chip, the number of chips, and their devices."""

    name: str
    chip: Chip
    chips: int
    devices: list[jax.Device]


def describe(name: str) -> Topology:
    """The slices of that name, or this machine's devices for `here`.

    Raises:
      UserError: there is no such topology, or libtpu is not installed or in use.
    """
    if name == THIS_MACHINE:
        return _here()
    match = re.fullmatch(r"(?:(?P<slices>[1-9]\d*)\*)?(?P<kind>\w+):(?P<axes>\d+(x\d+){1,2})", name)
    if match is None or match["kind"] not in CHIPS:
        raise UserError(f"topology={name}: unknown; expected {EXPECTED}")
    kind, axes, slices = match["kind"], match["axes"], int(match["slices"] or 1)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"topology={name}: the TPU compiler is not installed; run `pip install 'emu-jax[plan]'`")
    chip, chips = CHIPS[kind], math.prod(map(int, axes.split("x")))
    # Otherwise the compiler queries the metadata server of a TPU machine.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE=f"{chip.accelerator}-{chips * chip.cores}",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
    )
    from jax.experimental import topologies

    try:
        more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
        if kind == "v4":  # both cores of a chip are one device, as on real slices
            more["chip_config_name"] = "megacore"
        devices = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{axes}", **more).devices
    except Exception as error:  # libtpu raises JaxRuntimeError, RuntimeError or ValueError, with the reason as its text
        reason = str(error).strip().partition("\n")[0][:200]
        if "lockfile" in reason or "in use" in reason:
            raise UserError(f"topology={name}: the TPU compiler is in use by another process; wait for it") from error
        raise UserError(f"topology={name}: the TPU compiler knows no such slice ({reason})") from error
    return Topology(name, chip, chips * slices, list(devices))


def _here() -> Topology:
    devices = jax.devices()
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    if memory is None:  # CPU devices share the machine's memory
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(devices)
    kind = devices[0].device_kind
    chip = known_chip(kind) or Chip(
        kind, (kind,), 1, peak_flops(kind) or math.nan, float(memory), math.nan, math.nan, math.nan
    )
    return Topology(THIS_MACHINE, chip, len(devices), devices)
