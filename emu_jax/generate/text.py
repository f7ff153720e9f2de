"""Decoding text from embedded prompts: greedy, by sampling or by beam search; one compiled program per shape.

In: embedded prompts [B, T, D], left-padded. Out: token ids [B, N] and scores [B]. Numbers such as the temperature or
the length penalty are traced: changing them compiles nothing.

A text ends at the first of the `ends`. The first end is </s>, which also pads finished rows. A model that has learnt to
begin images (`EmuConfig.learn_image_token`) has [IMG] as a second end.

Lengths count a placeholder <s> before the first new token, as the reference's decoding from embeddings does: both in
`min_length` and in score = sum of log p / length ** length_penalty.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from emu_jax.errors import UserError
from emu_jax.models import emu
from emu_jax.models.llama import KVCache, Llama

DEAD_BEAM_SCORE = -1e9  # log p of a beam that does not exist yet

Ends = tuple[int, ...]  # token ids that end a text, </s> first
EndedBy = Literal["eos", "image", "length"]


@dataclasses.dataclass(frozen=True)
class GeneratedText:
    """A continuation.

    Attributes:
      token_ids: new tokens, without <s> and without the token that ended the text.
      score: sum of log p / length ** length_penalty.
      ended_by: "eos" at </s>, "image" where the model began an image, "length" at `max_new_tokens`, "closed" where the
        consumer closed a chat's stream.
    """

    text: str
    token_ids: list[int]
    score: float
    ended_by: EndedBy | Literal["closed"]


def check_decoding(num_beams: int, max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raises UserError for settings that cannot work."""
    if num_beams < 1 or max_new_tokens < 1:
        raise UserError(f"num_beams={num_beams}, max_new_tokens={max_new_tokens}; expected at least 1 of each")
    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"temperature={temperature}, top_p={top_p}; expected temperature >= 0 and 0 < top_p <= 1")
    if num_beams > 1 and temperature > 0:
        raise UserError(f"num_beams={num_beams} and temperature={temperature}; beams do not sample, choose one of them")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """How tokens are chosen; scalars, or arrays [B] with one value per row; traced.

    Attributes:
      min_length: a text shorter than this cannot end.
      length_penalty: exponent; above 0 favours long texts, below 0 short ones.
      temperature: 0 takes the likeliest token (beam search ignores temperature, top_k and top_p).
      top_k: number of likeliest tokens to sample from; 0 for all.
      top_p: total probability of the likeliest tokens to sample from.
    """

    min_length: int | Array = 1
    length_penalty: float | Array = 1.0
    temperature: float | Array = 0.0
    top_k: int | Array = 0
    top_p: float | Array = 1.0


def is_end(token: Int[Array, " ..."], ends: Ends) -> Bool[Array, " ..."]:
    """Whether each token ends a text."""
    return functools.reduce(operator.or_, (token == end for end in ends))


def truncate_at_end(ids: Sequence[int], ends: Ends) -> tuple[list[int], EndedBy]:
    """The tokens of one row before its end, and how it ended.

    >>> truncate_at_end([7, 8, 2, 2], (2, 5)), truncate_at_end([7, 5, 2, 2], (2, 5))
    (([7, 8], 'eos'), ([7], 'image'))
    >>> truncate_at_end([7, 8, 8, 8], (2, 5))
    ([7, 8, 8, 8], 'length')
    """
    end = next((index for index, id in enumerate(ids) if id in ends), None)
    if end is None:
        return list(ids), "length"
    return list(ids[:end]), "eos" if ids[end] == ends[0] else "image"


def prefill(
    llama: Llama, inputs: Float[Array, "B T D"], valid: Bool[Array, "B T"], new_slots: int, config: emu.EmuConfig
) -> tuple[Float[Array, "B D"], KVCache, Int[Array, " B"]]:
    """Prefills a cache with left-padded prompts.

    Returns:
      The last hidden state, a cache with `new_slots` free slots, and the next RoPE position.
    """
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    cache = llama.init_cache(inputs.shape[0], inputs.shape[1] + new_slots, config.dtype)
    hidden, cache = llama.decode(inputs.astype(config.dtype), positions, cache, valid)
    return hidden[:, -1], cache, positions[:, -1] + 1


def _log_probabilities(
    llama: Llama, hidden: Float[Array, "*rows D"], length: Int[Array, " ..."], decoding: Decoding, ends: Ends
) -> Float[Array, "*rows V"]:
    """Log p of the next token in float32; -inf for ends while the text is shorter than `min_length`."""
    scores = jax.nn.log_softmax(llama.logits(hidden).astype(jnp.float32), axis=-1)
    forbidden = is_end(jnp.arange(scores.shape[-1]), ends) & jnp.expand_dims(length < decoding.min_length, -1)
    return jnp.where(forbidden, -jnp.inf, scores)


