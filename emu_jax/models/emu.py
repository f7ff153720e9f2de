"""Emu: the three networks composed, and the interleaved-sequence loss.

In: a `Batch` of packed rows (uint8 images, token ids, segment ids, …). Out: the loss and its parts, or the
named intermediates. Everything here is a pure function of a plain nested dict of parameters; the Flax modules
are merged at trace time (`bind`) and never seen by the training step.

    images [B, I, …, 3] ─ vision ─ ln_visual ─ causal ─ embeddings [B, I*Q, D] ─┐ gathered at every <image>
    tokens [B, S] ──────────── token embeddings [B, S, D] ──────────────────────┴─ LLaMA ─ hidden [B, S, D] ─┐
                                                             token head: cross-entropy of the next text token ─┤
                                     visual head (`heads/`): distance to the next input embedding, as published┘
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int, UInt8

from emu_jax.errors import UserError, build
from emu_jax.models import parameters
from emu_jax.models import statistics as running
from emu_jax.models.causal import INITS, CausalConfig, make_causal
from emu_jax.models.heads.head import VisualHead
from emu_jax.models.heads.registry import PUBLISHED, build_head
from emu_jax.models.layers import Array, LayerNorm, check_compute, split_key
from emu_jax.models.llama import Llama, LlamaConfig
from emu_jax.models.losses import MEANS, Mean, SourceWeights, cross_entropy, over_sources, sum_by_source
from emu_jax.models.parameters import Params
from emu_jax.models.statistics import Statistics
from emu_jax.models.vision import VisionConfig, VisionEncoder
from emu_jax.sharding import with_logical_constraint

JUDGED = 256  # predictions of a batch whose variation is measured
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class EmuConfig:
    """The model's sizes and how it computes; hashable, so that jitted functions take it as a static argument.

    Attributes:
      dtype, param_dtype: Dtypes of the computation and of the master parameters.
      init: Distribution of the initial parameters. "reference": the Causal Transformer (`causal.py`) and the regression
        head as the published code initialises them, LLaMA and EVA-CLIP, which that code loads, as under "scaled".
        "scaled": every linear map with variance 1 / inputs, and queries with variance 1, at any width.
      float32_gradients: Keep weight gradients in float32 from their product on and reduce them over devices in it, at
        twice the traffic of bfloat16; changes nothing where compute is float32.
      unroll: Unroll the layers instead of scanning them (shallow models on CPUs).
      loss_chunk: Number of sequence positions whose logits exist at a time.
      visual_head: How the next visual embedding is predicted (`heads/`): its loss is the "regression loss". By default
        l2 regression, as published.
      text_loss_weight, regression_loss_weight: Weights of the two losses (1 : 1 by default; the paper gives none). With
        weight 0 the regression loss is not computed.
      loss_mean: "tokens": both losses are weighted means over the global batch's positions, so that a source counts by
        its tokens. "sources": means over each source's positions, then over the sources (`losses.over_sources`).
      learn_image_token: Make [IMG] a label as any other token, so that the model can start an image on its own, which
        ends a text in generation (`Emu.ends`). The published model was trained without.
      standardise: Normalise the causal embeddings per (query, dimension) over the batch. In training from scratch they
        collapse to a constant without it; the published model starts from pretrained parts and does without.
      stop_target_inputs: Stop the gradient through embeddings that are themselves regression targets. In training from
        scratch, the encoder otherwise learns to make each embedding predict the next, and they collapse.
      input_noise: Standard deviation of Gaussian noise on the embeddings of predicted images where the language model
        reads them in training; targets stay clean. In generation it reads its own predictions, which are not exact.
      scheduled_sampling: Share of the embeddings of predicted images in whose place the language model reads, in
        training, its own prediction from a first forward pass, without a gradient through it (Mihaylova and Martins
        2019, arXiv 1906.07651). Above 0 it costs that pass.
      pixel_mean, pixel_std: Mean and standard deviation of each channel, for pixels in [0, 1].
    """

    vision: VisionConfig
    causal: CausalConfig
    llama: LlamaConfig
    dtype: str = "float32"
    param_dtype: str = "float32"
    init: str = "reference"
    float32_gradients: bool = False
    unroll: bool = False
    loss_chunk: int = 256
    visual_head: VisualHead = PUBLISHED
    text_loss_weight: float = 1.0
    regression_loss_weight: float = 1.0
    loss_mean: str = "tokens"
    learn_image_token: bool = False
    standardise: bool = False
    stop_target_inputs: bool = False
    input_noise: float = 0.0
    scheduled_sampling: float = 0.0
    pixel_mean: tuple[float, ...] = CLIP_MEAN
    pixel_std: tuple[float, ...] = CLIP_STD

    def __post_init__(self):
        check_compute("model", self)
        if self.init not in INITS:
            raise UserError(f"model.init={self.init!r} is unknown; choose one of {', '.join(INITS)}")
        if self.loss_mean not in MEANS:
            raise UserError(f"model.loss_mean={self.loss_mean!r} is unknown; choose one of {', '.join(MEANS)}")
        most = self.visual_head.most_queries
        if most is not None and self.causal.queries > most:
            raise UserError(
                f"model.causal.queries={self.causal.queries}: the visual head {self.visual_head.name} predicts at most "
                f"{most} embeddings of an image; see its settings"
            )
        if not self.input_noise >= 0:
            raise UserError(f"model.input_noise={self.input_noise}; expected 0 or more")
        if not 0 <= self.scheduled_sampling <= 1:
            raise UserError(f"model.scheduled_sampling={self.scheduled_sampling}; expected a share of 0 to 1")
        if self.scheduled_sampling and not self.visual_head.reads_samples:
            raise UserError(
                f"model.scheduled_sampling={self.scheduled_sampling}: the visual head {self.visual_head.name} does not "
                "read its predictions; set it to 0"
            )
        if self.loss_chunk < 1:
            raise UserError(f"model.loss_chunk={self.loss_chunk}; expected at least 1 position")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> EmuConfig:
        """Builds and validates from `config.model` (a ConfigDict or a plain dict)."""
        parts: dict[str, Any] = {name: build(part, f"model.{name}", fields[name]) for name, part in PARTS.items()}
        if "visual_head" in fields:
            parts["visual_head"] = build_head("model.visual_head", fields["visual_head"])
        return build(cls, "model", dict(fields) | parts)

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`, JSON-serialisable."""
        return dataclasses.asdict(self)


