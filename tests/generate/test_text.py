"""Decoding: beams against exhaustive search, padding, lengths, and what sampling may choose."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import models
from emu_jax.generate import embeddings as image
from emu_jax.generate import text
from emu_jax.models import emu

EOS, IMG = 2, 4  # IMG: where a text ends as well, of a model that has learnt to begin images
VOCABULARY = 6


def make_config() -> emu.EmuConfig:
    fields = models.debug()
    fields.llama.vocab_size = VOCABULARY
    return emu.EmuConfig.from_dict(fields)


CONFIG = make_config()
# Larger than at the start of training: otherwise every token is as likely as any other.
PARAMS = jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 1 else leaf, emu.init(CONFIG, jax.random.key(3)))
LLAMA = emu.bind(CONFIG, PARAMS).llama


def prompt(*tokens: int, length: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Token ids -> inputs [1, T, D] and validity [1, T], left-padded to `length`."""
    padding = (length or len(tokens)) - len(tokens)
    ids = jnp.asarray([[0] * padding + list(tokens)])
    return LLAMA.embed(ids), jnp.asarray([[False] * padding + [True] * len(tokens)])


@jax.jit
def whole_sequence(ids: jax.Array) -> jax.Array:
    """Token ids [1, S] -> log p of what follows each [S, V]."""
    hidden = LLAMA(LLAMA.embed(ids), jnp.arange(ids.shape[1])[None], jnp.ones_like(ids))
    return jax.nn.log_softmax(LLAMA.lm_head(hidden), axis=-1)[0]


def log_probability(start: tuple[int, ...], continuation: tuple[int, ...]) -> float:
    """Without any cache: the whole sequence through the training forward pass."""
    ids = np.zeros((1, 12), np.int32)  # what stands behind is not attended to
    ids[0, : len(start) + len(continuation)] = [*start, *continuation]
    scores = whole_sequence(ids)
    first = len(start) - 1
    return float(sum(scores[first + n, token] for n, token in enumerate(continuation)))


def greedy(inputs, valid, count=6, ends=(EOS,), **decoding):
    options = text.Decoding(**decoding)
    static = {"config": CONFIG, "ends": ends, "max_new_tokens": count}
    return text.generate(PARAMS, inputs, valid, jax.random.key(0), options, **static)


def test_greedy_takes_the_likeliest_token_every_time():
    tokens, _ = greedy(*prompt(1, 3, 4))
    sequence: tuple[int, ...] = ()
    for token in np.asarray(tokens)[0]:
        best = max(range(VOCABULARY), key=lambda t: log_probability((1, 3, 4), (*sequence, t)))
        assert token == best, f"after {sequence}"
        if best == EOS:
            break
        sequence = (*sequence, best)


def test_an_image_ends_a_text_too():
    """The same tokens up to the first [IMG], which is among them, and </s> behind it; the cut says what it was."""
    kinds = []
    for start in itertools.product([1, 3, 5], repeat=2):
        expected = np.asarray(greedy(*prompt(*start))[0])[0].tolist()
        if IMG in expected:
            expected = [*expected[: expected.index(IMG) + 1], *[EOS] * 6][:6]
        row = np.asarray(greedy(*prompt(*start), ends=(EOS, IMG))[0])[0].tolist()
        assert row == expected, f"after {start}"
        kinds.append(text.truncate_at_end(row, (EOS, IMG))[1])
    assert set(kinds) == {"eos", "image"}, kinds


@pytest.mark.parametrize("ends", [(EOS,), (EOS, IMG)])
def test_wide_beams_find_the_best_of_all_texts(ends):
    """Beams as wide as everything that can be reached compare every text of up to three tokens."""
    count = 3
    texts = [
        (*body, *end)
        for length in range(count + 1)
        for body in itertools.product([t for t in range(VOCABULARY) if t not in ends], repeat=length)
        for end in ([(end,) for end in ends] if length < count else [()])
    ]
    scores = {t: log_probability((1, 5), t) for t in texts if t[0] not in ends}
    best = max(scores, key=scores.get)
    inputs, valid = prompt(1, 5)
    tokens, score = text.beam_search(
        PARAMS,
        inputs,
        valid,
        text.Decoding(min_length=2, length_penalty=0.0),
        config=CONFIG,
        ends=ends,
        max_new_tokens=count,
        beams=VOCABULARY**2,
    )
    got = tuple(int(t) for t in np.asarray(tokens)[0])
    assert got == (*best, *(EOS,) * (count - len(best))), f"expected {best} at {scores[best]:.4f}"
    np.testing.assert_allclose(score[0], scores[best], rtol=1e-4)


def test_nothing_is_written_behind_an_end():
    """Even where most candidates of a step end a text: beams that go on are beams that have not ended."""
    head = PARAMS["llama"]["lm_head"]["kernel"]
    head = head.at[:, jnp.array([EOS, IMG])].set(4 * head[:, EOS, None])  # both likely, or neither
    params = PARAMS | {"llama": PARAMS["llama"] | {"lm_head": {"kernel": head}}}
    rows = []
    for start in itertools.product([1, 3, 5], repeat=2):
        tokens, _ = text.beam_search(
            params,
            *prompt(*start),
            text.Decoding(length_penalty=2.0),  # which favours going on
            config=CONFIG,
            ends=(EOS, IMG),
            max_new_tokens=6,
            beams=3,
        )
        row = np.asarray(tokens)[0].tolist()
        behind = row[len(text.truncate_at_end(row, (EOS, IMG))[0]) + 1 :]
        assert set(behind) <= {EOS}, f"after {start}: {row}"
        rows.append(row)
    assert len({tuple(row) for row in rows}) > 1, rows


