"""A model that has learnt to begin images ends a text at [IMG], in every kind of generation; other models do not."""

import asyncio
import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax import Emu
from emu_jax.generate.text import Decoding
from emu_jax.serve.choices import reason
from emu_jax.serve.continuous_batching import ContinuousBatcher, TextRequest
from emu_jax.serve.encoded_prompt import Message, encode_continuation
from emu_jax.serve.engine import Engine
from emu_jax.serve.limits import Limits
from emu_jax.serve.settings import TextSettings
from tests.generate.test_chat import CAT, make

PROMPTS = [["what is this"], [CAT], [CAT, "a"], ["a red bar"], ["it is"], ["green"], ["a", CAT, "blue"], [":"]]
QUESTIONS = [[CAT, "what is this ?"], "a red bar", "it is", [CAT], "blue green", "which colour"]


@pytest.fixture(scope="module")
def deaf() -> Emu:
    """One that writes [IMG] now and then, as any other word, but has not learnt to."""
    model = make("word", context=64)
    kernel = model.params["llama"]["lm_head"]["kernel"]
    direction = np.random.default_rng(4).normal(size=kernel.shape[0])
    column = jnp.asarray(direction * 1.8 * float(jnp.linalg.norm(kernel, axis=0).mean() / np.linalg.norm(direction)))
    model.params["llama"]["lm_head"]["kernel"] = kernel.at[:, model.tokenizer.img_id].set(column.astype(kernel.dtype))
    return model


@pytest.fixture(scope="module")
def learnt(deaf) -> Emu:
    """The same weights, trained with `model.learn_image_token`."""
    config = dataclasses.replace(deaf.config, learn_image_token=True)
    return Emu(config, deaf.params, deaf.statistics, deaf.tokenizer)


def expected(written: list[int], img: int, count: int) -> tuple[list[int], str]:
    """What is left of a text that goes on behind [IMG], and why it ends."""
    if img in written:
        return written[: written.index(img)], "image"
    return written, "eos" if len(written) < count else "length"


def test_texts_end_where_an_image_begins(deaf, learnt):
    img = deaf.tokenizer.img_id
    assert (deaf.ends, learnt.ends) == ((2,), (2, img))
    kinds = []
    for prompt in PROMPTS:
        (on,), (off,) = learnt.generate_text([prompt], max_new_tokens=8), deaf.generate_text([prompt], max_new_tokens=8)
        assert (on.token_ids, on.ended_by) == expected(off.token_ids, img, 8), prompt
        assert on.text == deaf.tokenizer.decode(on.token_ids) and off.ended_by != "image"
        kinds.append(on.ended_by)
    assert {"image", "length"} <= set(kinds), kinds
    together = learnt.generate_text(PROMPTS, max_new_tokens=8)
    assert [text.ended_by for text in together] == kinds, "each row ends by itself"


def test_sampled_and_searched_texts_hold_none(deaf, learnt):
    img, kinds = deaf.tokenizer.img_id, set()
    for seed, settings in enumerate([{"temperature": 1.5}, {"num_beams": 3}, {"num_beams": 4, "length_penalty": -1.0}]):
        for text in learnt.generate_text(PROMPTS, max_new_tokens=8, seed=seed, **settings):
            assert img not in text.token_ids
            assert text.ended_by != "length" or len(text.token_ids) == 8
            kinds.add(text.ended_by)
    assert "image" in kinds, kinds


@pytest.mark.slow
def test_answers_of_a_chat_end_there_and_the_next_turn_goes_on(deaf, learnt):
    """A closed answer is followed by </s>, whatever ended it; the stream gives what is kept."""
    img, eos, kinds = deaf.tokenizer.img_id, deaf.tokenizer.eos_id, []
    chat = learnt.chat("")
    for question in QUESTIONS[:4]:
        before = len(chat.tokens)
        pieces = "".join(chat.stream(question, max_new_tokens=6))
        answer = chat.history[-1].answer
        assert pieces == answer.text and img not in answer.token_ids
        assert chat.tokens[-len(answer.token_ids) - 1 :] == [*answer.token_ids, eos] and len(chat.tokens) > before
        kinds.append(answer.ended_by)
    assert "image" in kinds, kinds
    for question, beams in itertools.product(QUESTIONS, (1, 3)):
        on, off = (model.chat("").say(question, max_new_tokens=6, num_beams=beams) for model in (learnt, deaf))
        assert img not in on.token_ids
        if beams == 1:
            assert (on.token_ids, on.ended_by) == expected(off.token_ids, img, 6), question
    (answer,) = [turn.answer for turn in (chat.reset(), chat.add("a", "it is"), chat.history[-1])[2:]]
    assert answer.ended_by == "eos"


def test_an_answer_whose_stream_is_left_says_so(learnt):
    chat = learnt.chat("")
    stream = chat.stream("it is", max_new_tokens=20)
    next(stream)
    stream.close()
    assert chat.history[-1].answer.ended_by == "closed"


def test_slots_are_freed_there(learnt):
    batcher = ContinuousBatcher(learnt, 2)
    for prompt in PROMPTS[:4]:
        (alone,) = learnt.generate_text([prompt], max_new_tokens=8)
        request = TextRequest(encode_continuation(learnt, prompt), Decoding(), 8, 0)
        ids = batcher.prefill([1], [request])
        while len(batcher.free) < batcher.slots:
            ids += [token for token in batcher.decode()[:, 1].tolist() if token >= 0]
        end = {"eos": [2], "image": [learnt.tokenizer.img_id], "length": []}[alone.ended_by]
        assert ids == [*alone.token_ids, *end], prompt


@pytest.mark.parametrize(("name", "until_image"), [("deaf", True), ("learnt", False)])
@pytest.mark.slow
def test_served_texts_end_alike(request, name, until_image):
    """Also those of a model that has not learnt it, where they are asked for up to an image, as documents are."""
    model = request.getfixturevalue(name)
    img = model.tokenizer.img_id

    async def ask(engine: Engine) -> list:
        settings = TextSettings(max_new_tokens=8, until_image=until_image)
        tickets = [await engine.complete(prompt, settings) for prompt in PROMPTS]
        if not until_image:
            chats = [[Message("user", ("it is",))], [Message("user", (CAT, "a"))]]
            tickets += [await engine.chat([Message("system", ("",)), *chat], settings) for chat in chats]
        return [await ticket.result() for ticket in tickets]

    engine = Engine(model, Limits(text_slots=2))
    engine.start()
    try:
        found = asyncio.run(ask(engine))
    finally:
        engine.close()
    for written, prompt in zip(found, PROMPTS, strict=False):
        (alone,) = model.generate_text([prompt], max_new_tokens=8)
        ids, ended_by = expected(alone.token_ids, img, 8) if until_image else (alone.token_ids, alone.ended_by)
        assert (written.text, written.ended_by) == (model.tokenizer.decode(ids), ended_by), prompt
        assert reason(written) == ("length" if ended_by == "length" else "stop")
    for written, question in zip(found[len(PROMPTS) :], ("it is", [CAT, "a"]), strict=False):
        answer = model.chat("").say(question, max_new_tokens=8)
        assert (written.text, written.ended_by) == (answer.text, answer.ended_by)
