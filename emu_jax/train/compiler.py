"""What the TPU compiler is told beyond its defaults, by TPU generation; used where `config.train.tuned` says so.

Each entry was compiled by libtpu 0.0.52 on the 14 B step cut to two layers of the language model, and what the compiler
itself estimates compared with its defaults. Compiling takes two to five times as long, which pays in a run of days:

    v5p   xla_tpu_scoped_vmem_limit_kib=65536   128.9 -> 126.7 ms, 78.7 -> 73.5 GB of traffic; 98304 alike, 32768 128.5
    v5e   the same                              101.2 -> 100.1 ms, 46.2 -> 45.4 GB of traffic; 0.45 GB more memory

Of the other options that are published for training on TPUs, none changed the compiled step or its estimate (collective
fusion, asynchronous gathers and permutations, data-parallel all-reduces, all-gather pipelining, the latency-hiding and
experimental schedulers, launch barriers, SparseCore offload): they are defaults by now, or find nothing to do here.
"""

from __future__ import annotations

VMEM = "xla_tpu_scoped_vmem_limit_kib"  # of a core's fast memory, what a fused operation may hold
OPTIONS: dict[str, dict[str, str]] = {
    "TPU v5": {VMEM: "65536"},  # v5p
    "TPU v5 lite": {VMEM: "65536"},  # v5e
}


def compiler_options(kind: str, tuned: bool) -> dict[str, str]:
    """The options for devices that JAX calls `kind`; none where the table has none."""
    return dict(OPTIONS.get(kind, {})) if tuned else {}
