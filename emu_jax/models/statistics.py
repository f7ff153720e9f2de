"""Mean and variance of the causal embeddings over images: they standardise the embeddings and reveal a collapse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from emu_jax.models.layers import Array

MOMENTUM = 0.99  # of the EMA of the statistics, after its first 100 steps
EPS = 1e-6

Statistics = dict[str, Array]  # mean [Q, D], var [Q, D], count []


def initial(queries: int, width: int) -> Statistics:
    """Statistics that leave embeddings unchanged: mean 0, variance 1, no batch counted."""
    return {
        "mean": jnp.zeros((queries, width), jnp.float32),
        "var": jnp.ones((queries, width), jnp.float32),
        "count": jnp.zeros((), jnp.float32),
    }


def moments(
    x: Float[Array, " I *shape"], used: Bool[Array, " I"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Mean and variance over the rows in use."""
    weights = used.astype(jnp.float32).reshape(-1, *(1,) * (x.ndim - 1))
    total = jnp.maximum(weights.sum(), 1.0)
    mean = (x * weights).sum(0) / total
    return mean, (jnp.square(x - mean) * weights).sum(0) / total


def standardise(
    embeds: Float[Array, "I Q D"], mean: Float[Array, "Q D"], var: Float[Array, "Q D"]
) -> Float[Array, "I Q D"]:
    """Embeddings with mean 0 and variance 1 under these statistics; float32."""
    return (embeds - mean) * jax.lax.rsqrt(var + EPS)


def update(
    statistics: Statistics, mean: Float[Array, "Q D"], var: Float[Array, "Q D"], seen: Bool[Array, ""]
) -> Statistics:
    """Cumulative average over the first 100 batches, then an EMA; without images (not `seen`) unchanged."""
    mean, var = jax.lax.stop_gradient((mean, var))
    count = statistics["count"] + 1.0
    rate = jnp.where(seen, jnp.maximum(1.0 / count, 1.0 - MOMENTUM), 0.0)
    return {
        "mean": statistics["mean"] + rate * (mean - statistics["mean"]),
        "var": statistics["var"] + rate * (var - statistics["var"]),
        "count": jnp.where(seen, count, statistics["count"]),
    }


def prediction_metrics(
    predicted: Float[Array, "N D"], targets: Float[Array, "N D"], used: Bool[Array, " N"]
) -> dict[str, Float[Array, ""]]:
    """Whether predicted embeddings vary as their targets do, by any visual head: both figures are 1 if they do.

    `predicted_variance` is the ratio of their total variances; the mean of several likely answers has less than each.
    `predicted_rank` is the ratio of the participation ratios of their covariances' spectra; near 0, all predictions
    lie on a line.
    """

    def spread(x: Float[Array, "N D"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        x = x.astype(jnp.float32)
        mean, variance = moments(x, used)
        centred = (x - mean) * used[:, None]
        covariance = centred.T @ centred  # [D, D]
        rank = jnp.square(jnp.trace(covariance)) / jnp.maximum(jnp.square(covariance).sum(), 1e-30)
        return variance.sum(), rank

    (variance, rank), (target_variance, target_rank) = spread(predicted), spread(targets)
    return {
        "predicted_variance": variance / jnp.maximum(target_variance, 1e-30),
        "predicted_rank": rank / jnp.maximum(target_rank, 1e-30),
    }


def collapse_metrics(
    embeds: Float[Array, "I Q D"], used: Bool[Array, " I"], images: int = 64
) -> dict[str, Float[Array, ""]]:
    """Whether the embeddings, before standardising, still distinguish the images; from the first `images` of them.

    `variance_fraction` is the share of the embeddings' variance that lies between images (the rest is the same for
    every image). `effective_rank` is the participation ratio of their covariance's spectrum, between 1 (all on a line)
    and the number of images.
    """
    embeds, used = jax.lax.stop_gradient(embeds[:images]), used[:images]
    weights = used.astype(jnp.float32)
    count = jnp.maximum(weights.sum(), 1.0)
    _, between = moments(embeds, used)  # [Q, D]
    flat = embeds.reshape(-1, embeds.shape[-1])
    _, total = moments(flat, jnp.repeat(used, embeds.shape[1]))  # [D]
    mean = (embeds * weights[:, None, None]).sum(0) / count
    centred = ((embeds - mean) * weights[:, None, None]).reshape(embeds.shape[0], -1)  # [I, Q*D]
    gram = centred @ centred.T  # [I, I]: the covariance's spectrum without its D x D matrix
    return {
        "variance_fraction": between.mean() / jnp.maximum(total.mean(), 1e-30),
        "effective_rank": jnp.square(jnp.trace(gram)) / jnp.maximum(jnp.square(gram).sum(), 1e-30),
    }
