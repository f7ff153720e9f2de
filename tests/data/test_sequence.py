"""Sequences of documents: exact arrays of small examples, the cuts of long ones, and what must hold for every cut."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.data.document import Document, Image, Text
from emu_jax.data.sequence import TokenizedDocument, tokenize_document
from emu_jax.data.system_messages import IMAGE_SYSTEM, VIDEO_SYSTEM
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError

# Six words are pieces 3…8, so [PAD] is 9, [IMG] 10, [/IMG] 11, <image> 12.
TOKENIZER = Tokenizer.train(
    ["a a a a a a red red red red red bus bus bus bus blue blue blue cat cat dog"], vocab_size=20, model_type="word"
)
QUERIES = 2
IMAGE_LENGTH = QUERIES + 2


def _image(key: str) -> Image:
    return Image(np.full((2, 2, 3), ord(key[0]), np.uint8), key)


def _tokenize(document: Document, row_tokens: int = 64, row_images: int = 8, **more):
    return tokenize_document(document, TOKENIZER, queries=QUERIES, row_tokens=row_tokens, row_images=row_images, **more)


# ---------------------------------------------------------------- a sequence


def test_the_example_s_ids():
    words = ("a", "red", "bus", "blue", "cat", "dog")
    assert [TOKENIZER.encode_plain(word) for word in words] == [[3], [4], [5], [6], [7], [8]]
    assert (TOKENIZER.pad_id, TOKENIZER.img_id, TOKENIZER.img_end_id, TOKENIZER.image_id) == (9, 10, 11, 12)


def test_image_first():
    (got,) = _tokenize(Document((_image("p"), Text("red bus")), text_weight=0.5, visual_weight=2.0))
    #                                      <s>  [IMG] <image> <image> [/IMG] red  bus  </s>
    np.testing.assert_array_equal(got.tokens, [1, 10, 12, 12, 11, 4, 5, 2])
    np.testing.assert_array_equal(got.text_weights, [0, 0, 0, 0, 0, 0.5, 0.5, 0.5])
    np.testing.assert_array_equal(got.visual_weights, [0, 0, 2, 2, 2, 0, 0, 0])
    np.testing.assert_array_equal(got.slots, [-1, -1, 0, 0, -1, -1, -1, -1])
    assert [image.key for image in got.images] == ["p"]
    dtypes = [x.dtype for x in (got.tokens, got.text_weights, got.visual_weights, got.slots)]
    assert dtypes == [np.int32, np.float32, np.float32, np.int32]


def test_interleaved():
    (got,) = _tokenize(Document((Text("a"), _image("p"), Text("cat"), _image("q"))))
    np.testing.assert_array_equal(got.tokens, [1, 3, 10, 12, 12, 11, 7, 10, 12, 12, 11, 2])
    np.testing.assert_array_equal(got.text_weights, [0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(got.visual_weights, [0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0])
    np.testing.assert_array_equal(got.slots, [-1, -1, -1, 0, 0, -1, -1, -1, 1, 1, -1, -1])


def test_text_only_and_empty():
    (got,) = _tokenize(Document((Text("a cat"),)))
    np.testing.assert_array_equal(got.tokens, [1, 3, 7, 2])
    np.testing.assert_array_equal(got.text_weights, [0, 1, 1, 1])
    np.testing.assert_array_equal(got.visual_weights, [0, 0, 0, 0])
    assert got.images == ()
    np.testing.assert_array_equal(_tokenize(Document(()))[0].tokens, [1, 2])


def test_training_sequence_is_the_prompt_s_and_spelled_names_are_text(golden):
    llama = Tokenizer.load(golden / "llama_tokenizer.model")
    document = Document((Text(" a b c "), _image("p"), Text(" question: \n"), _image("q"), Text(" what? ")))
    (got,) = tokenize_document(document, llama, queries=2, row_tokens=64, row_images=2)
    prompt = " a b c [IMG]<image><image>[/IMG] question: \n[IMG]<image><image>[/IMG] what? "
    assert got.tokens.tolist() == [*llama.encode(prompt), 2]
    (got,) = tokenize_document(Document((Text("[IMG]<image></s>"),)), llama, queries=2, row_tokens=64, row_images=2)
    assert got.tokens.max() < 32000 and np.count_nonzero(got.tokens == 2) == 1


# ---------------------------------------------------------------- splitting


def test_too_many_tokens_split_between_parts():
    document = Document((_image("p"), Text("red bus"), Text("blue cat"), _image("q"), Text("dog")), 0.5, 2.0)
    pieces = _tokenize(document, row_tokens=9)
    assert [piece.tokens.tolist() for piece in pieces] == [
        [1, 10, 12, 12, 11, 4, 5, 6, 7],  # <s> p "red bus" "blue cat", and no </s>
        [1, 10, 12, 12, 11, 8, 2],
    ]
    assert [(piece.continues, piece.cut) for piece in pieces] == [(False, True), (True, False)]
    assert pieces[0].text_weights.tolist() == [0, 0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5]
    assert pieces[1].text_weights.tolist() == [0, 0, 0, 0, 0, 0.5, 0.5]
    assert pieces[1].visual_weights.tolist() == [0, 0, 2, 2, 2, 0, 0]
    assert [[image.key for image in piece.images] for piece in pieces] == [["p"], ["q"]]
    assert pieces[1].slots.tolist() == [-1, -1, 0, 0, -1, -1, -1]


def test_too_many_images_split_before_the_next_image():
    pieces = _tokenize(Document((_image("p"), _image("q"), _image("r"), Text("a"))), row_images=2)
    assert [[image.key for image in piece.images] for piece in pieces] == [["p", "q"], ["r"]]


def test_a_text_longer_than_a_row_splits_between_tokens():
    pieces = _tokenize(Document((Text("a red bus blue cat dog a"),)), row_tokens=6)
    assert [piece.tokens.tolist() for piece in pieces] == [[1, 3, 4, 5, 6, 7], [1, 8, 3, 2]]
    pieces = _tokenize(Document((Text("a red bus blue cat"),)), row_tokens=6)
    assert [piece.tokens.tolist() for piece in pieces] == [[1, 3, 4, 5, 6], [1, 7, 2]], "</s> never stands alone"


WORDS = st.lists(st.sampled_from(["a", "red", "bus", "blue", "cat", "dog"]), max_size=12).map(" ".join)
PARTS = st.one_of(WORDS.map(Text), st.sampled_from("pqrstu").map(_image))
DOCUMENTS = st.builds(
    Document,
    st.lists(PARTS, max_size=8).map(tuple),
    text_weight=st.sampled_from([0.0, 0.25, 1.0]),
    visual_weight=st.sampled_from([0.0, 0.5, 1.0]),
)


@given(document=DOCUMENTS, row_tokens=st.integers(6, 40), row_images=st.integers(1, 4))
def test_pieces_together_are_the_document(document, row_tokens, row_images):
    """Pages and captions: every token, weight and image once and in order, </s> at the very end alone."""
    (whole,) = _tokenize(document, 10_000, 10_000)
    pieces = _tokenize(document, row_tokens, row_images)
    for field in ("tokens", "text_weights", "visual_weights"):
        together = [value for piece in pieces for value in getattr(piece, field)[1:].tolist()]
        assert together == getattr(whole, field)[1:].tolist()
    assert [image.key for piece in pieces for image in piece.images] == [image.key for image in whole.images]
    if len(whole) <= row_tokens and len(whole.images) <= row_images:
        assert len(pieces) == 1
    assert [piece.continues for piece in pieces] == [number > 0 for number in range(len(pieces))]
    assert [piece.cut for piece in pieces] == [number + 1 < len(pieces) for number in range(len(pieces))]
    for piece in pieces:
        assert len(piece) <= row_tokens and len(piece.images) <= row_images
        assert piece.tokens[0] == 1 and (piece.tokens[-1] == 2) == (not piece.cut)
        assert (piece.tokens == 2).sum() == (not piece.cut)
        starts = np.flatnonzero(piece.tokens == TOKENIZER.img_id)
        assert len(starts) == len(piece.images)  # an image is whole
        for number, start in enumerate(starts):
            assert piece.tokens[start : start + IMAGE_LENGTH].tolist() == [10, 12, 12, 11]
            assert piece.slots[start : start + IMAGE_LENGTH].tolist() == [-1, number, number, -1]


@given(document=DOCUMENTS, row_tokens=st.integers(6, 40), row_images=st.integers(1, 4), most=st.integers(6, 40))
def test_a_sequence_that_max_tokens_ends_is_the_document_s_beginning(document, row_tokens, row_images, most):
    (whole,) = _tokenize(document, 10_000, 10_000)
    pieces = _tokenize(dataclasses.replace(document, max_tokens=most), row_tokens, row_images)
    together = [token for piece in pieces for token in piece.tokens[1:].tolist()]
    assert together == whole.tokens[1 : 1 + len(together)].tolist()
    ended = len(together) == len(whole) - 1
    assert ended == (len(whole) <= most), f"{len(whole)} tokens of at most {most}"
    assert [piece.cut for piece in pieces] == [True] * (len(pieces) - 1) + [not ended]
    assert together.count(2) == ended
    if not ended:  # an image is left out whole
        assert most - IMAGE_LENGTH <= len(together) <= most - 1


@given(document=DOCUMENTS, row_tokens=st.integers(6, 40), row_images=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_a_window_is_a_stretch_of_the_document_that_fills_a_row(document, row_tokens, row_images, seed):
    """Storyboards: one piece a visit, </s> where it reaches the end, and nothing more would fit."""
    (whole,) = _tokenize(document, 10_000, 10_000)
    visited = dataclasses.replace(document, window=True)
    (piece,) = _tokenize(visited, row_tokens, row_images, rng=np.random.default_rng(seed))
    body, all_of_it = piece.tokens[1:].tolist(), whole.tokens[1:].tolist()
    places = [n for n in range(len(all_of_it) - len(body) + 1) if all_of_it[n : n + len(body)] == body]
    assert places, f"{body} is no stretch of {all_of_it}"
    assert (body[-1] == 2) == (not piece.cut) and body.count(2) == (not piece.cut)
    if len(whole) <= row_tokens and len(whole.images) <= row_images:
        assert body == all_of_it
    if piece.cut and not document_has_long_text(document, row_tokens):
        longest = max([len(part.text.split()) for part in document.parts if isinstance(part, Text)] + [IMAGE_LENGTH])
        assert len(piece) + longest + 1 > row_tokens or len(piece.images) == row_images


def document_has_long_text(document: Document, row_tokens: int) -> bool:
    return any(isinstance(part, Text) and len(part.text.split()) >= row_tokens - 1 for part in document.parts)


def test_windows_begin_everywhere_and_reach_both_ends():
    """Five frames, each after its word, in rows of two frames: four windows, as often."""
    words = ("a", "red", "bus", "blue", "cat")
    parts = [part for number, word in enumerate(words) for part in (Text(word), _image("pqrst"[number]))]
    document = Document(tuple(parts), window=True)
    rng = np.random.default_rng(0)
    seen = collections.Counter()
    for _ in range(2000):
        (piece,) = _tokenize(document, row_tokens=64, row_images=2, rng=rng)
        seen["".join(image.key for image in piece.images), piece.cut, piece.continues] += 1
    # A window begins with a word or with a frame: 7 beginnings up to the last window.
    expected = {("pq", True, False): 2, ("qr", True, False): 2, ("rs", True, False): 2, ("st", False, False): 1}
    assert seen.keys() == expected.keys(), f"expected {expected}, got {seen}"
    for window, ways in expected.items():
        assert seen[window] == pytest.approx(2000 * ways / 7, rel=0.15), f"{window}: {ways} of 7, got {seen}"


@given(document=DOCUMENTS, learn_image_token=st.booleans())
def test_weights_are_those_of_labels_and_targets(document, learn_image_token):
    for piece in _tokenize(document, row_tokens=20, row_images=2, learn_image_token=learn_image_token):
        masked = np.isin(piece.tokens, [9, 11, 12] if learn_image_token else [9, 10, 11, 12])
        masked[0] = True
        np.testing.assert_array_equal(piece.text_weights, np.where(masked, 0.0, document.text_weight))
        target = np.isin(piece.tokens, [11, 12])
        np.testing.assert_array_equal(piece.visual_weights, np.where(target, document.visual_weight, 0.0))
        assert target.sum() == (QUERIES + 1) * len(piece.images)


# ---------------------------------------------------------------- chats

# w0 … w199, each of which a chat says once: a token tells where it is from.
SPOKEN = [f"w{number}" for number in range(200)]
SAID = "system what is this it a red cat b dog f g h c d e one two three four five six seven :"
CHATTER = Tokenizer(
    Tokenizer.train([" ".join([*SPOKEN, SAID])], vocab_size=400, model_type="word").proto,
    instruct=True,
)


def rows_of(pieces: list[TokenizedDocument], tokenizer: Tokenizer = CHATTER) -> list[str]:
    """Rows as a person reads them: *learnt* tokens, images by their keys."""
    rows = []
    for piece in pieces:
        words, shown = [], iter(piece.images)
        for place, token in enumerate(piece.tokens.tolist()):
            if token == tokenizer.image_id:
                continue
            word = tokenizer.special.get(token) or tokenizer.decode([token])
            if word == "[/IMG]":
                assert piece.tokens[place - QUERIES : place].tolist() == [tokenizer.image_id] * QUERIES
                word = f"({next(shown).key})"
            elif word == "[IMG]":
                assert not piece.text_weights[place]
                continue
            words.append(f"*{word}*" if piece.text_weights[place] else word)
        rows.append(" ".join(words))
    return rows


def _chat(*turns: str | Image) -> tuple[Text | Image, ...]:
    """Texts of users and of the assistant in turn, images where they are shown; a system message begins with ! ."""
    parts, role = [], "user"
    for turn in turns:
        if isinstance(turn, Image):
            parts.append(turn)
        elif turn.startswith("!"):
            parts.append(Text(turn[1:], "system"))
        else:
            parts.append(Text(turn, role))
            role = "assistant" if role == "user" else "user"
    return tuple(parts)


def _cut(document: Document, row_tokens: int, row_images: int = 8, **more) -> list[str]:
    sizes = {"queries": QUERIES, "row_tokens": row_tokens, "row_images": row_images}
    return rows_of(tokenize_document(document, CHATTER, **sizes, **more))


@pytest.mark.parametrize(
    ("document", "row", "expected"),
    [
        pytest.param(
            Document(_chat("what is this", "a red cat a b", "what is it", "a dog f g h")),
            (20, 8),
            [
                "<s> [USER] : what is this [ASSISTANT] : *a* *red* *cat* *a* *b* *</s>*",
                "<s> [USER] : what is it [ASSISTANT] : *a* *dog* *f* *g* *h* *</s>*",
            ],
            id="an answer that does not fit behind its question",
        ),
        pytest.param(
            Document(_chat("what is this", "a b", "what is it", "c d")),
            (12, 8),
            [
                "<s> [USER] : what is this [ASSISTANT] : *a* *b* *</s>*",
                "<s> [USER] : what is it [ASSISTANT] : *c* *d* *</s>*",
            ],
            id="a cut between turns learns no second </s>",
        ),
        pytest.param(
            Document(_chat("!system", _image("p"), "what", "a b", _image("q"), "what is it", "c")),
            (23, 8),
            [
                "<s> system [USER] : (p) what [ASSISTANT] : *a* *b* *</s>*",
                "<s> system [USER] : (p) (q) what is it [ASSISTANT] : *c* *</s>*",
            ],
            id="an image of a later turn that does not fit",
        ),
        pytest.param(
            Document(_chat("what is this", "a b c d e f g h")),
            (12, 8),
            ["<s> [USER] : what is this [ASSISTANT] : *a* *b* *c* *d*"],
            id="an answer that is longer than a row",
        ),
        pytest.param(
            Document((_image("p"), Text("a b c d e f g h")), max_tokens=12),
            (64, 8),
            ["<s> (p) *a* *b* *c* *d* *e* *f* *g*"],
            id="a sub-sequence at its most tokens",
        ),
        pytest.param(
            Document((_image("p"), Text("a b"), _image("q"), Text("c"), _image("r"), Text("d"))),
            (64, 2),
            ["<s> (p) *a* *b* (q) *c*", "<s> (r) *d* *</s>*"],
            id="more images than a row holds",
        ),
    ],
)
def test_cuts_teach_nothing_false(document, row, expected):
    """No end after a question or in the middle, no answer without its question, no mark alone."""
    assert _cut(document, *row) == expected


def test_what_becomes_of_a_chat_behind_a_cut():
    chat = Document(_chat("!system", _image("p"), "what", "a", "is", "b", "it", "c"))
    assert _cut(chat, 19) == [
        "<s> system [USER] : (p) what [ASSISTANT] : *a* *</s>*",
        "<s> system [USER] : (p) is [ASSISTANT] : *b* *</s>*",
        "<s> system [USER] : (p) it [ASSISTANT] : *c* *</s>*",
    ]
    assert _cut(chat, 19, chat_cut="drop") == ["<s> system [USER] : (p) what [ASSISTANT] : *a* *</s>*"]
    # A question that fits no row with its images is left out; the one behind it needs the same images.
    assert _cut(Document(_chat(_image("p"), "what is this it a red cat", "b", "what", "c")), 14) == [
        "<s> [USER] : (p) what [ASSISTANT] : *c* *</s>*"
    ]
    assert _cut(Document(_chat(_image("p"), "what", "a", _image("q"), "is", "b")), 40, 1) == [
        "<s> [USER] : (p) what [ASSISTANT] : *a* *</s>*"
    ]
    assert _cut(Document(_chat("what is this it a red cat b dog", "b")), 12) == []


def test_an_answer_without_a_question_is_not_learnt():
    parts = (Text("a red cat", "assistant"), Text("what", "user"), Text("a dog", "assistant"))
    assert _cut(Document(parts), 64) == [
        "<s> [ASSISTANT] : a red cat </s> [USER] : what [ASSISTANT] : *a* *dog* *</s>*"
    ]
    assert _cut(Document(parts), 12) == ["<s> [USER] : what [ASSISTANT] : *a* *dog* *</s>*"]


EXCHANGES = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 9), st.one_of(st.integers(1, 12), st.integers(1, 60))),
    min_size=1,
    max_size=7,
)


@given(
    exchanges=EXCHANGES,
    system=st.integers(0, 4),
    unanswered=st.booleans(),
    row_tokens=st.integers(8, 60),
    row_images=st.integers(1, 6),
)
def test_chats_of_any_length(exchanges, system, unanswered, row_tokens, row_images):
    """Against an oracle that knows of each exchange only its sizes, and of every word where it is from."""
    words = iter(SPOKEN)
    say = lambda count: [next(words) for _ in range(count)]  # noqa: E731
    parts, told, keys = [], [], []
    before = say(system)
    if before:
        parts.append(Text(" ".join(before), "system"))
    for number, (images, asked, answered) in enumerate(exchanges):
        answered = min(answered, 200 // len(exchanges) - 15)
        shown = [f"{number}{letter}" for letter in "xy"[:images]]
        question, answer = say(asked), say(answered)
        parts += [*map(_image, shown), Text(" ".join(question), "user"), Text(" ".join(answer), "assistant")]
        keys += shown
        told.append((question, answer, list(keys)))
    if unanswered:
        parts.append(Text(" ".join(say(3)), "user"))
    sizes = {"queries": QUERIES, "row_tokens": row_tokens, "row_images": row_images}
    pieces = tokenize_document(Document(tuple(parts)), CHATTER, **sizes)
    learnt: list[list[str]] = [[] for _ in told]
    for piece, row in zip(pieces, rows_of(pieces), strict=True):
        assert len(piece) <= row_tokens and len(piece.images) <= row_images
        found = row.split()
        assert found[: 1 + system] == ["<s>", *before], "every piece begins with the system message"
        ends = 0
        for number, (question, answer, so_far) in enumerate(told):
            said = [word for word in found if word.strip("*") in answer]
            if not said:
                continue
            assert said == [f"*{word}*" for word in answer[: len(said)]], "an answer is learnt from its first word on"
            place = found.index(said[0])
            assert found[place - 2 - len(question) : place] == [*question, "[ASSISTANT]", ":"]
            assert [word[1:-1] for word in found[:place] if word.startswith("(")] == so_far, "its images are before it"
            end = found[place + len(said) : place + len(said) + 1]
            assert end in ([], ["*</s>*"]) and (not end or len(said) == len(answer))
            ends += len(end)
            learnt[number] += [*said, *end]
        assert found.count("*</s>*") == ends, f"an end is learnt once where an answer ends, got {row}"
        assert not any(pair in (("[USER]", ":"), ("[ASSISTANT]", ":")) for pair in [tuple(found[-2:])]), "a mark alone"
        assert not [pair for pair in itertools.pairwise(found) if pair in ((":", "[USER]"), (":", "[ASSISTANT]"))]
    for (question, answer, so_far), got in zip(told, learnt, strict=True):
        # <s>, the system message, [USER] :, all images so far, the question, [ASSISTANT] :
        alone = 1 + system + 2 + IMAGE_LENGTH * len(so_far) + len(question) + 2
        whole = [*(f"*{word}*" for word in answer), "*</s>*"]
        if alone + len(whole) <= row_tokens and len(so_far) <= row_images:
            assert got == whole, f"expected the whole answer once, got {got}"
        elif alone < row_tokens and len(so_far) <= row_images:
            assert got == whole[: row_tokens - alone], f"expected it truncated, got {got}"
        else:
            assert got == [], f"expected nothing: the question does not fit a row, got {got}"


def test_a_sequence_ends_at_its_tokens():
    pixels = np.zeros((1, 1, 3), np.uint8)
    parts = (Text("one two three"), Image(pixels, "a"), Text("four five six seven"), Image(pixels, "b"))
    for most, length in ((5, 4), (8, 8), (9, 9), (11, 11), (17, 17), (16, 16), (0, 17)):
        document = Document(parts, max_tokens=most)
        (found,) = tokenize_document(document, CHATTER, queries=2, row_tokens=32, row_images=4)
        assert len(found) == length, f"at most {most}: expected {length} tokens, got {len(found)}"
        assert (found.tokens[-1] == CHATTER.eos_id) == (not found.cut) == (length == 17)


def test_of_a_chat_the_answers_are_learnt():
    """Three turns, the first with an image: what is in capitals is learnt."""
    tokenizer = Tokenizer(
        Tokenizer.train(["system says one two three four five six :"], vocab_size=60, model_type="word").proto,
        instruct=True,
    )
    image = Image(np.zeros((1, 1, 3), np.uint8), "a")
    turns = [Text("system says", "system"), image, Text("one", "user"), Text("two three", "assistant")]
    turns += [Text("four", "user"), Text("five", "assistant"), Text("six", "user"), Text("one", "assistant")]
    (found,) = tokenize_document(Document(tuple(turns)), tokenizer, queries=2, row_tokens=64, row_images=4)
    names = {id: piece for id, piece in tokenizer.special.items()}
    words = [names.get(id) or tokenizer.decode([id]) for id in found.tokens.tolist()]
    shown = [word.upper() if weight else word.lower() for word, weight in zip(words, found.text_weights, strict=True)]
    assert " ".join(shown) == (
        "<s> system says [user] : [img] <image> <image> [/img] one [assistant] : TWO THREE </S> "
        "[user] : four [assistant] : FIVE </S> [user] : six [assistant] : ONE </S>"
    )
    assert found.visual_weights.sum() == 0, "users' images are read, not predicted"


@pytest.mark.parametrize("message", [IMAGE_SYSTEM, VIDEO_SYSTEM])
def test_the_paper_s_system_messages_are_read_as_the_reference_reads_them(golden, message):
    """With LLaMA's tokenizer: [IMG] and [/IMG] in them are tokens, in a user's words the same names are words."""
    tokenizer = Tokenizer.load(golden / "llama_tokenizer.model", instruct=True)
    image = Image(np.zeros((1, 1, 3), np.uint8), "a")
    chat = [Text(message, "system"), image, Text("Is [IMG] a word?", "user"), Text("Yes.", "assistant")]
    (found,) = tokenize_document(Document(tuple(chat)), tokenizer, queries=2, row_tokens=256, row_images=1)
    before, _, after = message.partition("[IMG]ImageContent[/IMG]")
    spelt = tokenizer.encode_plain
    assert found.tokens.tolist() == [
        1,
        *spelt(before.strip()),
        32001,
        *spelt("ImageContent"),
        32002,
        *spelt(after.strip()),
        32004,
        *spelt(":"),
        *(32001, 32003, 32003, 32002),
        *spelt("Is [IMG] a word?"),
        32005,
        *spelt(":"),
        *spelt("Yes."),
        2,
    ]
    assert tokenizer.decode(found.tokens[found.text_weights > 0]) == "Yes."
    places = np.flatnonzero(found.tokens == 32001)
    assert len(places) == 2 and (found.slots[places[1] + 1 : places[1] + 3] == 0).all(), (
        "the second one shows the image"
    )
    assert not found.visual_weights.any(), "users' images are read, not predicted"


def test_chats_need_their_tokens():
    chat = Document((Text("one", "user"), Text("two", "assistant")))
    with pytest.raises(
        UserError, match=r"a chat needs the token \[USER\], which a tokenizer for pretraining does not have"
    ):
        tokenize_document(chat, TOKENIZER, queries=2, row_tokens=32, row_images=4)


def test_an_answer_of_several_parts_ends_once():
    tokenizer = CHATTER
    image = Image(np.zeros((1, 1, 3), np.uint8), "a")
    answer = (Text("two", "assistant"), image, Text("three", "assistant"))
    chat = Document((Text("one", "user"), *answer, Text("four", "user"), Text("five", "assistant")))
    (found,) = tokenize_document(chat, tokenizer, queries=2, row_tokens=32, row_images=4)
    assert (found.tokens == tokenizer.eos_id).sum() == 2
    assert found.visual_weights.sum() == QUERIES + 1, "the assistant's image is predicted"
    assert tokenizer.decode(found.tokens[found.text_weights > 0]) == "two three five"


def test_a_question_without_an_answer_ends_unlearnt():
    tokenizer = CHATTER
    chat = Document((Text("one", "user"), Text("two", "assistant"), Text("three", "user")))
    (found,) = tokenize_document(chat, tokenizer, queries=2, row_tokens=32, row_images=4)
    assert tokenizer.decode(found.tokens[found.text_weights > 0]) == "two" and found.text_weights[-1] == 0
