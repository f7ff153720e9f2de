"""Emu: the three networks composed, and the interleaved-sequence loss.

In: a `Batch` of packed rows (uint8 images, token ids, segment ids, …). Out: the loss and its parts, or the
named intermediates. Everything here is a pure function of a plain nested dict of parameters; the Flax modules
are merged at trace time (`bind`) and never seen by the training step.

    images [B, I, H, W, 3] ─ vision ─ ln_visual ─ causal ─ embeddings [B, I*Q, D] ─┐ gathered at every <image>
    tokens   [B, S] ─────────── token embeddings [B, S, D] ──────────────────────────┴─ LLaMA ─ hidden [B, S, D]
                                                        token head: cross-entropy on the next text token ──┤
                                                regression head: distance to the next input embedding ─────┘
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from emu_jax.errors import UserError, check_fields
from emu_jax.models.causal import INITS, CausalConfig, make_causal
from emu_jax.models.layers import REMAT_POLICIES, Array, LayerNorm, named_axes, split_key
from emu_jax.models.llama import Llama, LlamaConfig
from emu_jax.models.losses import MEANS, SourceWeights, by_source, regression_losses, source_scales, text_loss
from emu_jax.models.vision import VisionConfig, VisionEncoder
from emu_jax.sharding import with_logical_constraint

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
STATISTICS_MOMENTUM = 0.99  # of the running embedding statistics, after the first hundred steps
STATISTICS_EPS = 1e-6

Params = dict[str, Any]  # nested dict of arrays
Statistics = dict[str, Array]  # mean [Q, D], var [Q, D], count []


@dataclasses.dataclass(frozen=True)
class EmuConfig:
    """The model's sizes and how it computes; hashable, so that jitted functions take it as static.

    Attributes:
      dtype, param_dtype: of compute and of the master parameters.
      init: how parameters that nothing is loaded into start. "reference": the Causal Transformer (`causal.py`) and the
        regression head as the published code draws them; LLaMA and EVA-CLIP, which it loads, as with "scaled", where
        every linear map starts with the variance 1 / in, whatever the width, and queries with variance 1.
      float32_gradients: weights' gradients leave their products in float32 and are added over devices in it, at twice
        the traffic of bfloat16; nothing changes where compute is float32.
      remat: what the backward pass keeps of a block (`layers.REMAT_POLICIES`).
      unroll: write the layers out instead of scanning them (shallow models on CPUs).
      loss_chunk: sequence positions whose logits exist at a time.
      text_loss_weight, regression_loss_weight: of the two losses (published nowhere; 1 : 1 by default). Without
        weight the regression loss is not computed.
      loss_mean: "tokens": both losses are means over the global batch's positions by their weights, so that a source
        counts by its tokens; "sources": over each source's, and then over the sources (`losses.source_scales`).
      learn_image_token: [IMG] is a label as any token is, so that the model can begin an image on its own, which ends a
        text in generation (`Emu.ends`). The published model never had it as a label.
      standardise: normalise the causal embeddings per (query, dimension) over the batch. From scratch they
        collapse to a constant without it; the published model starts from pretrained parts and has none.
      stop_target_inputs: no gradient reaches the encoder through embeddings that are themselves regression targets.
        From scratch the regression else teaches it to make each embedding tell the next, and so all the same.
      pixel_mean, pixel_std: per channel, of pixels in [0, 1].
    """

    vision: VisionConfig
    causal: CausalConfig
    llama: LlamaConfig
    dtype: str = "float32"
    param_dtype: str = "float32"
    init: str = "reference"
    float32_gradients: bool = False
    remat: str = "none"
    unroll: bool = False
    loss_chunk: int = 256
    text_loss_weight: float = 1.0
    regression_loss_weight: float = 1.0
    loss_mean: str = "tokens"
    learn_image_token: bool = False
    standardise: bool = False
    stop_target_inputs: bool = False
    pixel_mean: tuple[float, ...] = CLIP_MEAN
    pixel_std: tuple[float, ...] = CLIP_STD

    def __post_init__(self):
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"model.remat={self.remat!r} is unknown; choose one of {sorted(REMAT_POLICIES)}")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise UserError(f"model.{name}={getattr(self, name)!r}; expected float32 or bfloat16")
        if self.init not in INITS:
            raise UserError(f"model.init={self.init!r} is unknown; choose one of {', '.join(INITS)}")
        if self.loss_mean not in MEANS:
            raise UserError(f"model.loss_mean={self.loss_mean!r} is unknown; choose one of {', '.join(MEANS)}")
        if self.loss_chunk < 1:
            raise UserError(f"model.loss_chunk={self.loss_chunk}; expected at least 1 position")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> EmuConfig:
        """Builds and validates from `config.model` (a ConfigDict or a plain dict)."""
        parts = {"vision": VisionConfig, "causal": CausalConfig, "llama": LlamaConfig}
        values = {name: _from_fields(part, f"model.{name}", fields[name]) for name, part in parts.items()}
        rest = {name: value for name, value in dict(fields).items() if name not in parts}
        for name in ("pixel_mean", "pixel_std"):
            if name in rest:
                rest[name] = tuple(rest[name])
        return _from_fields(cls, "model", values | rest)

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`, JSON-serialisable."""
        return dataclasses.asdict(self)