def _filtered(scores: Float[Array, "B V"], decoding: Decoding) -> Float[Array, "B V"]:
    """Log p -> logits to sample from: temperature, then top-k, then top-p (the likeliest token always stays)."""
    temperature, top_k, top_p = (  # [B, 1] each
        jnp.broadcast_to(value, len(scores))[:, None]
        for value in (decoding.temperature, decoding.top_k, decoding.top_p)
    )
    scores = scores / jnp.maximum(temperature, 1e-6)
    ordered = -jnp.sort(-scores, axis=-1)
    vocabulary = scores.shape[-1]
    k = jnp.where(top_k > 0, jnp.minimum(top_k, vocabulary), vocabulary)
    kth = jnp.take_along_axis(ordered, k - 1, axis=-1)
    probabilities = jax.nn.softmax(jnp.where(ordered >= kth, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < top_p).sum(-1, keepdims=True)
    threshold = jnp.maximum(kth, jnp.take_along_axis(ordered, kept - 1, axis=-1))
    return jnp.where(scores >= threshold, scores, -jnp.inf)


def choose(
    llama: Llama,
    hidden: Float[Array, "B D"],
    count: Int[Array, ""],
    key: Key[Array, ""],
    decoding: Decoding,
    ends: Ends,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The next token after `count` new ones, and its log p."""
    scores = _log_probabilities(llama, hidden, count + 1, decoding, ends)  # [B, V]
    token = jax.lax.cond(
        decoding.temperature > 0,
        lambda: jax.random.categorical(jax.random.fold_in(key, count), _filtered(scores, decoding)),
        lambda: scores.argmax(-1),
    ).astype(jnp.int32)
    return token, jnp.take_along_axis(scores, token[:, None], axis=-1)[:, 0]


def choose_each(
    llama: Llama,
    hidden: Float[Array, "B D"],
    counts: Int[Array, " B"],
    keys: Key[Array, " B"],
    decoding: Decoding,
    ends: Ends,
) -> tuple[Int[Array, " B"], Float[Array, "B V"]]:
    """`choose` for independent rows, with log p of the whole vocabulary: the fields of `decoding` are [B].

    Each row's token is the one that `choose` returns for that row on its own.
    """
    scores = _log_probabilities(llama, hidden, counts + 1, decoding, ends)  # [B, V]

    def sampled() -> Array:
        draw = jax.vmap(lambda key, count, row: jax.random.categorical(jax.random.fold_in(key, count), row[None])[0])
        return jnp.where(decoding.temperature > 0, draw(keys, counts, _filtered(scores, decoding)), scores.argmax(-1))

    token = jax.lax.cond(jnp.any(decoding.temperature > 0), sampled, lambda: scores.argmax(-1)).astype(jnp.int32)
    return token, scores


@functools.partial(jax.jit, static_argnames=("config", "ends", "max_new_tokens"))
def generate(
    params: emu.Params,
    inputs: Float[Array, "B T D"],
    valid: Bool[Array, "B T"],
    key: Key[Array, ""],
    decoding: Decoding,
    *,
    config: emu.EmuConfig,
    ends: Ends,
    max_new_tokens: int,
) -> tuple[Int[Array, "B N"], Float[Array, " B"]]:
    """Greedy decoding or sampling.

    Args:
      inputs: embedded prompts, left-padded. valid: False at padding.

    Returns:
      N = max_new_tokens ids per row, which include the token that ended the text and are </s> after it; and the scores.
    """
    llama = emu.bind(config, params).llama
    hidden, cache, position = prefill(llama, inputs, valid, max_new_tokens, config)
    rows = inputs.shape[0]

    def unfinished(carry: tuple) -> Array:
        count, *_, done = carry
        return (count < max_new_tokens) & ~done.all()

    def step(carry: tuple) -> tuple:
        count, hidden, cache, tokens, total, length, done = carry
        token, score = choose(llama, hidden, count, key, decoding, ends)
        token = jnp.where(done, ends[0], token)
        total += jnp.where(done, 0.0, score)
        done |= is_end(token, ends)
        length += ~done
        tokens = tokens.at[:, count].set(token)
        hidden, cache = llama.decode(_embed(llama, token[:, None], config), (position + count)[:, None], cache)
        return count + 1, hidden[:, 0], cache, tokens, total, length, done

    start = (
        jnp.zeros((), jnp.int32),
        hidden,
        cache,
        jnp.full((rows, max_new_tokens), ends[0], jnp.int32),
        jnp.zeros(rows),
        jnp.ones(rows, jnp.int32),
        jnp.zeros(rows, bool),
    )
    _, _, _, tokens, total, length, _ = jax.lax.while_loop(unfinished, step, start)
    return tokens, total / length.astype(jnp.float32) ** decoding.length_penalty


def _embed(llama: Llama, tokens: Int[Array, "B T"], config: emu.EmuConfig) -> Float[Array, "B T D"]:
    return llama.embed(tokens).astype(config.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Beams:
    """State of a beam search over B prompts with K beams and N new tokens."""

    count: Int[Array, ""]  # tokens generated so far
    hidden: Float[Array, "B K D"]
    cache: KVCache  # T prompt slots, then K slots per step
    origin: Int[Array, "B K N"]  # which of a step's K slots belongs to this beam's history
    tokens: Int[Array, "B K N"]
    scores: Float[Array, "B K"]  # summed log p
    finished_tokens: Int[Array, "B K N"]  # </s> after the end
    finished_scores: Float[Array, "B K"]  # with the length penalty; -inf where there is no finished beam yet
    done: Bool[Array, " B"]


@functools.partial(jax.jit, static_argnames=("config", "ends", "max_new_tokens", "beams"))
def beam_search(
    params: emu.Params,
    inputs: Float[Array, "B T D"],
    valid: Bool[Array, "B T"],
    decoding: Decoding,
    *,
    config: emu.EmuConfig,
    ends: Ends,
    max_new_tokens: int,
    beams: int,
) -> tuple[Int[Array, "B N"], Float[Array, " B"]]:
    """Beam search as in Hugging Face's `generate` with early_stopping off, which the reference used.

    The cache holds the prompt's keys and values once, however many beams there are, and is never copied: each step
    appends one slot per beam, and a beam attends to the slots of its own history (`origin`).

    Args and returns: as `generate`.
    """
    llama = emu.bind(config, params).llama
    rows, prompt, _ = inputs.shape
    hidden, cache, position = prefill(llama, inputs, valid, max_new_tokens * beams, config)
    padded = jnp.pad(valid, ((0, 0), (0, max_new_tokens * beams)))  # [B, C]
    slot_step = (jnp.arange(padded.shape[1]) - prompt) // beams  # step that filled each slot; negative in the prompt
    slot_beam = (jnp.arange(padded.shape[1]) - prompt) % beams

    candidates = (1 + len(ends)) * beams  # per step: even if every beam ends in every way, K unfinished ones are left

    def penalised(scores: Float[Array, " ..."], length: Int[Array, ""]) -> Float[Array, " ..."]:
        return scores / length.astype(jnp.float32) ** decoding.length_penalty

    def step(s: _Beams) -> _Beams:
        length = s.count + 1  # with the placeholder <s>
        step_scores = _log_probabilities(llama, s.hidden, length, decoding, ends) + s.scores[..., None]  # [B, K, V]
        vocabulary = step_scores.shape[-1]
        # The barrier keeps XLA from pulling later slices into top_k, which would make it a full sort on CPUs.
        best, flat = jax.lax.optimization_barrier(jax.lax.top_k(step_scores.reshape(rows, -1), candidates))  # [B, M]
        parent, token = flat // vocabulary, flat % vocabulary
        is_over = is_end(token, ends)
        histories = jnp.take_along_axis(s.tokens, parent[..., None], axis=1)  # [B, M, N]
        if len(ends) > 1:  # which end it was; </s> is the default
            histories = histories.at[:, :, s.count].set(token)

        # Hypotheses that end here count if they are among the K best; the K best finished ones are kept.
        ended = jnp.where(is_over & (jnp.arange(candidates) < beams), penalised(best, length), -jnp.inf)
        pool = jnp.concatenate([s.finished_scores, jnp.where(s.done[:, None], -jnp.inf, ended)], axis=1)
        finished_scores, kept = jax.lax.top_k(pool, beams)
        finished_tokens = jnp.take_along_axis(
            jnp.concatenate([s.finished_tokens, histories], axis=1), kept[..., None], axis=1
        )
        # A prompt is done when no running beam, at its present length, could beat its worst finished one.
        done = s.done | (finished_scores.min(1) >= penalised(best[:, 0], length))

        # The K best unfinished hypotheses are extended.
        order = jnp.argsort(is_over, axis=1, stable=True)[:, :beams]  # [B, K]
        scores = jnp.take_along_axis(best, order, axis=1)
        parent = jnp.take_along_axis(parent, order, axis=1)
        token = jnp.take_along_axis(token, order, axis=1)
        tokens = jnp.take_along_axis(s.tokens, parent[..., None], axis=1).at[:, :, s.count].set(token)
        origin = jnp.take_along_axis(s.origin, parent[..., None], axis=1).at[:, :, s.count].set(jnp.arange(beams))

        history = jnp.take(origin, jnp.maximum(slot_step, 0), axis=2)  # [B, K, C]
        own = (slot_step >= 0) & (slot_step <= s.count) & (history == slot_beam)
        mask = own | padded[:, None, :]  # [B, K, C]
        positions = jnp.broadcast_to((position + s.count)[:, None], (rows, beams))
        hidden, cache = llama.decode(_embed(llama, token, config), positions, s.cache, mask=mask)
        return _Beams(s.count + 1, hidden, cache, origin, tokens, scores, finished_tokens, finished_scores, done)

    blank = jnp.full((rows, beams, max_new_tokens), ends[0], jnp.int32)
    first = jnp.where(jnp.arange(beams) == 0, 0.0, DEAD_BEAM_SCORE)  # all beams start equal: only one may be extended
    state = _Beams(
        count=jnp.zeros((), jnp.int32),
        hidden=jnp.broadcast_to(hidden[:, None], (rows, beams, hidden.shape[-1])),
        cache=cache,
        origin=jnp.zeros((rows, beams, max_new_tokens), jnp.int32),
        tokens=blank,
        scores=jnp.broadcast_to(first, (rows, beams)),
        finished_tokens=blank,
        finished_scores=jnp.full((rows, beams), -jnp.inf),
        done=jnp.zeros(rows, bool),
    )
    end = jax.lax.while_loop(lambda s: (s.count < max_new_tokens) & ~s.done.all(), step, state)
    # Beams that were still running when the tokens ran out compete with the finished ones.
    running = jnp.where(end.done[:, None], -jnp.inf, penalised(end.scores, end.count + 1))
    scores = jnp.concatenate([end.finished_scores, running], axis=1)
    tokens = jnp.concatenate([end.finished_tokens, end.tokens], axis=1)
    winner = scores.argmax(1)
    return tokens[jnp.arange(rows), winner], scores[jnp.arange(rows), winner]


@functools.partial(jax.jit, static_argnames="config")
def score_candidates(
    params: emu.Params,
    inputs: Float[Array, "B T D"],
    valid: Bool[Array, "B T"],
    candidates: Int[Array, "B M N"],
    *,
    config: emu.EmuConfig,
) -> tuple[Float[Array, "B M"], Bool[Array, "B M"]]:
    """Summed negative log-likelihood of each candidate after its prompt, in float32; and whether it is the greedy text.

    Each prompt is prefilled once; every candidate attends to its prompt and to itself.

    Args:
      inputs: embedded prompts, left-padded. valid: False at padding.
      candidates: token ids, -1 at padding.
    """
    llama = emu.bind(config, params).llama
    rows, count, length = candidates.shape
    hidden, cache, position = prefill(llama, inputs, valid, count * length, config)
    prompt = inputs.shape[1]
    tokens = jnp.maximum(candidates, 0).reshape(rows, -1)  # [B, M*N]
    number = jnp.repeat(jnp.arange(count), length)  # [M*N]
    offset = jnp.tile(jnp.arange(length), count)
    own = (number[:, None] == number[None, :]) & (offset[:, None] >= offset[None, :])  # [M*N, M*N]
    own = jnp.broadcast_to(own, (rows, *own.shape))
    sees_prompt = jnp.broadcast_to(valid[:, None, :], (rows, count * length, prompt))
    mask = jnp.concatenate([sees_prompt, own], axis=2)  # [B, M*N, C]
    states, _ = llama.decode(_embed(llama, tokens, config), position[:, None] + offset[None], cache, mask=mask)
    states = states.reshape(rows, count, length, -1)
    first = jnp.broadcast_to(hidden[:, None, None], (rows, count, 1, hidden.shape[-1]))
    before = jnp.concatenate([first, states[:, :, :-1]], axis=2)  # [B, M, N, D], the state that predicts each token

    def label_log_p(
        before: Float[Array, "M N D"], labels: Int[Array, "M N"]
    ) -> tuple[Float[Array, "M N"], Bool[Array, "M N"]]:
        """One row's log p of the labels, and which of them are likeliest: only one row's float32 logits exist at a
        time."""
        scores = jax.nn.log_softmax(llama.logits(before).astype(jnp.float32), axis=-1)
        log_p = jnp.take_along_axis(scores, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return log_p, scores.argmax(-1) == labels

    log_p, likeliest = jax.lax.map(lambda row: label_log_p(*row), (before, candidates))  # [B, M, N]
    is_token = candidates >= 0
    return -jnp.where(is_token, log_p, 0.0).sum(2), (likeliest | ~is_token).all(2)