VISUAL_HEAD = "llama/visual_head/"  # before the names of its parameters
ENCODER_PARTS = ("vision", "ln_visual", "causal")  # of the parameters
PARTS: dict[str, type] = {"vision": VisionConfig, "causal": CausalConfig, "llama": LlamaConfig}  # stacks of layers


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Token ids that the loss treats specially; see `data/tokenizer.py`."""

    pad: int
    img: int
    img_end: int
    image: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Batch:
    """Packed rows of interleaved documents.

    Attributes:
      images: Pixels; floating-point ones are taken as normalised.
      tokens: Token ids; <image> at visual positions.
      segments: 0 at padding, 1… for the row's documents.
      slots: The image slot that a visual position reads, -1 elsewhere. Documents of a row may read the same slot: the
        image is then encoded once.
      text_weights: Weight of classifying this token from the position before it.
      visual_weights: Weight of regressing this position's input embedding from the position before it.
      source_ids: Index of the data source of the position's document, where there are several.
    """

    images: UInt8[Array, "B I height width 3"] | Float[Array, "B I height width 3"]
    tokens: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    slots: Int[Array, "B S"]
    text_weights: Float[Array, "B S"]
    visual_weights: Float[Array, "B S"]
    source_ids: Int[Array, "B S"] | None = None


class ImageEncoder(nnx.Module):
    """Declares the parameters between an image and the language model's inputs: those named in `ENCODER_PARTS`."""

    def __init__(self, rngs: nnx.Rngs, c: EmuConfig):
        dtype = c.param_dtype
        self.vision = VisionEncoder(rngs, c.vision, dtype)
        self.ln_visual = LayerNorm(c.vision.width, c.vision.norm_eps, dtype)
        self.causal = make_causal(rngs, c.causal, c.vision.width, c.llama.width, dtype, c.init)
        self.config = c

    def encode(self, pixels: Float[Array, "I height width 3"], key: Array | None = None) -> dict[str, Array]:
        """Normalised pixels -> vision_features, ln_visual [I, P+1, Dv], causal_embeds [I, Q, D]."""
        c = self.config
        key_vision, key_causal = split_key(key, 2)
        features = self.vision(pixels.astype(c.dtype), key=key_vision, unroll=c.unroll)
        normed = self.ln_visual(features)
        embeds = self.causal(normed, key=key_causal, unroll=c.unroll)
        return {"vision_features": features, "ln_visual": normed, "causal_embeds": embeds}


