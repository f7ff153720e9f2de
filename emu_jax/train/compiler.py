"""TPU compiler options: one that every step needs, and with `config.train.tuned` others by TPU generation.

The figures of the others are the compiler's own estimates (libtpu 0.0.52) of the 14 B step with two layers of the
language model, with defaults -> with the option. Compilation takes two to five times as long, which pays off in a run
of days:

    v5p   xla_tpu_scoped_vmem_limit_kib=65536   128.9 -> 126.7 ms, 78.7 -> 73.5 GB of traffic; 98304 alike, 32768 128.5
    v5e   the same                              101.2 -> 100.1 ms, 46.2 -> 45.4 GB of traffic; 0.45 GB more memory

None of the other options that are published for training on TPUs changed the compiled step or its estimate (collective
fusion, asynchronous gathers and permutations, data-parallel all-reduces, all-gather pipelining, the latency-hiding and
experimental schedulers, launch barriers, SparseCore offload): they are defaults by now, or do not apply to this step.
"""

from __future__ import annotations

# Products of at least so many MiB are computed piece by piece, while the pieces of their kernels go around a ring of
# devices. Where replicas are apart (`step.py`) the compiler does so to every product of the step, in pieces of 320 of
# 5,120 inputs on 16 devices; without it, parameters are gathered and gradients scattered, as in other steps.
WINDOWED_EINSUM = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
NEVER = "1000000"
VMEM = "xla_tpu_scoped_vmem_limit_kib"  # limit of a core's fast memory for a fused operation
OPTIONS: dict[str, dict[str, str]] = {
    "TPU v5": {VMEM: "65536"},  # v5p
    "TPU v5 lite": {VMEM: "65536"},  # v5e
}


def compiler_options(kind: str, tuned: bool) -> dict[str, str]:
    """The options for devices of JAX's `device_kind`: those that every TPU needs, and with `tuned` faster ones."""
    if not kind.startswith("TPU"):
        return {}
    return {WINDOWED_EINSUM: NEVER} | (OPTIONS.get(kind, {}) if tuned else {})
