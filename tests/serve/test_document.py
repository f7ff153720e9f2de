"""Documents continued by an engine: the items of `Emu.continue_document`, and the progress before each."""

import asyncio
import contextlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from emu_jax import Emu
from emu_jax.errors import UserError
from emu_jax.generate.model import GeneratedText
from emu_jax.serve.document import DocumentSettings, DrawingProgress, Item, TextPiece, continue_document
from emu_jax.serve.engine import Engine
from emu_jax.serve.limits import Limits
from emu_jax.serve.settings import DrawSettings
from emu_jax.serve.tabs.document import Page, as_prompt, offered

IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
FAST = DrawSettings(sampler="ddim", steps=2, seed=3)


@pytest.fixture(scope="module")
def model(drawing) -> Emu:
    """A model that begins images: beside a random word's, [IMG] has a larger share of the output."""
    model = Emu.load(drawing)
    kernel = model.params["llama"]["lm_head"]["kernel"]
    direction = np.random.default_rng(2).normal(size=kernel.shape[0])
    column = jnp.asarray(direction * 2.5 * float(jnp.linalg.norm(kernel, axis=0).mean() / np.linalg.norm(direction)))
    model.params["llama"]["lm_head"]["kernel"] = kernel.at[:, model.tokenizer.img_id].set(column.astype(kernel.dtype))
    return model


@pytest.fixture(scope="module")
def engine(model):
    engine = Engine(model, Limits(text_slots=2, drawing_slots=1, items=5))
    engine.start()
    engine.compiled.wait()
    yield engine
    engine.close()


def collect(engine: Engine, document, settings: DocumentSettings) -> list:
    async def run() -> list:
        return [event async for event in continue_document(engine, document, settings)]

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("document", "pattern"),
    [
        (["a red bar"], None),
        (["a blue cross", IMAGE], None),
        ([IMAGE, "then a"], None),
        (["a red bar"], ("image", "text", "image")),
        ([IMAGE], ("text", "text", "image")),
        ([IMAGE, "a cross"], ("image", "image")),
    ],
)
def test_the_items_are_those_of_the_model(model, engine, document, pattern):
    plan = DocumentSettings(max_items=3, pattern=pattern, max_new_tokens=6, drawing=FAST)
    expected = model.continue_document(
        document, max_items=3, pattern=pattern, max_new_tokens=6, seed=3, sampler="ddim", steps=2
    )
    events = collect(engine, document, plan)
    found = [event.content for event in events if isinstance(event, Item)]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, GeneratedText):
            assert one == other.text
        else:
            assert one.seed == other.seed
            np.testing.assert_allclose(np.asarray(one.image, int), np.asarray(other.image, int), atol=1)
    told: list = []
    for event in events:  # pieces join to the text behind them, progress ends where the image comes
        if not isinstance(event, Item):
            told.append(event)
        elif isinstance(event.content, str):
            assert "".join(piece.text for piece in told if isinstance(piece, TextPiece)) == event.content
            told = []
        else:
            assert told[-1] == DrawingProgress(2, 2)
            told = []


def test_the_model_asks_for_images(model):
    """Otherwise the test above would not cover texts that end at an image."""
    replies = [model.continue_document([text], max_items=3, max_new_tokens=6, steps=2) for text in ("a red bar", "a")]
    kinds = {tuple(isinstance(item, GeneratedText) for item in items) for items in replies}
    assert any(False in kind for kind in kinds), kinds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (DocumentSettings(max_items=6), "max_items=6; expected 1 to 5"),
        (DocumentSettings(max_new_tokens=0), "max_tokens=0; expected 1"),
        (DocumentSettings(pattern=("video",)), "expected text or image"),
        (DocumentSettings(drawing=DrawSettings(steps=1000)), "steps=1000; expected 1 to 200"),
    ],
)
def test_settings_that_cannot_work(engine, settings, message):
    with pytest.raises(UserError, match=message):
        collect(engine, ["a"], settings)


def test_closing_the_iterator_frees_the_slot(engine):
    async def leave() -> None:
        plan = DocumentSettings(pattern=("image",), drawing=DrawSettings(sampler="ddim", steps=200))
        async with contextlib.aclosing(continue_document(engine, [Image.fromarray(IMAGE)], plan)) as events:
            assert isinstance(await anext(events), DrawingProgress)
        while engine.running()["image"]:
            await asyncio.sleep(0.01)

    cancelled = engine.counts.cancelled
    asyncio.run(asyncio.wait_for(leave(), 20))
    assert engine.counts.cancelled == cancelled + 1


def test_the_page_offers_what_a_model_can_do():
    """Only models that have learnt to begin images, and have a decoder, may decide."""
    both = ["text, image, …", "image, text, …", "texts only", "images only"]
    assert list(offered(draws=True, begins_images=True)) == ["the model decides", *both]
    assert list(offered(draws=True, begins_images=False)) == both
    assert list(offered(draws=False, begins_images=True)) == ["texts only"]
    assert list(offered(draws=False, begins_images=False)) == ["texts only"]


def test_paragraphs_of_the_page_are_lines_of_the_prompt():
    """Two texts that a user adds one after the other were glued together: "a catand a dog"."""
    image = np.zeros((4, 4, 3), np.uint8)
    prompt = as_prompt(Page(parts=("a cat", "and a dog", image, "end")))
    assert prompt[0] == "a cat\nand a dog" and prompt[1] is image and prompt[2:] == ["end"]
