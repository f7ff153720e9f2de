"""A vector quantiser of visual embeddings: each becomes G codes out of K, and is restored from them.

    embedding [D] ─ down ─ z [G, d] ─ nearest entry of each group's codebook [K, d] ─ codes [G]
                           entries [G, d] ─ up ─ restored embedding [D]

As in VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937), with codes in fewer dimensions than the embeddings (Yu et al.
2022, arXiv 2110.04627). With one group an embedding is one code, as in SEED-LLaMA (arXiv 2310.01218); G groups are a
product quantiser, whose codes the language model predicts side by side.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from emu_jax.errors import UserError
from emu_jax.models.layers import Array, Linear

COMMITMENT = 0.25  # weight of z's distance to its code, as in VQ-VAE


@dataclasses.dataclass(frozen=True)
class Codebook:
    """Sizes of a vector quantiser.

    Attributes:
      codes: K, entries of a group's codebook.
      groups: G, codes of an embedding.
      width: dimensions of the entries of all groups together.
    """

    codes: int = 1024
    groups: int = 1
    width: int = 16

    def check(self, where: str) -> None:
        """Raises UserError, with fields under `where`, where the sizes cannot work."""
        for name, least in (("codes", 2), ("groups", 1), ("width", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{where}.{name}={getattr(self, name)}; expected {least} or more")
        if self.width % self.groups:
            raise UserError(
                f"{where}.width={self.width} does not divide into {where}.groups={self.groups} groups; expected a "
                "multiple of them"
            )


class VectorQuantiser(nnx.Module):
    """The maps of a quantiser; the codebook [G, K, d] is an argument, since an EMA may learn it."""

    def __init__(self, rngs: nnx.Rngs, width: int, sizes: Codebook, dtype: str):
        self.down = Linear(rngs, width, sizes.width, ("embed", "codes"), dtype, bias=True)
        self.up = Linear(rngs, sizes.width, 2 * width, ("codes", "mlp"), dtype, bias=True)
        self.out = Linear(rngs, 2 * width, width, ("mlp", "embed"), dtype, bias=True)
        self.groups = sizes.groups

    def project(self, embeddings: Float[Array, "*batch D"]) -> Float[Array, "*batch G d"]:
        """Embeddings -> z, float32."""
        z = self.down(embeddings.astype(jnp.float32))
        return z.reshape(*z.shape[:-1], self.groups, -1)

    def restore(self, entries: Float[Array, "*batch G d"]) -> Float[Array, "*batch D"]:
        """Entries of the codebook -> embeddings, float32."""
        flat = entries.reshape(*entries.shape[:-2], -1)
        return self.out(jax.nn.silu(self.up(flat)))


def nearest_codes(z: Float[Array, "*batch G d"], codebook: Float[Array, "G K d"]) -> Int[Array, "*batch G"]:
    """The nearest entry of each group."""
    products = jnp.einsum("...gd,gkd->...gk", z, codebook, precision=jax.lax.Precision.HIGHEST)
    return (jnp.square(codebook).sum(-1) - 2 * products).argmin(-1)  # |z|^2 is the same for all entries


def look_up(codes: Int[Array, "*batch G"], codebook: Float[Array, "G K d"]) -> Float[Array, "*batch G d"]:
    """The entries of these codes."""
    return codebook[jnp.arange(len(codebook)), codes]


class Quantised(NamedTuple):
    """Embeddings through a quantiser, and what they cost.

    Attributes:
      codes: of each embedding.
      restored: embeddings; the gradient passes the choice of codes as if it were none ("straight-through").
      reconstruction: squared error of `restored`, over D.
      commitment: squared distance of z to its entries, over their dimensions; trains z.
      codebook: the same number; trains the entries.
    """

    codes: Int[Array, "*batch G"]
    restored: Float[Array, "*batch D"]
    reconstruction: Float[Array, "*batch"]
    commitment: Float[Array, "*batch"]
    codebook: Float[Array, "*batch"]


def quantise(
    module: VectorQuantiser, codebook: Float[Array, "G K d"], embeddings: Float[Array, "*batch D"]
) -> Quantised:
    """Embeddings -> codes -> embeddings."""
    z = module.project(embeddings)  # [..., G, d]
    codes = nearest_codes(jax.lax.stop_gradient(z), jax.lax.stop_gradient(codebook))
    entries = look_up(codes, codebook)  # [..., G, d]
    restored = module.restore(z + jax.lax.stop_gradient(entries - z))
    return Quantised(
        codes,
        restored,
        jnp.square(restored - embeddings).mean(-1),
        jnp.square(z - jax.lax.stop_gradient(entries)).mean((-2, -1)),
        jnp.square(jax.lax.stop_gradient(z) - entries).mean((-2, -1)),
    )


def multiply_adds(width: int, sizes: Codebook) -> float:
    """Those of `quantise` for an embedding."""
    return width * sizes.width + sizes.codes * sizes.width + 2 * width * sizes.width + 2 * width**2