class EmuModel(ImageEncoder):
    """Declares the parameters of the three networks; `init`, `abstract` and `bind` make it functional."""

    def __init__(self, rngs: nnx.Rngs, c: EmuConfig):
        super().__init__(rngs, c)
        self.llama = Llama(rngs, c.llama, c.visual_head, c.param_dtype, c.init)
        self.set_attributes(float32_gradients=c.float32_gradients)  # in every submodule that has the attribute


def init(config: EmuConfig, key: Array) -> Params:
    """Initial parameters (`parameters.init`)."""
    return parameters.init(EmuModel, config, key)


def abstract(config: EmuConfig) -> Params:
    """The parameters' shapes and dtypes (`parameters.abstract`)."""
    return parameters.abstract(EmuModel, config)


def logical_axes(config: EmuConfig) -> dict[str, Any]:
    """The parameters' logical axes (`parameters.logical_axes`)."""
    return parameters.logical_axes(EmuModel, config)


def bind(config: EmuConfig, params: Params) -> EmuModel:
    """The module over these parameters (`parameters.bind`); those of no part of Emu are left out."""
    return parameters.bind(EmuModel, config, {part: params[part] for part in (*ENCODER_PARTS, "llama")})


def initial_statistics(config: EmuConfig) -> Statistics:
    """Statistics that leave embeddings unchanged (`statistics.initial`)."""
    return running.initial(config.causal.queries, config.llama.width)


def normalise_pixels(
    images: UInt8[Array, "*batch height width 3"] | Float[Array, "*batch height width 3"], config: EmuConfig
) -> Float[Array, "*batch height width 3"]:
    """uint8 -> float32, CLIP-normalised; floating point is taken as normalised and returned as it is."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    mean, std = jnp.asarray(config.pixel_mean), jnp.asarray(config.pixel_std)
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def encode_images(
    params: Params,
    statistics: Statistics,
    images: UInt8[Array, "I height width 3"] | Float[Array, "I height width 3"],
    *,
    config: EmuConfig,
) -> Float[Array, "I Q D"]:
    """Images (floating point: taken as normalised) -> the language model's inputs, float32; needs `ENCODER_PARTS`."""
    own = {part: params[part] for part in ENCODER_PARTS}
    encoder = parameters.bind(ImageEncoder, config, own)
    embeds = encoder.encode(normalise_pixels(images, config))["causal_embeds"]
    embeds = embeds.astype(jnp.float32)
    return running.standardise(embeds, statistics["mean"], statistics["var"]) if config.standardise else embeds


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
    metrics = running.collapse_metrics(embeds, used)
    if c.standardise:
        mean, var = statistics["mean"], statistics["var"]
        if train:
            mean, var = running.moments(embeds, used)
            statistics = running.update(statistics, mean, var, used.any())
        embeds = running.standardise(embeds, mean, var)
    return named | {"embeddings": embeds}, metrics, statistics


def _latest(index: Array, here: Array) -> Array:
    """For every position the last index at which `here` was true, 0 before the first: [B, S]."""
    return jax.lax.cummax(jnp.where(here, index, 0), axis=1)


