"""JAX's Pallas attention kernel for TPUs, split over a mesh: q [B, N, S, H], k, v [B, N, T, H] -> [B, N, S, H].

Scores never leave the chip. Rows, heads and, through `context`, queries are split over devices; every device reads
all keys of its rows. Off TPUs the kernel is interpreted, which is slow and serves tests.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from emu_jax.models.layers import Array
from emu_jax.sharding import num_shards, partition_spec, platform

BLOCKS = (512, 256, 128)  # of queries and of keys: the largest that divides what a device holds
LANES = 128  # of a vector register; heads are padded to whole ones


def refusal(queries: int, keys: int) -> str | None:
    """Why the kernel cannot take so many positions on the mesh in use, if it cannot."""
    shards = num_shards("sequence", queries)
    if queries % (LANES * shards) or keys % LANES:
        return f"{queries} positions over context={shards}; it needs a multiple of {LANES} on each device"
    return None


def splash_attention(
    q: Array, k: Array, v: Array, *, scale: float, segments: Array | None = None, causal: bool = False
) -> Array:
    """Attention within segments [B, S], or of everything to everything; causal where asked.

    What comes out is named "attention", as is what its gradient needs beside q, k and v: a remat policy that keeps
    that name does not run the kernel again.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (_, heads, queries, head_dim), keys = q.shape, k.shape[2]
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
            assert not isinstance(found, tuple)  # residuals were not asked for
            return found

        return jax.vmap(row)(q, k, v, *segments)

    padding = ((0, 0), (0, 0), (0, 0), (0, -head_dim % LANES))
    q, k, v = (jnp.pad(x, padding) for x in (q * scale, k, v))
    own_and_all = () if segments is None else (segments, segments)
    if not mesh.empty and mesh.size > 1:
        split = partition_spec(("batch", "heads", "sequence", None), q.shape, mesh)
        whole = PartitionSpec(*split[:2], None, None)
        places = (PartitionSpec(split[0], split[2]), PartitionSpec(split[0], None))
        blocks = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(split[1], split[2])))
        in_specs = (blocks, split, whole, whole, *places[: len(own_and_all)])
        rows = jax.shard_map(rows, in_specs=in_specs, out_specs=split, check_vma=False)
    return rows(kernel, q, k, v, *own_and_all)[..., :head_dim]
