"""The engine: results, streams, cancellation, deadlines, a full queue, failures, and the end."""

import asyncio

import numpy as np
import pytest

from emu_jax.errors import UserError
from emu_jax.serve.encoded_prompt import Message
from emu_jax.serve.engine import Engine
from emu_jax.serve.limits import LimitError, Limits
from emu_jax.serve.settings import DrawSettings, TextSettings
from emu_jax.serve.ticket import Busy, Failed, Stopping, TimeUp
from tests.serve.conftest import LIMITS
from tests.train import tiny

CAT = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
LONG = TextSettings(max_new_tokens=80, min_length=1000)
# Without the paper's system message, which is longer than this model's context.
QUESTION = [Message("system", ("",)), Message("user", (CAT, "what is it?"))]


def test_texts_and_images_at_the_same_time(engine, model):
    async def ask():
        chats = [await engine.chat(QUESTION, TextSettings(max_new_tokens=12)) for _ in range(4)]
        completions = [
            await engine.complete(["a red"], TextSettings(max_new_tokens=12, seed=s, temperature=1.5)) for s in (1, 2)
        ]
        draws = [await engine.draw(["a red bar"], DrawSettings("ddim", 3, 2.0, seed)) for seed in range(3)]
        pieces = ["".join([piece async for piece in ticket]) for ticket in [*chats, *completions]]
        events = [[event async for event in ticket] for ticket in draws]
        return pieces, events, [await ticket.result() for ticket in [*chats, *completions, *draws]]

    pieces, events, results = asyncio.run(ask())
    texts, images = results[:6], results[6:]
    assert pieces == [completion.text for completion in texts]
    chat = model.merged().chat("")
    answer = chat.say([CAT, "what is it?"], max_new_tokens=12)
    assert [completion.text for completion in texts[:4]] == [answer.text] * 4
    assert texts[0].new_tokens == len(answer.token_ids)
    plain = model.without_adapters()
    for seed, completion in zip((1, 2), texts[4:], strict=True):
        expected = plain.generate_text([["a red"]], max_new_tokens=12, temperature=1.5, seed=seed)[0]
        assert completion.text == expected.text
        assert completion.ended_by == expected.ended_by == ("eos" if len(expected.token_ids) < 12 else "length")
    assert events == [[(1, 3), (2, 3), (3, 3)]] * 3
    for seed, drawn in enumerate(images):
        alone = plain.generate_image(["a red bar"], sampler="ddim", steps=3, guidance=2.0, seed=seed)
        np.testing.assert_allclose(np.asarray(drawn.image, int), np.asarray(alone.image, int), atol=1)


def test_images_in_answers_beside_others(model):
    """The answer's embeddings are those of the model that chats, the others' of the one without adapters."""
    drawer = tiny.that_draws(model.merged())
    engine = Engine(drawer, LIMITS)
    engine.start()
    asked, settings = [Message("user", ("a bar",))], DrawSettings("ddim", 3, 2.0, seed=4)

    async def ask():
        completion = await (await engine.chat(asked, TextSettings(max_new_tokens=4))).result()
        answer = await engine.draw_answer(asked, completion.text, settings)
        other = await engine.draw(["a bar"], settings)
        return completion, await answer.result(), await other.result()

    completion, answer, other = asyncio.run(ask())
    engine.close(0)
    assert (completion.text, completion.ended_by) == ("", "image")
    chat = drawer.chat("")
    chat.say("a bar")
    expected = chat.draw(sampler="ddim", steps=3, guidance=2.0, seed=4)
    np.testing.assert_allclose(np.asarray(answer.image, int), np.asarray(expected.image, int), atol=1)
    alone = drawer.generate_image(["a bar"], sampler="ddim", steps=3, guidance=2.0, seed=4)
    np.testing.assert_allclose(np.asarray(other.image, int), np.asarray(alone.image, int), atol=1)