def _numbers(batch: Batch, ids: SpecialIds) -> Int[Array, "B S"]:
    """At every <image>, the number of its embedding within the image, 0 to Q - 1; elsewhere any number."""
    index = jnp.arange(batch.tokens.shape[1])[None, :]
    return index - _latest(index, batch.tokens == ids.img) - 1


def interleave(
    model: EmuModel, embeddings: Float[Array, "images Q D"], batch: Batch, ids: SpecialIds
) -> tuple[Float[Array, "B S D"], Int[Array, "B S"]]:
    """Replaces the token embedding of every <image> by its image embedding; `images` is B*I, in row order.

    Returns:
      The language model's inputs, float32, and RoPE positions, which restart in every segment.
    """
    rows, length = batch.tokens.shape
    queries = embeddings.shape[1]
    index = jnp.arange(length)[None, :]
    visual = (batch.slots >= 0)[..., None]  # [B, S, 1]
    gathered = jnp.where(visual[..., 0], batch.slots * queries + _numbers(batch, ids), 0)  # [B, S] indices into [I*Q]
    by_row = embeddings.reshape(rows, -1, embeddings.shape[-1])  # [B, I*Q, D]
    images = jnp.take_along_axis(by_row, gathered[..., None], axis=1)  # [B, S, D]
    if model.config.stop_target_inputs:
        target = batch.visual_weights[..., None] > 0  # [B, S, 1]
        images = jnp.where(target, jax.lax.stop_gradient(images), images)
    words = model.llama.embed(batch.tokens).astype(jnp.float32)  # [B, S, D]
    inputs = jnp.where(visual, images, words)
    starts = jnp.concatenate(
        [jnp.ones_like(batch.segments[:, :1], bool), batch.segments[:, 1:] != batch.segments[:, :-1]], axis=1
    )
    return inputs, index - _latest(index, starts)


