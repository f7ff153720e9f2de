"""Rows: exact arrays of small examples, and what must hold for every packing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.data.document import Document, Image, Text
from emu_jax.data.packing import CONTINUES, CUT, build_row, pack_window
from emu_jax.data.sequence import TokenizedDocument, tokenize_document
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError

# Six words are pieces 3…8, so [PAD] is 9, [IMG] 10, [/IMG] 11, <image> 12.
TOKENIZER = Tokenizer.train(
    ["a a a a a a red red red red red bus bus bus bus blue blue blue cat cat dog"], vocab_size=20, model_type="word"
)
A, RED, BUS, BLUE, CAT, DOG = (TOKENIZER.encode_plain(word)[0] for word in ("a", "red", "bus", "blue", "cat", "dog"))
QUERIES = 2
IMAGE_LENGTH = QUERIES + 2


def _image(key: str) -> Image:
    return Image(np.full((2, 2, 3), ord(key[0]), np.uint8), key)


def _tokenize(document: Document, row_tokens: int = 64, row_images: int = 8):
    return tokenize_document(document, TOKENIZER, queries=QUERIES, row_tokens=row_tokens, row_images=row_images)


def _build(documents, row_tokens: int, row_images: int):
    return build_row(
        documents, row_tokens=row_tokens, row_images=row_images, image_size=2, pad_id=TOKENIZER.pad_id
    ).arrays


WORDS = st.lists(st.sampled_from(["a", "red", "bus", "blue", "cat", "dog"]), max_size=12).map(" ".join)
PARTS = st.one_of(WORDS.map(Text), st.sampled_from("pqrstu").map(_image))
DOCUMENTS = st.builds(
    Document,
    st.lists(PARTS, max_size=8).map(tuple),
    text_weight=st.sampled_from([0.0, 0.25, 1.0]),
    visual_weight=st.sampled_from([0.0, 0.5, 1.0]),
)


# ---------------------------------------------------------------- a row


def test_a_row_of_two_documents_that_share_an_image():
    documents = [
        *_tokenize(Document((_image("p"), Text("red")), visual_weight=0.0)),
        *_tokenize(Document((Text("red"), _image("p")), text_weight=0.5)),
        *_tokenize(Document((_image("q"),))),
    ]
    row = _build(documents, row_tokens=22, row_images=3)
    expected = {
        "tokens": [1, 10, 12, 12, 11, 4, 2, 1, 4, 10, 12, 12, 11, 2, 1, 10, 12, 12, 11, 2, 9, 9],
        "segments": [1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 0, 0],
        "slots": [-1, -1, 0, 0, -1, -1, -1, -1, -1, -1, 0, 0, -1, -1, -1, -1, 1, 1, -1, -1, -1, -1],
        "text_weights": [0, 0, 0, 0, 0, 1, 1, 0, 0.5, 0, 0, 0, 0, 0.5, 0, 0, 0, 0, 0, 1, 0, 0],
        "visual_weights": [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(row[name], values, err_msg=name)
    assert [int(image[0, 0, 0]) for image in row["images"]] == [ord("p"), ord("q"), 0]
    assert row["images"].shape == (3, 2, 2, 3) and row["images"].dtype == np.uint8
    kinds = {name: row[name].dtype for name in expected}
    assert kinds == {
        "tokens": np.int32,
        "segments": np.int32,
        "slots": np.int32,
        "text_weights": np.float32,
        "visual_weights": np.float32,
    }


def test_a_row_tells_where_a_document_continues_a_cut_one():
    pieces = _tokenize(Document((Text("a red bus blue cat dog a"),)), row_tokens=6)
    documents = [*_tokenize(Document((Text("dog"),))), pieces[1], pieces[0]]
    row = build_row(documents, row_tokens=16, row_images=1, image_size=2, pad_id=TOKENIZER.pad_id)
    assert row.arrays["tokens"].tolist() == [1, 8, 2, 1, 8, 3, 2, 1, 3, 4, 5, 6, 7, 9, 9, 9]
    assert row.cuts.tolist() == [0, 0, 0, CONTINUES, 0, 0, 0, CUT, 0, 0, 0, 0, 0, 0, 0, 0]


def test_an_empty_row_is_padding():
    row = _build([], row_tokens=3, row_images=1)
    assert row["tokens"].tolist() == [9, 9, 9] and row["segments"].tolist() == [0, 0, 0]
    assert row["slots"].tolist() == [-1, -1, -1] and not row["images"].any()


def test_rows_without_images_read_none():
    def refuse():
        raise AssertionError("read")

    [whole] = _tokenize(Document((_image("p"), Text("red"))))
    [unread] = _tokenize(Document((Image(refuse, "p"), Text("red"))))
    sizes = {"row_tokens": 20, "row_images": 4, "image_size": 2, "pad_id": TOKENIZER.pad_id}
    expected, row = build_row([whole], **sizes).arrays, build_row([unread], **sizes, with_images=False).arrays
    assert "images" not in row
    for name in row:
        np.testing.assert_array_equal(row[name], expected[name])
    with pytest.raises(AssertionError, match="read"):
        build_row([unread], **sizes)


# ---------------------------------------------------------------- a window


def _identities(documents) -> list[int]:
    return sorted(map(id, documents))


@given(documents=st.lists(DOCUMENTS, max_size=12), row_tokens=st.integers(8, 40), row_images=st.integers(1, 4))
def test_packing_keeps_every_document_once_within_the_row(documents, row_tokens, row_images):
    pieces = [piece for document in documents for piece in _tokenize(document, row_tokens, row_images)]
    rows = pack_window(pieces, row_tokens, row_images)
    assert _identities(piece for row in rows for piece in row) == _identities(pieces)
    again = pack_window(pieces, row_tokens, row_images)
    assert [list(map(id, row)) for row in again] == [list(map(id, row)) for row in rows]
    for documents_of_row in rows:
        keys = {image.key for document in documents_of_row for image in document.images}
        assert sum(map(len, documents_of_row)) <= row_tokens and len(keys) <= row_images
        row = _build(documents_of_row, row_tokens, row_images)
        # Segments are 1, 1, …, 2, 2, …, 0, 0: each contiguous, each equal to its document.
        live = row["segments"][row["segments"] > 0]
        lengths = [len(document) for document in documents_of_row]
        assert live.tolist() == np.repeat(np.arange(1, len(lengths) + 1), lengths).tolist()
        assert not row["segments"][len(live) :].any() and (row["tokens"][len(live) :] == 9).all()
        for number, document in enumerate(documents_of_row, 1):
            here = row["segments"] == number
            for name in ("tokens", "text_weights", "visual_weights"):
                np.testing.assert_array_equal(row[name][here], getattr(document, name))
            # Every <image> reads the pixels of its own image, whichever slot that took.
            for place, own in zip(row["slots"][here], document.slots, strict=True):
                assert (place == -1) == (own == -1)
                if own >= 0:
                    np.testing.assert_array_equal(row["images"][place], document.images[own].pixels)
        assert len(np.unique(row["slots"][row["slots"] >= 0])) == len(keys)  # a shared image takes one slot


@given(count=st.integers(1, 10), row_images=st.integers(1, 4))
def test_documents_of_one_image_share_its_row_and_slot(count, row_images):
    both = [
        piece
        for number in range(count)
        for parts in ((_image(str(number)), Text("red")), (Text("red"), _image(str(number))))
        for piece in _tokenize(Document(parts))
    ]
    rows = pack_window(both, 7 * 2 * row_images, row_images)
    assert len(rows) == -(-count // row_images)  # a slot an image, not two
    for row in rows:
        keys = [document.images[0].key for document in row]
        assert sorted(keys) == sorted(2 * sorted(set(keys)))


def test_documents_that_share_some_images_travel_together():
    album = _tokenize(Document((_image("p"), _image("q"))))
    cover = _tokenize(Document((_image("p"),)))
    (row,) = pack_window(cover + album, row_tokens=16, row_images=2)
    assert [len(document.images) for document in row] == [1, 2]


def test_images_and_their_captions_fill_rows():
    """The quick start's case: 13-20 tokens, 8 queries, half of the images in two documents."""
    rng = np.random.default_rng(0)
    words = " ".join(["red"] * 8)
    documents = []
    for number in range(128):
        text = Text(words[: 4 * rng.integers(1, 9) - 1])
        documents.append(Document((_image(str(number)), text)))
        if rng.random() < 0.5:
            documents.append(Document((text, _image(str(number)))))
    pieces = [
        piece
        for document in documents
        for piece in tokenize_document(document, TOKENIZER, queries=8, row_tokens=112, row_images=4)
    ]
    rows = pack_window(pieces, 112, 4)
    assert {len(piece) for piece in pieces} == set(range(13, 21))
    # No packing needs fewer rows than its tokens and its images do.
    fewest = max(-(-sum(map(len, pieces)) // 112), 128 // 4)
    assert fewest <= len(rows) <= fewest + 1


def test_a_mixture_fills_rows_with_both_tokens_and_images():
    """Pairs, web documents and videos: as few rows as the tokens or the images need, and one or two more."""
    rng = np.random.default_rng(0)
    nothing = np.zeros(2048, np.int32)
    documents = []
    for number in range(512):
        count, tokens = 1, rng.integers(36, 81)
        if number % 8 == 6:
            count, tokens = 8, 292
        elif number % 8 == 7:
            count, tokens = rng.integers(1, 5), rng.integers(300, 1500)
        images = tuple(Image(nothing, f"{number}#{place}") for place in range(count))
        documents.append(TokenizedDocument(*[nothing[:tokens]] * 4, images))
    tokens, images = sum(map(len, documents)), sum(len(document.images) for document in documents)
    row_images = round(2048 * images / tokens)
    rows = pack_window(documents, 2048, row_images)
    fewest = max(-(-tokens // 2048), -(-images // row_images))
    assert (fewest, row_images) == (51, 21)
    assert fewest <= len(rows) <= fewest + 1


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "pixels", [np.zeros((2, 2, 3), np.float32), np.zeros((3, 2, 3), np.uint8), np.zeros((2, 2), np.uint8)]
)
def test_an_image_that_was_not_prepared_is_named(pixels):
    documents = _tokenize(Document((Image(pixels, "cat.png"),)))
    with pytest.raises(UserError, match=r"^image cat\.png: expected uint8 \[2, 2, 3\].*got (float32|uint8) \["):
        _build(documents, 16, 2)


@pytest.mark.parametrize(("row_tokens", "row_images"), [(9, 2), (64, 1)])
def test_a_document_larger_than_a_row_is_refused(row_tokens, row_images):
    documents = _tokenize(Document((_image("p"), _image("q"))))
    expected = rf"^packing: 10 tokens and 2 images do not fit .*={row_tokens} and row_images={row_images}; [^\n]*$"
    with pytest.raises(UserError, match=expected):
        pack_window(documents, row_tokens, row_images)
    with pytest.raises(UserError, match=expected):
        _build(documents, row_tokens, row_images)


@pytest.mark.parametrize(("row_tokens", "row_images"), [(5, 1), (64, 0)])
def test_a_row_too_small_for_any_image_is_refused(row_tokens, row_images):
    with pytest.raises(UserError, match="at least 6 tokens and 1 image"):
        _tokenize(Document((Text("a"),)), row_tokens, row_images)
