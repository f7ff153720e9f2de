"""Published figures of accelerators: of TPUs by generation, and the bfloat16 peak of GPUs."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation's published figures, per device of JAX: a chip, or one of a TPU7x chip's two cores.

    Attributes:
      accelerator: prefix of its accelerator types.
      kinds: JAX's `device_kind` of its devices.
      cores: cores per chip, as accelerator types count them.
      flops: bfloat16 peak, FLOP/s.
      hbm: bytes of HBM.
      bandwidth: bytes/s of HBM.
      interconnect: bytes/s that a device sends to all its neighbours in the slice together; it receives as many.
      network: bytes/s that a device sends to other slices, over the data-centre network.
    """

    accelerator: str
    kinds: tuple[str, ...]
    cores: int
    flops: float
    hbm: float
    bandwidth: float
    interconnect: float
    network: float


GIB = float(1 << 30)
# From Google's page on each generation ("System architecture"), which gives the interconnect's two directions together.
# v5e's network is a pod's 6.4 Tbit/s over 256 chips; v4's is not published per chip and assumed to be v5e's.
CHIPS = {
    "v4": Chip("v4", ("TPU v4",), 2, 275e12, 32 * GIB, 1228e9, 300e9, 3.1e9),
    "v5e": Chip("v5litepod", ("TPU v5 lite", "TPU v5e"), 1, 197e12, 16 * GIB, 819e9, 200e9, 3.1e9),
    "v5p": Chip("v5p", ("TPU v5", "TPU v5p"), 2, 459e12, 95 * GIB, 2765e9, 600e9, 6.25e9),
    "v6e": Chip("v6e", ("TPU v6 lite", "TPU v6e"), 1, 918e12, 32 * GIB, 1638e9, 400e9, 12.5e9),
    "tpu7x": Chip("tpu7x", ("TPU7x",), 2, 1153.5e12, 96 * GIB, 3690e9, 300e9, 6.25e9),
}
# Dense bfloat16 peak, FLOP/s, by the beginning of JAX's `device_kind`; from NVIDIA's data sheets.
GPU_PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(kind: str) -> float:
    """bfloat16 peak of a device by its `device_kind`, FLOP/s; 0 where it is not known."""
    if (chip := known_chip(kind)) is not None:
        return chip.flops
    known = [name for name in GPU_PEAK_FLOPS if kind.startswith(name)]
    return GPU_PEAK_FLOPS[max(known, key=len)] if known else 0.0


def known_chip(kind: str) -> Chip | None:
    """The TPU generation of a device by its `device_kind`; None: it is none that is known."""
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)
