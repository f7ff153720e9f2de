"""Texts side by side: each is the one that would be written alone, and nothing is compiled once they run."""

import numpy as np
import pytest

from emu_jax.generate.text import Decoding
from emu_jax.serve import canvas as canvases
from emu_jax.serve import sequences, slots
from emu_jax.serve.canvas import Canvas, Drawing
from emu_jax.serve.slots import Start, TextSlots

IMAGES = np.random.default_rng(1).integers(0, 256, (8, 16, 16, 3), np.uint8)
PROMPTS = [["a red bar"], [IMAGES[0]], [IMAGES[1], "a", IMAGES[2]], ["blue"], [*IMAGES[:6]], [IMAGES[7], "a"]]


@pytest.fixture(scope="module")
def plain(model):
    return model.without_adapters()


@pytest.fixture(scope="module")
def texts(plain):
    texts = TextSlots(plain, 3)
    texts.warm_up()
    return texts


def run(texts: TextSlots, starts: list[Start]) -> list[list[int]]:
    """All texts, as slots get free."""
    ids: list[list[int]] = [[] for _ in starts]
    waiting, running = list(enumerate(starts)), {}
    while waiting or running:
        free = [slot for slot in texts.free if slot not in running]
        some = [waiting.pop(0) for _ in free[: len(waiting)]]
        if some:
            first = texts.read(free[: len(some)], [start for _, start in some])
            for slot, (number, _), token in zip(free, some, first, strict=False):
                ids[number].append(token)
                running[slot] = number
        if texts.active:
            tokens = texts.write()
            for slot, number in running.items():
                ids[number] += [token for token in tokens[:, slot].tolist() if token >= 0]
        running = {slot: number for slot, number in running.items() if slot not in texts.free}
    return ids


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_every_text_is_the_one_written_alone(plain, texts, temperature):
    settings = [
        {"temperature": temperature, "top_k": k, "top_p": p, "min_length": m, "seed": seed, "max_new_tokens": n}
        for seed, (k, p, m, n) in enumerate([(0, 1.0, 1, 9), (5, 0.9, 4, 1), (0, 0.5, 1, 20), (3, 1.0, 7, 8)] * 2)
    ][: len(PROMPTS)]
    starts = [
        Start(
            sequences.continuation(plain, prompt),
            Decoding(s["min_length"], 1.0, s["temperature"], s["top_k"], s["top_p"]),
            s["max_new_tokens"],
            s["seed"],
        )
        for prompt, s in zip(PROMPTS, settings, strict=True)
    ]
    before = slots._read._cache_size(), slots._write._cache_size()
    found = run(texts, starts)
    assert (slots._read._cache_size(), slots._write._cache_size()) == before, "something was compiled"
    for ids, prompt, s in zip(found, PROMPTS, settings, strict=True):
        (alone,) = plain.generate_text([prompt], **s)
        ends = len(alone.token_ids) < s["max_new_tokens"]
        assert ids == alone.token_ids + [plain.tokenizer.eos_id] * ends


def test_to_the_last_position_of_the_context(plain, texts):
    sequence = sequences.continuation(plain, ["a"])
    limit = sequence.room(plain.config.llama.context, plain.config.llama.context - len(sequence.tokens))
    forbids = Decoding(min_length=1000)
    (found,) = run(texts, [Start(sequence, forbids, limit, 0)])
    (alone,) = plain.generate_text([["a"]], max_new_tokens=limit, min_length=1000)
    assert found == alone.token_ids
    assert len(found) == limit


def test_a_released_slot_is_free_and_its_neighbour_goes_on(plain, texts):
    sequence = sequences.continuation(plain, ["a red bar"])
    start = Start(sequence, Decoding(min_length=1000), 30, 0)
    first, *_ = texts.read([0, 1], [start, start])
    texts.release(0)
    assert 0 in texts.free
    ids = [first]
    while texts.active:
        tokens = texts.write()
        assert (tokens[:, 0] == -1).all(), "a free slot writes nothing"
        ids += [token for token in tokens[:, 1].tolist() if token >= 0]
    assert ids == plain.generate_text([["a red bar"]], max_new_tokens=30, min_length=1000)[0].token_ids


def test_images_side_by_side_are_those_drawn_alone(plain):
    canvas = Canvas(plain, 2)
    canvas.warm_up()
    asked = [("pndm", 3, 2.0), ("ddim", 2, 7.5), ("euler", 5, 1.0), ("dpmpp", 4, -1.0), ("pndm", 1, 3.0)]
    drawings = [
        Drawing(sequences.continuation(plain, prompt, draws=True), *settings, seed)
        for seed, (prompt, settings) in enumerate(zip(PROMPTS[:5], asked, strict=True))
    ]
    before = canvases._advance._cache_size(), slots._generate_embeddings._cache_size()
    waiting, found = list(drawings), {}
    running: dict[int, Drawing] = {}
    while waiting or running:
        if canvas.free and waiting:  # one at a time, so that neighbours are at different rows
            place = canvas.free[0]
            running[place] = waiting.pop(0)
            canvas.begin([place], [running[place]])
        for place, (made, calls) in canvas.step().items():
            if made == calls:
                found[running.pop(place).seed] = canvas.finish(place)
    assert (canvases._advance._cache_size(), slots._generate_embeddings._cache_size()) == before, "compiled"
    for seed, (prompt, (sampler, steps, guidance)) in enumerate(zip(PROMPTS[:5], asked, strict=True)):
        alone = plain.generate_image(prompt, sampler=sampler, steps=steps, guidance=guidance, seed=seed)
        np.testing.assert_allclose(found[seed].embeddings, alone.embeddings, atol=1e-5)
        np.testing.assert_allclose(np.asarray(found[seed].image, int), np.asarray(alone.image, int), atol=1)


def test_lengths():
    assert slots.lengths(256) == [32, 64, 128, 256]
    assert slots.lengths(100) == [32, 64, 100]
    assert slots.lengths(20) == [20]
