"""Chats about the embedded images: what is asked and answered, and that held-out answers are not among them."""

import numpy as np
import pytest

from emu_jax.data import embedded_chats
from emu_jax.data.document import Image
from emu_jax.data.fluent_emoji import Example
from emu_jax.data.sources import PairOrder, open_source
from emu_jax.data.system_messages import IMAGE_SYSTEM
from emu_jax.data.tokenizer import Tokenizer

PIXELS = np.zeros((2, 2, 3), np.uint8)
FAIRY = Example(PIXELS, "fairy: medium-dark skin tone", "1", "fairy", "medium-dark skin tone")
CAT = Example(PIXELS, "cat", "2", "", "")


@pytest.fixture(scope="module")
def source():
    return open_source(embedded_chats.NAME, "train", 16, PairOrder())


def test_what_is_asked_of_a_person_and_of_a_thing():
    rng = np.random.default_rng(0)
    asked = {one.kind: (one.question, one.answer) for one in embedded_chats.questions(FAIRY, ["fairy"], rng)}
    assert asked == {
        "name": ("what is this?", "fairy: medium-dark skin tone"),
        "tone": ("what skin tone does the person have?", "medium-dark"),
        "is-this": ("yes or no, is this a fairy", "yes"),
    }
    assert [one.kind for one in embedded_chats.questions(CAT, ["fairy"], rng)] == ["name", "is-this"]


def test_yes_is_as_frequent_as_no():
    rng = np.random.default_rng(0)
    answers = [embedded_chats.is_this(CAT, ["fairy", "dog"], rng).answer for _ in range(400)]
    assert 0.4 < answers.count("yes") / 400 < 0.6, answers.count("yes")


def _chats(source, place: int) -> list:
    return [source.documents(place, np.random.default_rng(seed))[0] for seed in range(60)]


def test_a_document_is_a_chat_about_one_image_or_several(source):
    place = next(n for n in range(len(source)) if embedded_chats.has_one_tone(source.examples[n]))
    found = set()
    for document in _chats(source, place):
        roles = tuple(getattr(part, "role", "image") for part in document.parts)
        images = roles.count("image")
        turn = ("user", "assistant")
        expected = ("image", *turn * 3) if images == 1 else ("image", *turn) * images
        assert roles == ("system", *expected)
        assert document.parts[0].text == IMAGE_SYSTEM
        found.add(images)
    assert found == {1, 2, 3, 4, 5}, found


def test_a_document_depends_on_the_generator_alone(source):
    def texts() -> list[list[str]]:
        return [[getattr(part, "text", "") for part in chat.parts] for chat in _chats(source, 7)]

    assert texts() == texts()


def test_a_tokenizer_of_its_texts_spells_every_question(source):
    tokenizer = Tokenizer(Tokenizer.train(source.texts(), vocab_size=4000, model_type="word").proto, instruct=True)
    for place in range(0, len(source), 97):
        (document,) = source.documents(place, np.random.default_rng(place))
        spelt = [tokenizer.encode_plain(part.text) for part in document.parts[1:] if not isinstance(part, Image)]
        assert not any(tokenizer.unk_id in ids for ids in spelt), document.parts


def test_held_out_combinations_are_not_answered_in_training(source):
    captions = {example.caption for example in source.examples}
    held_out = open_source(embedded_chats.NAME, "heldout_combinations", 16, PairOrder())
    assert not captions & {example.caption for example in held_out.examples}
