"""Chats about the embedded images: what is asked and answered, and that held-out answers are not among them."""

import numpy as np
import pytest

from emu_jax.data import embedded_chats
from emu_jax.data.document import Document, Image, Text
from emu_jax.data.fluent_emoji import Example
from emu_jax.data.sequence import tokenize_document
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


def test_questions_are_plain_text_around_the_image(source):
    """All words that a chat may say are written there, "yes" among them."""
    asked = open_source(embedded_chats.QUESTIONS_NAME, "train", 16, PairOrder())
    assert len(asked) == len(source)
    found = [asked.documents(place, np.random.default_rng(place))[0] for place in range(0, len(asked), 8)]
    assert {tuple(type(part) for part in document.parts) for document in found} == {(Text, Image, Text)}
    assert {part.role for document in found for part in document.parts if isinstance(part, Text)} == {""}
    assert not any(document.visual_weight for document in found), "no image is predicted from a question"
    said = [f"{document.parts[0].text} {document.parts[2].text}" for document in found]
    kinds = {
        "name": sum(text.startswith("what is this? ") for text in said),
        "tone": sum(text.startswith("what skin tone does the person have? ") for text in said),
        "is-this": sum(text.startswith("yes or no, is this a ") for text in said),
    }
    print(kinds)
    assert sum(kinds.values()) == len(said) and min(kinds.values()) > 30
    assert {text.split()[-1] for text in said if text.startswith("yes or no")} == {"yes", "no"}


def _chats(source, place: int) -> list:
    return [source.documents(place, np.random.default_rng(seed))[0] for seed in range(120)]


def _roles(chat: Document) -> tuple[str, ...]:
    return tuple(getattr(part, "role", "image") for part in chat.parts)


def test_a_document_is_a_chat_about_one_image_or_several(source):
    place = next(n for n in range(len(source)) if embedded_chats.has_one_tone(source.examples[n]))
    found = set()
    for document in _chats(source, place):
        if document.parts[-1].text == "":
            continue  # the answer is an image
        roles = _roles(document)
        images = roles.count("image")
        turn = ("user", "assistant")
        expected = ("image", *turn * (2 + embedded_chats.YES_OR_NO)) if images == 1 else ("image", *turn) * images
        assert roles == ("system", *expected)
        assert document.parts[0].text == IMAGE_SYSTEM
        found.add(images)
    assert found == {1, 2, 3, 4, 5}, found


def test_some_chats_ask_for_an_image_and_get_the_one_of_that_name(source):
    places = {source.key(place): place for place in range(len(source))}
    drawn = [chat for chat in _chats(source, 0) if chat.parts[-1].text == ""]
    assert 0.15 < len(drawn) / 120 < 0.45, len(drawn)  # 0.2 + 0.8 * 0.1
    assert {_roles(chat)[0] for chat in drawn} == {"user", "system"}, (
        "expected requests alone and after other questions"
    )
    for chat in drawn:
        assert _roles(chat)[-3:] == ("user", "image", "assistant")
        asked, image, _ = chat.parts[-3:]
        caption = source.examples[places[image.key]].caption
        assert asked.text in {ask.format(caption) for ask in embedded_chats.DRAW_ASKS}, asked.text


def test_a_drawn_image_is_learnt_and_a_shown_one_is_not(source):
    tokenizer = Tokenizer(Tokenizer.train(source.texts(), vocab_size=4000, model_type="word").proto, instruct=True)
    shown = (Image(PIXELS, "cat"), Text("what is this?", "user"), Text("cat", "assistant"))
    asked = (Text("draw a dog", "user"), Image(PIXELS, "dog"), Text("", "assistant"))
    size = {"queries": 2, "row_tokens": 64, "row_images": 2, "learn_image_token": True}
    (sequence,) = tokenize_document(Document((*shown, *asked)), tokenizer, **size)
    learnt = np.flatnonzero(sequence.tokens == tokenizer.img_id)
    assert sequence.text_weights[learnt].tolist() == [0, 1], "expected that the model learns to begin the second image"
    assert sequence.visual_weights[sequence.slots == 0].sum() == 0
    assert sequence.visual_weights[sequence.slots == 1].all()
    assert sequence.tokens[-1] == tokenizer.eos_id
    assert sequence.text_weights[-1] == 1


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