def _from_fields(cls: type, where: str, fields: Mapping[str, Any]) -> Any:
    check_fields(cls, where, fields)
    return cls(**dict(fields))


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Token ids that the loss treats apart; see `data/tokenizer.py`."""

    pad: int
    img: int
    img_end: int
    image: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Batch:
    """Packed rows of interleaved documents.

    Attributes:
      images: uint8 [B, I, H, W, 3] (or floating point: taken as already normalised).
      tokens: int32 [B, S]; <image> at visual positions.
      segments: int32 [B, S]; 0 padding, 1… the row's documents.
      slots: int32 [B, S]; the image slot that a visual position reads, -1 elsewhere. Documents of a row may
        read the same slot: the image is then encoded once.
      text_weights: float32 [B, S]; weight of classifying this token from the position before it.
      visual_weights: float32 [B, S]; weight of regressing this position's input embedding from the position before it.
      sources: int32 [B, S]; number of the source that a position's document is from, where there are several.
    """

    images: Array
    tokens: Array
    segments: Array
    slots: Array
    text_weights: Array
    visual_weights: Array
    sources: Array | None = None

    @classmethod
    def from_tokens(cls, images: Array, tokens: Array, segments: Array, ids: SpecialIds) -> Batch:
        """Fills in what follows from images, tokens and segments alone, as the reference does it.

        The n-th [IMG] of a row reads slot n; text labels are all but [PAD], <image>, [IMG], [/IMG] and a
        document's first token; visual targets are every <image> and [/IMG].
        """
        visual = tokens == ids.image
        number = jnp.cumsum(tokens == ids.img, axis=1) - 1  # [B, S]
        inside = jnp.concatenate([jnp.zeros_like(segments[:, :1], bool), segments[:, 1:] == segments[:, :-1]], 1)
        target = visual | (tokens == ids.img_end)
        special = target | (tokens == ids.img) | (tokens == ids.pad)
        live = inside & (segments > 0)
        return cls(
            images=images,
            tokens=tokens,
            segments=segments,
            slots=jnp.where(visual, number, -1),
            text_weights=(live & ~special).astype(jnp.float32),
            visual_weights=(live & target).astype(jnp.float32),
        )


class EmuModel(nnx.Module):
    """Declares the parameters of the three networks; `init`, `abstract` and `bind` make it functional."""

    def __init__(self, rngs: nnx.Rngs, c: EmuConfig):
        dtype = c.param_dtype
        self.vision = VisionEncoder(rngs, c.vision, dtype)
        self.ln_visual = LayerNorm(c.vision.width, c.vision.norm_eps, dtype)
        self.causal = make_causal(rngs, c.causal, c.vision.width, c.llama.width, dtype, c.init)
        self.llama = Llama(rngs, c.llama, dtype, c.init)
        self.set_attributes(float32_gradients=c.float32_gradients)  # of every module that asks
        self.config = c

    def encode(self, pixels: Array, key: Array | None = None) -> dict[str, Array]:
        """Normalised pixels [N, H, W, 3] -> vision_features, ln_visual [N, P+1, Dv], causal_embeds [N, Q, D]."""
        c = self.config
        key_vision, key_causal = split_key(key, 2)
        options: dict[str, Any] = {"remat": c.remat, "unroll": c.unroll}
        features = self.vision(pixels.astype(c.dtype), key=key_vision, **options)
        normed = self.ln_visual(features)
        embeds = self.causal(normed, key=key_causal, **options)
        return {"vision_features": features, "ln_visual": normed, "causal_embeds": embeds}


@functools.lru_cache(maxsize=8)
def _template(config: EmuConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: EmuModel(nnx.Rngs(params=0), config)))


def init(config: EmuConfig, key: Array) -> Params:
    """Fresh parameters, drawn from `key`. Jit it with out_shardings to create them already split."""
    return nnx.to_pure_dict(nnx.state(EmuModel(nnx.Rngs(params=key), config)))


def abstract(config: EmuConfig) -> Params:
    """The parameter tree as `ShapeDtypeStruct`s; allocates nothing."""
    return nnx.to_pure_dict(_template(config)[1])


def logical_axes(config: EmuConfig) -> dict[str, Any]:
    """The parameter tree with a tuple of logical axis names at every leaf."""
    return named_axes(_template(config)[1])


def bind(config: EmuConfig, params: Params) -> EmuModel:
    """The module over these parameters; free at trace time."""
    return nnx.merge(_template(config)[0], params)


def initial_statistics(config: EmuConfig) -> Statistics:
    """Statistics that leave embeddings as they are: mean 0, variance 1, nothing counted."""
    shape = (config.causal.queries, config.llama.width)
    return {
        "mean": jnp.zeros(shape, jnp.float32),
        "var": jnp.ones(shape, jnp.float32),
        "count": jnp.zeros((), jnp.float32),
    }


def normalise_pixels(images: Array, config: EmuConfig) -> Array:
    """uint8 [..., H, W, 3] -> float32, CLIP-normalised; floating point passes as already normalised."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    mean, std = jnp.asarray(config.pixel_mean), jnp.asarray(config.pixel_std)
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def standardise(embeds: Array, mean: Array, var: Array) -> Array:
    """embeds [N, Q, D] float32 -> the same with statistics [Q, D] removed."""
    return (embeds - mean) * jax.lax.rsqrt(var + STATISTICS_EPS)