@pytest.mark.long
@pytest.mark.parametrize("beams", [1, 4])
def test_left_padding_and_neighbours_change_nothing(beams):
    def run(inputs, valid):
        options = text.Decoding(length_penalty=0.0)
        static = {"config": CONFIG, "ends": (EOS,), "max_new_tokens": 5}
        if beams > 1:
            return text.beam_search(PARAMS, inputs, valid, options, beams=beams, **static)
        return text.generate(PARAMS, inputs, valid, jax.random.key(0), options, **static)

    prompts = [(1, 3), (1, 4, 5, 3, 3), (1,)]
    alone = [run(*prompt(*p)) for p in prompts]
    padded = [prompt(*p, length=9) for p in prompts]
    tokens, scores = run(*(jnp.concatenate(parts) for parts in zip(*padded, strict=True)))
    for row, (one_tokens, one_scores) in enumerate(alone):
        np.testing.assert_array_equal(tokens[row], one_tokens[0], err_msg=f"prompt {row}")
        np.testing.assert_allclose(scores[row], one_scores[0], rtol=1e-4)


@pytest.mark.parametrize("ends", [(EOS,), (EOS, IMG)])
@pytest.mark.parametrize("minimum", [1, 3, 6])
def test_no_end_below_the_minimal_length(minimum, ends):
    for beams in (1, 3):
        inputs, valid = prompt(1, 4)
        options = text.Decoding(min_length=minimum, length_penalty=-5.0)
        static = {"config": CONFIG, "ends": ends, "max_new_tokens": 6}
        if beams > 1:
            tokens, _ = text.beam_search(PARAMS, inputs, valid, options, beams=beams, **static)
        else:
            tokens, _ = text.generate(PARAMS, inputs, valid, jax.random.key(0), options, **static)
        row = np.asarray(tokens)[0].tolist()
        length = len(text.truncate_at_end(row, ends)[0])
        assert length + 1 >= minimum, f"{beams} beams: {row}"  # the placeholder <s> counts


@settings(max_examples=40)
@given(
    scores=st.lists(st.integers(-800, 0).map(lambda n: n / 100), min_size=6, max_size=6, unique=True),
    top_k=st.integers(0, 8),
    top_p=st.floats(0.05, 1.0),
    temperature=st.floats(0.2, 3.0),
)
def test_sampling_keeps_exactly_the_likeliest_tokens(scores, top_k, top_p, temperature):
    scores = np.asarray(scores, np.float32)
    options = text.Decoding(temperature=temperature, top_k=top_k, top_p=top_p)
    kept = np.isfinite(np.asarray(text._filtered(jnp.asarray(scores)[None], options))[0])
    order = np.argsort(-scores)
    allowed = order[: top_k or None]
    weights = np.exp(scores[allowed].astype(np.float64) / temperature)
    before = np.cumsum(weights) / weights.sum() - weights / weights.sum()
    expected = set(allowed[before < top_p].tolist())
    got = set(np.flatnonzero(kept).tolist())
    near = np.abs(before - top_p).min() < 1e-5  # float32 may fall on either side
    assert got == expected or near, f"kept {got}, expected {expected}"
    assert order[0] in got


def test_sampling_follows_the_probabilities():
    inputs, valid = prompt(1, 3)
    many = jnp.repeat(inputs, 4000, 0), jnp.repeat(valid, 4000, 0)
    tokens, _ = greedy(*many, count=1, temperature=1.0)
    shares = np.bincount(np.asarray(tokens)[:, 0], minlength=VOCABULARY) / 4000
    # </s> is allowed at once: the minimal length of 1 is the placeholder's.
    expected = [np.exp(log_probability((1, 3), (t,))) for t in range(VOCABULARY)]
    np.testing.assert_allclose(shares, expected, atol=0.03)


def test_candidates_cost_what_the_whole_sequence_says_and_one_of_each_length_is_greedy():
    start, best = (1, 3, 5), []
    for _ in range(2):
        ids = np.zeros((1, 12), np.int32)
        ids[0, : 3 + len(best)] = [*start, *best]
        best.append(int(whole_sequence(ids)[2 + len(best)].argmax()))
    candidates = [ids for length in (1, 2) for ids in itertools.product(range(VOCABULARY), repeat=length)]
    padded = [[*candidate, -1, -1][:3] for candidate in candidates]
    sums, is_greedy = text.score_candidates(PARAMS, *prompt(*start, length=5), jnp.asarray([padded]), config=CONFIG)
    expected = [-log_probability(start, candidate) for candidate in candidates]
    np.testing.assert_allclose(sums[0], expected, rtol=1e-4)
    assert list(itertools.compress(candidates, is_greedy[0])) == [(best[0],), tuple(best)]


def test_embeddings_are_those_of_recomputing_the_whole_prefix():
    inputs, valid = prompt(1, 3, 5, length=8)
    got = image.generate_embeddings(PARAMS, inputs, valid, np.zeros(len(inputs), np.uint32), config=CONFIG)
    prefix = prompt(1, 3, 5)[0]
    for _ in range(CONFIG.causal.queries):
        length = prefix.shape[1]
        hidden = LLAMA(prefix, jnp.arange(length)[None], jnp.ones((1, length), jnp.int32))
        prefix = jnp.concatenate([prefix, LLAMA.visual_head(hidden[:, -1:])], axis=1)
    np.testing.assert_allclose(got[0], prefix[0, 3:], rtol=1e-4, atol=1e-5)