def test_cancelling_frees_the_slot(engine):
    async def ask():
        before = engine.counts.cancelled
        tickets = [await engine.chat(QUESTION, LONG) for _ in range(3)]
        while engine.running()["text"] < 3:
            await asyncio.sleep(0.001)
        tickets += [await engine.chat(QUESTION, LONG) for _ in range(6)]  # these wait
        with pytest.raises(Busy, match="waiting already"):
            [await engine.chat(QUESTION, LONG) for _ in range(9)]
        for ticket in tickets[3:]:  # the queue is full of them, and the slots are not free
            ticket.cancel()
        ticket = await engine.chat(QUESTION, TextSettings(max_new_tokens=2))
        for running in tickets[:3]:
            running.cancel()
        late = await asyncio.wait_for(ticket.result(), 30)
        with pytest.raises(Stopping, match="the request was cancelled"):
            await tickets[3].result()
        return late, engine.counts.cancelled - before

    late, cancelled = asyncio.run(ask())
    assert late.new_tokens <= 2
    assert cancelled >= 9


@pytest.mark.long
def test_requests_are_answered_while_it_compiles(model):
    """It has more slots for texts than other tests, so their programs are not there yet."""
    engine = Engine(model, Limits(text_slots=5, drawing_slots=2))
    engine.start()

    async def ask():
        ticket = await engine.complete(["a red bar"], TextSettings(max_new_tokens=6, min_length=1000))
        return await ticket.result(), engine.compiled.is_set()

    completion, compiled = asyncio.run(ask())
    assert not compiled, "all programs were compiled before the first request was answered"
    expected = model.without_adapters().generate_text([["a red bar"]], max_new_tokens=6, min_length=1000)[0]
    assert completion.text == expected.text
    assert engine.compiled.wait(600)
    again = asyncio.run(ask())
    assert again[0].text == expected.text
    engine.close(0)


def test_time_is_up(model):
    engine = Engine(model, Limits(text_slots=3, drawing_slots=2, seconds=0.05))
    engine.start()
    engine.compiled.wait()

    async def ask():
        tickets = [await engine.complete(["a"], LONG) for _ in range(40)]
        return await asyncio.gather(*(ticket.result() for ticket in tickets), return_exceptions=True)

    results = asyncio.run(ask())
    late = [result for result in results if isinstance(result, TimeUp)]
    assert late, "40 texts of 80 tokens, three at a time, take longer than 50 ms"
    assert str(late[0]) == "the request took longer than 0.05 seconds"
    assert engine.counts.timed_out == len(late)
    engine.close(0)
    assert not engine.healthy


def test_a_failed_turn_ends_only_its_own_requests(engine, monkeypatch):
    def breaks():
        raise RuntimeError("out of memory")

    async def ask(expected):
        ticket = await engine.chat(QUESTION, TextSettings(max_new_tokens=8, min_length=1000))
        if not expected:
            return await ticket.result()
        with pytest.raises(Failed, match="the model failed"):
            await ticket.result()

    monkeypatch.setattr(engine._lanes[0], "decode", breaks)
    asyncio.run(ask(True))
    monkeypatch.undo()
    assert engine.healthy
    assert asyncio.run(ask(False)).new_tokens == 8


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (TextSettings(max_new_tokens=0), "max_tokens=0; expected 1 or more"),
        (TextSettings(temperature=float("nan")), "temperature=nan"),
        (TextSettings(top_p=0.0), "top_p"),
        (TextSettings(seed=-1), "seed=-1"),
    ],
)
def test_settings_of_texts(engine, settings, said):
    with pytest.raises(UserError, match=said):
        asyncio.run(engine.complete(["a"], settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (DrawSettings(steps=10**9), "steps=1000000000; expected 1 to 200"),
        (DrawSettings(guidance=float("inf")), "guidance=inf"),
        (DrawSettings(sampler="ddmi"), "did you mean ddim"),
    ],
)
def test_settings_of_images(engine, settings, said):
    with pytest.raises(UserError, match=said):
        asyncio.run(engine.draw(["a"], settings))


def test_too_many_images(engine):
    with pytest.raises((LimitError, UserError), match=r"context|images"):
        asyncio.run(engine.complete([CAT] * 33, TextSettings(max_new_tokens=1)))


def test_the_end(model):
    engine = Engine(model, Limits(text_slots=3, drawing_slots=2))
    engine.start()
    engine.compiled.wait()

    async def ask():
        running = await engine.complete(["a"], TextSettings(max_new_tokens=40, min_length=1000))
        await asyncio.to_thread(engine.close, 30.0)
        with pytest.raises(Stopping, match="stopping"):
            await engine.complete(["a"], TextSettings())
        return await running.result()

    assert asyncio.run(ask()).new_tokens == 40
