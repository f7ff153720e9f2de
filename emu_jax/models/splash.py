"""JAX's Pallas attention kernel for TPUs, sharded over a mesh: q [B, N, S, H], k, v [B, K, T, H] -> [B, N, S, H].

Scores never leave the chip. Rows and heads are sharded, and under context parallelism queries; every device reads all
keys of its rows. On other platforms the kernel is interpreted, which is slow and serves tests.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from emu_jax.models.layers import Array, repeat_heads
from emu_jax.sharding import is_auto, num_shards, partition_spec, platform

BLOCKS = (512, 256, 128)  # block sizes of queries and keys; the largest that divides a device's share is used
LANES = 128  # lanes of a vector register; head widths are padded to a multiple


def why_unsupported(queries: int, keys: int) -> str | None:
    """Why the kernel does not support this many positions on the current mesh; None if it does."""
    shards = num_shards("sequence", queries)
    if queries % (LANES * shards) or keys % LANES:
        return f"{queries} positions over context={shards}; it needs a multiple of {LANES} on each device"
    return None


def splash_attention(
    q: Float[Array, "B N S H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    *,
    scale: float,
    segments: Int[Array, "B S"] | None = None,
    causal: bool = False,
) -> Float[Array, "B N S H"]:
    """Attention, within segments if there are any, and causal on request.

    The output and the other residuals of its gradient, besides q, k and v, are named "attention": under a remat policy
    that saves this name the kernel does not run again.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (_, heads, queries, head_dim), keys = q.shape, k.shape[2]
    if k.shape[1] % num_shards("heads", heads):  # the kernel groups heads itself where every device has whole groups
        k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    mesh = jax.sharding.get_abstract_mesh()
    shards = num_shards("sequence", queries)
    query_block = next(size for size in BLOCKS if (queries // shards) % size == 0)
    key_block = next(size for size in BLOCKS if keys % size == 0)
    mask = (masks.CausalMask if causal else masks.FullMask)((queries, keys))
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=query_block,
            block_kv=key_block,
            block_q_dkv=query_block,
            block_kv_dkv=key_block,
            use_fused_bwd_kernel=True,
        ),
        head_shards=num_shards("heads", heads),
        q_seq_shards=shards,
        residual_checkpoint_name="attention",
        interpret=platform() != "tpu",
    )

    def rows(kernel: splash.SplashAttentionKernel, q: Array, k: Array, v: Array, *segments: Array) -> Array:
        def row(q: Array, k: Array, v: Array, *segments: Array) -> Array:
            found = kernel(q, k, v, splash.SegmentIds(*segments) if segments else None)
            assert not isinstance(found, tuple)  # no residuals were requested
            return found

        return jax.vmap(row)(q, k, v, *segments)

    padding = ((0, 0), (0, 0), (0, 0), (0, -head_dim % LANES))
    q, k, v = (jnp.pad(x, padding) for x in (q * scale, k, v))
    segment_ids = () if segments is None else (segments, segments)
    if not mesh.empty and mesh.size > 1:
        spec = partition_spec(("batch", "heads", "sequence", None), q.shape, mesh)
        key_spec = PartitionSpec(*spec[:2], None, None)
        segment_specs = (PartitionSpec(spec[0], spec[2]), PartitionSpec(spec[0], None))
        whole = AbstractMesh(mesh.axis_sizes, mesh.axis_names)  # the kernel's own rule knows no axes that are mapped
        kernel_spec = kernel.manual_sharding_spec(NamedSharding(whole, PartitionSpec(spec[1], spec[2])))
        in_specs = (kernel_spec, spec, key_spec, key_spec, *segment_specs[: len(segment_ids)])
        axes = {axis for axis in mesh.axis_names if is_auto(mesh, axis)}
        rows = jax.shard_map(rows, in_specs=in_specs, out_specs=spec, axis_names=axes, check_vma=False)
    return rows(kernel, q, k, v, *segment_ids)[..., :head_dim]