def encode_images(params: Params, statistics: Statistics, images: Array, *, config: EmuConfig) -> Array:
    """images [N, H, W, 3] (uint8, or floating point already normalised) -> LLM inputs [N, Q, D], float32."""
    embeds = bind(config, params).encode(normalise_pixels(images, config))["causal_embeds"]
    embeds = embeds.astype(jnp.float32)
    return standardise(embeds, statistics["mean"], statistics["var"]) if config.standardise else embeds


def _weighted_moments(x: Array, used: Array) -> tuple[Array, Array]:
    """Mean and variance over the used rows: x [N, ...], used bool [N] -> 2 x [...]."""
    weights = used.astype(jnp.float32).reshape(-1, *(1,) * (x.ndim - 1))
    total = jnp.maximum(weights.sum(), 1.0)
    mean = (x * weights).sum(0) / total
    return mean, (jnp.square(x - mean) * weights).sum(0) / total


def collapse_metrics(embeds: Array, used: Array, images: int = 64) -> dict[str, Array]:
    """Whether images are told apart: from causal embeddings [N, Q, D] and used bool [N], before standardising.

    `variance_fraction` is the share of the embeddings' variance that lies between images (the rest is the
    same for every image); `effective_rank` is the participation ratio of their covariance's spectrum,
    between 1 (all on a line) and the number of images looked at (the first `images`).
    """
    embeds, used = jax.lax.stop_gradient(embeds[:images]), used[:images]
    weights = used.astype(jnp.float32)
    count = jnp.maximum(weights.sum(), 1.0)
    _, between = _weighted_moments(embeds, used)  # [Q, D]
    flat = embeds.reshape(-1, embeds.shape[-1])
    _, total = _weighted_moments(flat, jnp.repeat(used, embeds.shape[1]))  # [D]
    mean = (embeds * weights[:, None, None]).sum(0) / count
    centred = ((embeds - mean) * weights[:, None, None]).reshape(embeds.shape[0], -1)  # [n, Q*D]
    gram = centred @ centred.T  # [n, n]: the covariance's spectrum without its D x D matrix
    return {
        "variance_fraction": between.mean() / jnp.maximum(total.mean(), 1e-30),
        "effective_rank": jnp.square(jnp.trace(gram)) / jnp.maximum(jnp.square(gram).sum(), 1e-30),
    }


def _embed_images(
    model: EmuModel, statistics: Statistics, batch: Batch, key: Array | None, train: bool
) -> tuple[dict[str, Array], dict[str, Array], Statistics]:
    """Encodes every slot: named arrays [B*I, …] with `embeddings` [B*I, Q, D] last, metrics, new statistics."""
    c = model.config
    rows, slots = batch.images.shape[:2]
    images = with_logical_constraint(
        batch.images.reshape(rows * slots, *batch.images.shape[2:]), ("image", None, None, None)
    )
    named = model.encode(normalise_pixels(images, c), key)
    embeds = named["causal_embeds"].astype(jnp.float32)  # [B*I, Q, D]
    used = (batch.slots[:, :, None] == jnp.arange(slots)).any(1).reshape(-1)  # bool [B*I]
    metrics = collapse_metrics(embeds, used)
    if c.standardise:
        mean, var = statistics["mean"], statistics["var"]
        if train:
            mean, var = _weighted_moments(embeds, used)
            statistics = _update_statistics(statistics, mean, var, used.any())
        embeds = standardise(embeds, mean, var)
    return named | {"embeddings": embeds}, metrics, statistics


