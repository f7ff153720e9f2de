"""Continuous batching: each text is the one generated on its own, and nothing is compiled after the warm-up."""

import numpy as np
import pytest

from emu_jax.generate import embeddings
from emu_jax.generate.text import Decoding
from emu_jax.serve import continuous_batching, image_batching, prompt_batching
from emu_jax.serve.continuous_batching import ContinuousBatcher, TextRequest
from emu_jax.serve.encoded_prompt import encode_continuation
from emu_jax.serve.image_batching import ImageBatcher, ImageRequest

IMAGES = np.random.default_rng(1).integers(0, 256, (8, 16, 16, 3), np.uint8)
PROMPTS = [["a red bar"], [IMAGES[0]], [IMAGES[1], "a", IMAGES[2]], ["blue"], [*IMAGES[:6]], [IMAGES[7], "a"]]


@pytest.fixture(scope="module")
def plain(model):
    return model.without_adapters()


@pytest.fixture(scope="module")
def texts(plain):
    texts = ContinuousBatcher(plain, 3)
    list(texts.warm_up())
    return texts


def run(texts: ContinuousBatcher, requests: list[TextRequest]) -> list[list[int]]:
    """Generates all texts; each request joins when a slot is free."""
    ids: list[list[int]] = [[] for _ in requests]
    waiting, running = list(enumerate(requests)), {}
    while waiting or running:
        free = [slot for slot in texts.free if slot not in running]
        joining = [waiting.pop(0) for _ in free[: len(waiting)]]
        if joining:
            first = texts.prefill(free[: len(joining)], [request for _, request in joining])
            for slot, (number, _), token in zip(free, joining, first, strict=False):
                ids[number].append(token)
                running[slot] = number
        if len(texts.free) < texts.slots:
            tokens = texts.decode()
            for slot, number in running.items():
                ids[number] += [token for token in tokens[:, slot].tolist() if token >= 0]
        running = {slot: number for slot, number in running.items() if slot not in texts.free}
    return ids


@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.slow
def test_every_text_is_the_one_generated_on_its_own(plain, texts, temperature):
    settings = [
        {"temperature": temperature, "top_k": k, "top_p": p, "min_length": m, "seed": seed, "max_new_tokens": n}
        for seed, (k, p, m, n) in enumerate([(0, 1.0, 1, 9), (5, 0.9, 4, 1), (0, 0.5, 1, 20), (3, 1.0, 7, 8)] * 2)
    ][: len(PROMPTS)]
    requests = [
        TextRequest(
            encode_continuation(plain, prompt),
            Decoding(s["min_length"], 1.0, s["temperature"], s["top_k"], s["top_p"]),
            s["max_new_tokens"],
            s["seed"],
        )
        for prompt, s in zip(PROMPTS, settings, strict=True)
    ]
    programs = continuous_batching._prefill, continuous_batching._decode
    before = [program._cache_size() for program in programs]
    found = run(texts, requests)
    assert [program._cache_size() for program in programs] == before, "something was compiled"
    for ids, prompt, s in zip(found, PROMPTS, settings, strict=True):
        (alone,) = plain.generate_text([prompt], **s)
        ends = len(alone.token_ids) < s["max_new_tokens"]
        assert ids == alone.token_ids + [plain.tokenizer.eos_id] * ends


@pytest.mark.long
def test_to_the_last_position_of_the_context(plain, texts):
    prompt = encode_continuation(plain, ["a"])
    limit = prompt.max_new_tokens(plain.config.llama.context, plain.config.llama.context - len(prompt.tokens))
    forbids = Decoding(min_length=1000)
    (found,) = run(texts, [TextRequest(prompt, forbids, limit, 0)])
    (alone,) = plain.generate_text([["a"]], max_new_tokens=limit, min_length=1000)
    assert found == alone.token_ids
    assert len(found) == limit


def test_a_released_slot_is_free_and_its_neighbour_continues(plain, texts):
    prompt = encode_continuation(plain, ["a red bar"])
    request = TextRequest(prompt, Decoding(min_length=1000), 30, 0)
    first, *_ = texts.prefill([0, 1], [request, request])
    texts.release(0)
    assert 0 in texts.free
    ids = [first]
    while len(texts.free) < texts.slots:
        tokens = texts.decode()
        assert (tokens[:, 0] == -1).all(), "a free slot has no new tokens"
        ids += [token for token in tokens[:, 1].tolist() if token >= 0]
    assert ids == plain.generate_text([["a red bar"]], max_new_tokens=30, min_length=1000)[0].token_ids


@pytest.mark.slow
def test_every_image_is_the_one_drawn_on_its_own(plain):
    images = ImageBatcher(plain, 2)
    list(images.warm_up())
    asked = [("pndm", 3, 2.0), ("ddim", 2, 7.5), ("euler", 5, 1.0), ("dpmpp", 4, -1.0), ("pndm", 1, 3.0)]
    requests = [
        ImageRequest(encode_continuation(plain, prompt, draws=True), *settings, seed)
        for seed, (prompt, settings) in enumerate(zip(PROMPTS[:5], asked, strict=True))
    ]
    programs = image_batching._advance, embeddings.generate_embeddings
    before = [program._cache_size() for program in programs]
    waiting, found = list(requests), {}
    running: dict[int, ImageRequest] = {}
    while waiting or running:
        if images.free and waiting:  # one at a time, so that neighbours are at different rows
            slot = images.free[0]
            running[slot] = waiting.pop(0)
            images.begin([slot], [running[slot]])
        for slot, (made, calls) in images.step().items():
            if made == calls:
                found[running.pop(slot).seed] = images.finish(slot)
    assert [program._cache_size() for program in programs] == before, "something was compiled"
    for seed, (prompt, (sampler, steps, guidance)) in enumerate(zip(PROMPTS[:5], asked, strict=True)):
        alone = plain.generate_image(prompt, sampler=sampler, steps=steps, guidance=guidance, seed=seed)
        np.testing.assert_allclose(found[seed].embeddings, alone.embeddings, atol=1e-5)
        np.testing.assert_allclose(np.asarray(found[seed].image, int), np.asarray(alone.image, int), atol=1)


def test_lengths():
    assert prompt_batching.length_buckets(256) == [32, 64, 128, 256]
    assert prompt_batching.length_buckets(100) == [32, 64, 100]
    assert prompt_batching.length_buckets(20) == [20]