def _forward(
    params: Params,
    statistics: Statistics,
    batch: Batch,
    config: EmuConfig,
    ids: SpecialIds,
    key: Array | None,
    train: bool,
) -> tuple[EmuModel, dict[str, Array], dict[str, Array], Statistics]:
    """Images to hidden states: the module, named arrays, metrics and new statistics."""
    model = bind(config, params)
    named, metrics, statistics = _embed_images(model, statistics, batch, key, train)
    inputs, positions = interleave(model, named["embeddings"], batch, ids)
    predicted = ((batch.slots >= 0) & (batch.visual_weights > 0))[..., None]  # [B, S, 1]
    read = config.visual_head.inputs(model.llama.visual_head, inputs, _numbers(batch, ids))
    read = inputs if read is inputs else jnp.where(predicted, read, inputs)
    # The encoders take the first two keys split from `key` (`ImageEncoder.encode`), the visual head the one of 3.
    if config.input_noise and key is not None:
        noise = jax.random.normal(jax.random.fold_in(key, 4), inputs.shape)
        read = read + config.input_noise * jnp.where(predicted, noise, 0.0)

    def llama(read: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        own = None if key is None else jax.random.fold_in(key, 2)
        return model.llama(read.astype(config.dtype), positions, batch.segments, unroll=config.unroll, key=own)

    if config.scheduled_sampling and key is not None:
        keys = jax.random.split(jax.random.fold_in(key, 5))
        own = jax.lax.stop_gradient(_sample_all(model, llama(read), keys[0]))  # [B, S, D]; of the next position each
        chosen = jax.random.bernoulli(keys[1], config.scheduled_sampling, predicted.shape)  # [B, S, 1]
        read = jnp.where(predicted & chosen, jnp.roll(own, 1, axis=1), read)
    return model, named | {"inputs": inputs, "hidden_states": llama(read)}, metrics, statistics


def _next(x: Array) -> Array:
    """[B, S, …] -> the values one position later, 0 at the last. Whole rows keep the products' shapes even."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)) + ((0, 0),) * (x.ndim - 2))


Further = Callable[[EmuModel, Float[Array, "B S D"]], tuple[Float[Array, ""], dict[str, Array]]]


def loss_weights(batch: Batch, num_sources: int = 0) -> tuple[Array, ...]:
    """Divisors of the summed losses: total text weight [], total visual weight [], and each by source [num_sources]."""
    weights = (batch.text_weights, batch.visual_weights)
    by_source = (sum_by_source(w, batch.source_ids, num_sources) if num_sources else jnp.zeros(0) for w in weights)
    return *(w.sum() for w in weights), *by_source


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
    judge_predictions: bool = False,
    further: Further | None = None,
) -> tuple[Float[Array, ""], tuple[dict[str, Array], Statistics]]:
    """The training objective, from pixels to a number: paper §2.2, eq. 1 with the reference's masks.

    loss = text_loss_weight * mean over labelled tokens of -log p(token | everything before it)
         + regression_loss_weight * mean over visual targets of |visual_head(hidden) - input embedding|^2 / D

    Another visual head (`EmuConfig.visual_head`) has its own loss in the second line. Both means use the batch's
    position weights (`EmuConfig.loss_mean`). Targets are the inputs after standardisation, under stop_gradient: one
    pair for each <image> and one for [/IMG], i.e. Q + 1 = 33 an image in the published model. Without images the
    regression loss is exactly 0.

    Args:
      params, statistics: Trees as `init` and `initial_statistics` return them.
      key: Randomness of dropout, drop-path, noise on inputs and the visual head. None turns the first three off, and
        the head draws the same numbers every time.
      train: Standardise with this batch's statistics and update the running ones; otherwise with the running ones.
      normalisers: `loss_weights` of the whole batch, when this is a micro-batch of it.
      sources: The batch's sources, whose losses are reported separately; empty where it has one.
      further: Another loss of the module and its hidden states, and its metrics; it is added to the loss.
      judge_predictions: Also report how the visual head's samples vary (`statistics.prediction_metrics`).

    Returns:
      (loss, (metrics, statistics)); metrics are float32 scalars: loss, text_loss, regression_loss, variance_fraction,
      effective_rank, and the two losses of each source (NaN where the batch has none of its targets).
    """
    model, named, metrics, statistics = _forward(params, statistics, batch, config, ids, key, train)
    hidden = named["hidden_states"]  # [B, S, D]; each position predicts the next, the last one nothing
    if normalisers is None:
        normalisers = loss_weights(batch, len(sources))
    text_total, visual_total, text_totals, visual_totals = normalisers
    text_mean = Mean(batch.text_weights, text_total, text_totals)
    visual_mean = Mean(batch.visual_weights, visual_total, visual_totals)
    if config.loss_mean == "sources" and len(sources) > 1:
        assert batch.source_ids is not None
        text_mean = over_sources(text_mean, batch.source_ids, [source.text for source in sources])
        visual_mean = over_sources(visual_mean, batch.source_ids, [source.visual for source in sources])

    head, labels = model.llama.lm_head.kernel[...], _next(batch.tokens)
    text, text_terms = cross_entropy(hidden, head, labels, _next(text_mean.weights), config.loss_chunk)
    text = text / jnp.maximum(text_mean.total, 1e-6)
    visual, visual_terms = jnp.zeros((), jnp.float32), jnp.zeros_like(text_terms)
    if config.regression_loss_weight:
        targets = jax.lax.stop_gradient(_next(named["inputs"])).astype(jnp.float32)  # [B, S, D]
        head_key = jax.random.key(0) if key is None else jax.random.fold_in(key, 3)
        visual, visual_terms = config.visual_head.loss(
            model.llama.visual_head, hidden, targets, _next(visual_mean.weights), head_key
        )
        visual = visual / jnp.maximum(visual_mean.total, 1e-6)
        if judge_predictions:
            metrics |= _judge_predictions(model, hidden, targets, _next(batch.visual_weights) > 0)
    total = config.text_loss_weight * text + config.regression_loss_weight * visual

    if further is not None:
        added, own = further(model, hidden)
        total, metrics = total + added, metrics | own

    losses = {"loss": total, "text_loss": text, "regression_loss": visual}
    for kind, terms, mean in (("text", text_terms, text_mean), ("regression", visual_terms, visual_mean)):
        if sources:
            # The terms are at predicting positions, in the same document as their targets: no sum mixes two sources.
            sums = sum_by_source(jax.lax.stop_gradient(terms), batch.source_ids, len(sources)) / mean.source_totals
            losses |= {f"{kind}_loss/{source.name}": sums[i] for i, source in enumerate(sources)}
    return total, (losses | metrics, statistics)


def predicted_images(
    model: EmuModel, hidden: Float[Array, "B S D"], batch: Batch, ids: SpecialIds
) -> tuple[Float[Array, "B I Q D"], Bool[Array, "B I"]]:
    """The visual head's samples for every slot whose image is predicted, and which slots these are.

    Of several documents that predict the image of one slot, one counts.
    """
    rows, slots = batch.images.shape[:2]
    queries = model.config.causal.queries
    samples = jnp.roll(_sample_all(model, hidden), 1, axis=1)  # [B, S, D]; at the position that each is for
    predicted = (batch.slots >= 0) & (batch.visual_weights > 0)  # [B, S]
    place = jnp.where(predicted, batch.slots * queries + _numbers(batch, ids), slots * queries)  # the last is no place
    empty = jnp.zeros((rows, slots * queries + 1, samples.shape[-1]), samples.dtype)
    found = empty.at[jnp.arange(rows)[:, None], place].set(samples)[:, :-1]  # [B, I*Q, D]
    here = (jnp.where(predicted, batch.slots, -1)[..., None] == jnp.arange(slots)).any(1)  # [B, I]
    return found.reshape(rows, slots, queries, -1), here


def _judge_predictions(
    model: EmuModel, hidden: Float[Array, "B S D"], targets: Float[Array, "B S D"], used: Bool[Array, "B S"]
) -> dict[str, Float[Array, ""]]:
    """`statistics.prediction_metrics` of the first `JUDGED` predicted positions."""
    first = jnp.argsort(~used.reshape(-1), stable=True)[:JUDGED]
    chosen = [x.reshape(-1, *x.shape[2:])[first] for x in (hidden, targets, used)]
    return running.prediction_metrics(_sample_all(model, chosen[0][None])[0], *chosen[1:])


def _sample_all(model: EmuModel, hidden: Float[Array, "B S D"], key: Array | None = None) -> Float[Array, "B S D"]:
    """The visual head's sample at every position."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    keys = jax.random.split(jax.random.key(0) if key is None else key, len(flat))
    return model.config.visual_head.sample(model.llama.visual_head, flat, keys).reshape(hidden.shape)


def intermediates(
    params: Params,
    statistics: Statistics,
    batch: Batch,
    *,
    config: EmuConfig,
    ids: SpecialIds,
) -> dict[str, Array]:
    """Every named array between pixels and losses, without dropout; for analysis, notebooks and tests.

    Returns (slots in row order):
      vision_features, ln_visual [B*I, P+1, Dv]; causal_embeds [B*I, Q, D], before standardising; embeddings
      [B*I, Q, D], which the language model reads; inputs, hidden_states [B, S, D]; logits [B, S, V] float32;
      regress_pred, regress_target [B, S-1, D] (position t predicts input t+1); text_mask, visual_mask bool
      [B, S-1]; text_loss, regression_loss [].
    """
    model, named, _, _ = _forward(params, statistics, batch, config, ids, None, train=False)
    hidden = named["hidden_states"]
    _, (metrics, _) = loss(params, statistics, batch, config=config, ids=ids, train=False)
    return named | {
        "logits": model.llama.lm_head(hidden).astype(jnp.float32),
        "regress_pred": _sample_all(model, hidden[:, :-1]).astype(jnp.float32),
        "regress_target": named["inputs"][:, 1:],
        "text_mask": batch.text_weights[:, 1:] > 0,
        "visual_mask": batch.visual_weights[:, 1:] > 0,
        "text_loss": metrics["text_loss"],
        "regression_loss": metrics["regression_loss"],
    }