def _update_statistics(statistics: Statistics, mean: Array, var: Array, seen: Array) -> Statistics:
    """A plain average over the first steps, an exponential one afterwards; a batch without images counts not."""
    mean, var = jax.lax.stop_gradient((mean, var))
    count = statistics["count"] + 1.0
    rate = jnp.where(seen, jnp.maximum(1.0 / count, 1.0 - STATISTICS_MOMENTUM), 0.0)
    return {
        "mean": statistics["mean"] + rate * (mean - statistics["mean"]),
        "var": statistics["var"] + rate * (var - statistics["var"]),
        "count": jnp.where(seen, count, statistics["count"]),
    }


def _latest(index: Array, here: Array) -> Array:
    """For every position the last index at which `here` held, 0 before any: [B, S]."""
    return jax.lax.cummax(jnp.where(here, index, 0), axis=1)


def interleave(model: EmuModel, embeddings: Array, batch: Batch, ids: SpecialIds) -> tuple[Array, Array]:
    """Scatters image embeddings [B*I, Q, D] among the token embeddings.

    Returns:
      The LLM's inputs [B, S, D] in the compute dtype and RoPE positions int32 [B, S] that restart in every segment.
    """
    rows, length = batch.tokens.shape
    queries = embeddings.shape[1]
    index = jnp.arange(length)[None, :]
    query = index - _latest(index, batch.tokens == ids.img) - 1  # position within its image, at every <image>
    visual = (batch.slots >= 0)[..., None]  # [B, S, 1]
    source = jnp.where(visual[..., 0], batch.slots * queries + query, 0)  # [B, S] into [I*Q]
    by_row = embeddings.reshape(rows, -1, embeddings.shape[-1])  # [B, I*Q, D]
    images = jnp.take_along_axis(by_row, source[..., None], axis=1)  # [B, S, D]
    if model.config.stop_target_inputs:
        target = batch.visual_weights[..., None] > 0  # [B, S, 1]
        images = jnp.where(target, jax.lax.stop_gradient(images), images)
    words = model.llama.embed(batch.tokens).astype(jnp.float32)  # [B, S, D]
    inputs = jnp.where(visual, images, words)
    starts = jnp.concatenate(
        [jnp.ones_like(batch.segments[:, :1], bool), batch.segments[:, 1:] != batch.segments[:, :-1]], axis=1
    )
    return inputs, index - _latest(index, starts)


def _next(x: Array) -> Array:
    """[B, S, …] -> what stands one position later, zeros behind the end. Whole rows keep the products' shapes even."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)) + ((0, 0),) * (x.ndim - 2))


def _forward(
    params: Params,
    statistics: Statistics,
    batch: Batch,
    config: EmuConfig,
    ids: SpecialIds,
    key: Array | None,
    train: bool,
) -> tuple[EmuModel, dict[str, Array], dict[str, Array], Statistics]:
    model = bind(config, params)
    named, metrics, statistics = _embed_images(model, statistics, batch, key, train)
    inputs, positions = interleave(model, named["embeddings"], batch, ids)
    # The encoders draw from the key's first two descendants (`EmuModel.encode`).
    options: dict[str, Any] = {
        "remat": config.remat,
        "unroll": config.unroll,
        "key": None if key is None else jax.random.fold_in(key, 2),
    }
    hidden = model.llama(inputs.astype(config.dtype), positions, batch.segments, **options)
    return model, named | {"inputs": inputs, "hidden_states": hidden}, metrics, statistics


def loss_weights(batch: Batch, sources: int = 0) -> tuple[Array, ...]:
    """What summed losses are divided by: the sums of the text and of the visual weights, each [], and the same by
    source, each [sources]."""
    weights = (batch.text_weights, batch.visual_weights)
    of_each = (by_source(w, batch.sources, sources) if sources else jnp.zeros(0) for w in weights)
    return *(w.sum() for w in weights), *of_each


def loss(
    params: Params,
    statistics: Statistics,
    batch: Batch,
    *,
    config: EmuConfig,
    ids: SpecialIds,
    key: Array | None = None,
    train: bool = True,
    normalisers: tuple[Array, ...] | None = None,
    sources: tuple[SourceWeights, ...] = (),
) -> tuple[Array, tuple[dict[str, Array], Statistics]]:
    """The training objective, from pixels to a number: paper §2.2, eq. 1 with the reference's masks.

    loss = text_loss_weight * mean over labelled tokens of -log p(token | everything before it)
         + regression_loss_weight * mean over visual targets of |regress_head(hidden) - input embedding|^2 / D

    Both means are by the batch's weights; with `config.loss_mean` "sources" and several of them, of each source first.
    Targets are the inputs after standardisation, under stop_gradient: one pair for each <image> and one for
    [/IMG], i.e. Q + 1 = 33 an image in the published model. Without images the regression loss is exactly 0.

    Args:
      params, statistics: as `init` and `initial_statistics` make them.
      key: randomness of dropout and drop-path; None turns them off.
      train: standardise with this batch's statistics (and update the running ones) or with the running ones.
      normalisers: `loss_weights` of the whole batch when this is a micro-batch of it.
      sources: of the batch, whose losses are told apart; none where it has one.

    Returns:
      (loss [], (metrics, statistics)); metrics are float32 scalars: loss, text_loss, regression_loss,
      variance_fraction, effective_rank, and the two losses of each source (NaN where a batch has none of its targets).
    """
    model, named, metrics, statistics = _forward(params, statistics, batch, config, ids, key, train)
    hidden = named["hidden_states"]  # [B, S, D] predicts what follows; the last position, nothing
    if normalisers is None:
        normalisers = loss_weights(batch, len(sources))
    text_total, visual_total, *of_each = normalisers
    text_weights, visual_weights = batch.text_weights, batch.visual_weights
    if config.loss_mean == "sources" and len(sources) > 1:
        factors = [source.text for source in sources], [source.visual for source in sources]
        text_scales, visual_scales = map(source_scales, of_each, factors)  # [K] each
        text_weights = text_weights * text_scales[batch.sources]
        visual_weights = visual_weights * visual_scales[batch.sources]
        text_total, visual_total = jnp.ones(()), jnp.ones(())
        of_each = [of_each[0] * text_scales, of_each[1] * visual_scales]
    head = model.llama.lm_head.kernel[...]
    text, terms = text_loss(hidden, head, _next(batch.tokens), _next(text_weights), config.loss_chunk)
    text = text / jnp.maximum(text_total, 1e-6)
    regression, distances = jnp.zeros((), jnp.float32), jnp.zeros_like(terms)
    if config.regression_loss_weight:
        predictions = model.llama.regress_head(hidden)  # [B, S, D]
        distances = regression_losses(predictions, _next(named["inputs"]), _next(visual_weights))  # [B, S]
        regression = distances.sum() / jnp.maximum(visual_total, 1e-6)
    total = config.text_loss_weight * text + config.regression_loss_weight * regression
    losses = {"loss": total, "text_loss": text, "regression_loss": regression}
    for kind, values, totals in zip(("text", "regression"), (terms, distances), of_each, strict=True):
        if sources:
            # A document's first position predicts within it, its last one nothing: `_next` crosses no border.
            sums = by_source(jax.lax.stop_gradient(values), batch.sources, len(sources)) / totals
            losses |= {f"{kind}_loss/{source.name}": sums[i] for i, source in enumerate(sources)}
    metrics = losses | metrics
    return total, (metrics, statistics)


def intermediates(
    params: Params,
    statistics: Statistics,
    batch: Batch,
    *,
    config: EmuConfig,
    ids: SpecialIds,
) -> dict[str, Array]:
    """Every named array between pixels and losses, without dropout; for analysis, notebooks and tests.

    Returns (N = B*I slots, in row order):
      vision_features, ln_visual [N, P+1, Dv]; causal_embeds [N, Q, D], before standardising; embeddings
      [N, Q, D], what the LLM reads; inputs, hidden_states [B, S, D]; logits [B, S, V] float32;
      regress_pred, regress_target [B, S-1, D] (position t predicts input t+1); text_mask, visual_mask bool
      [B, S-1]; text_loss, regression_loss [].
    """
    model, named, _, _ = _forward(params, statistics, batch, config, ids, None, train=False)
    hidden = named["hidden_states"]
    _, (metrics, _) = loss(params, statistics, batch, config=config, ids=ids, train=False)
    return named | {
        "logits": model.llama.lm_head(hidden).astype(jnp.float32),
        "regress_pred": model.llama.regress_head(hidden[:, :-1]).astype(jnp.float32),
        "regress_target": named["inputs"][:, 1:],
        "text_mask": batch.text_weights[:, 1:] > 0,
        "visual_mask": batch.visual_weights[:, 1:] > 0,
        "text_loss": metrics["text_loss"],
        "regression_loss": metrics["regression_loss"],
    }
