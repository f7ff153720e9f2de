"""Documents -> token sequences -> fixed rows of S tokens and I image slots.

A document reads `<s> text [IMG] <image>*Q [/IMG] text … </s>`. A row holds whole documents one after the other;
an image is never split, and documents of a row that show the same picture share its slot.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence

import numpy as np

from emu_jax.data.document import Document, Image, Text
from emu_jax.data.images import PictureError
from emu_jax.data.system_messages import SYSTEM_MESSAGES
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TokenizedDocument:
    """One document's sequence of T positions.

    Attributes:
      tokens: int32 [T].
      text_weights: float32 [T], of classifying this token from the position before it; 0 for the first token and
        for [PAD], <image>, [IMG], [/IMG].
      visual_weights: float32 [T], of regressing this position's input embedding; at every <image> and [/IMG].
      slots: int32 [T], index into `images` at every <image>, -1 elsewhere.
      continues: whether this is a later piece of a document that was too long for a row.
      source: number of the source it is from.
    """

    tokens: np.ndarray
    text_weights: np.ndarray
    visual_weights: np.ndarray
    slots: np.ndarray
    images: tuple[Image, ...]
    continues: bool = False
    source: int = 0

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass
class _Sequence:
    """A sequence under construction."""

    document: Document
    tokenizer: Tokenizer
    source: int
    tokens: list[int]
    text: list[bool]
    visual: list[bool]
    slots: list[int]
    images: list[Image]

    @classmethod
    def start(cls, document: Document, tokenizer: Tokenizer, source: int) -> _Sequence:
        return cls(document, tokenizer, source, [tokenizer.bos_id], [False], [False], [-1], [])

    def add_text(self, ids: Sequence[int], learnt: Sequence[bool]) -> None:
        self.tokens += ids
        self.text += learnt
        self.visual += [False] * len(ids)
        self.slots += [-1] * len(ids)

    def add_image(self, image: Image, queries: int) -> None:
        t = self.tokenizer
        self.tokens += [t.img_id, *[t.image_id] * queries, t.img_end_id]
        self.text += [False] * (queries + 2)
        self.visual += [False, *[True] * (queries + 1)]
        self.slots += [-1, *[len(self.images)] * queries, -1]
        self.images.append(image)

    def finish(self) -> TokenizedDocument:
        role = self.document.parts[-1].role if self.document.parts and isinstance(self.document.parts[-1], Text) else ""
        self.add_text([self.tokenizer.eos_id], [role in LEARNT])
        return TokenizedDocument(
            tokens=np.array(self.tokens, np.int32),
            text_weights=np.array(self.text, np.float32) * self.document.text_weight,
            visual_weights=np.array(self.visual, np.float32) * self.document.visual_weight,
            slots=np.array(self.slots, np.int32),
            images=tuple(self.images),
            source=self.source,
        )


def _text_ids(document: Document, index: int, part: Text, tokenizer: Tokenizer) -> list[int]:
    """Ids of `part`, the text at `index`, stripped beside an image as the reference strips beside special tokens."""
    text, role = part.text, part.role
    if role == "system" and text in SYSTEM_MESSAGES:
        return tokenizer.encode(text, add_bos=False)
    if index > 0 and isinstance(document.parts[index - 1], Image):
        text = text.lstrip()
    if index + 1 < len(document.parts) and isinstance(document.parts[index + 1], Image):
        text = text.rstrip()
    return tokenizer.encode_plain(text)


LEARNT = ("", "assistant")  # whose texts are: of a chat, the answers


def _turns(document: Document) -> list[str]:
    """Of each part the role that begins a turn there, or "". A picture belongs to the turn of the text after it."""
    roles, role = [], ""
    for part in reversed(document.parts):
        role = part.role if isinstance(part, Text) else role
        roles.append(role)
    roles.reverse()
    return [role if role != before else "" for before, role in zip(["", *roles], roles, strict=False)]


def tokenize_document(
    document: Document, tokenizer: Tokenizer, *, queries: int, row_tokens: int, row_images: int, source: int = 0
) -> list[TokenizedDocument]:
    """A document -> one sequence, or several when it is longer than a row.

    >>> tokenizer = Tokenizer.train(["a red cat", "a blue cat"], vocab_size=7, model_type="word")
    >>> cat = Image(np.zeros((4, 4, 3), np.uint8), "cat.png")
    >>> (found,) = tokenize_document(Document((cat, Text("a cat"))), tokenizer, queries=2, row_tokens=16, row_images=1)
    >>> found.tokens.tolist()  # <s> [IMG] <image> <image> [/IMG] a cat </s>
    [1, 8, 10, 10, 9, 3, 4, 2]
    >>> found.text_weights.astype(int).tolist()
    [0, 0, 0, 0, 0, 1, 1, 1]
    >>> found.visual_weights.astype(int).tolist()
    [0, 0, 1, 1, 1, 0, 0, 0]

    It is split between parts, as late as possible; only a single text longer than a row is split inside, between
    tokens. Every piece is a document of its own, from <s> to </s>.

    A chat reads `<s> system [USER]: question [ASSISTANT]: answer </s> [USER]: …` (the reference's prompts; that every
    answer ends in </s> is inferred). Its answers and their </s> are learnt.

    Args:
      queries: Q, embeddings of an image.
      row_tokens, row_images: S and I, what a row holds.
      source: number of the source it is from, of those that are mixed.
    """
    image_length = queries + 2
    if row_tokens < image_length + 2 or row_images < 1:
        raise UserError(
            f"config.data.row_tokens={row_tokens}, row_images={row_images}: a row must hold <s>, one image of "
            f"{image_length} tokens and </s>: at least {image_length + 2} tokens and 1 image"
        )
    room = row_tokens - 1  # for everything but </s>
    left = document.max_tokens - 2 if document.max_tokens else sys.maxsize  # without <s> and </s>
    sequence, finished = _Sequence.start(document, tokenizer, source), []

    def write(ids: list[int], learnt: list[bool]) -> None:
        nonlocal sequence, left
        ids = ids[: min(len(ids), left)]
        left -= len(ids)
        if len(sequence.tokens) + len(ids) > room and len(sequence.tokens) > 1:
            finished.append(sequence.finish())
            sequence = _Sequence.start(document, tokenizer, source)
        while ids:
            cut = min(room - len(sequence.tokens), len(ids))
            sequence.add_text(ids[:cut], learnt[:cut])
            ids, learnt = ids[cut:], learnt[cut:]
            if ids:
                finished.append(sequence.finish())
                sequence = _Sequence.start(document, tokenizer, source)

    turns = _turns(document)
    for index, part in enumerate(document.parts):
        mark = tokenizer.turn_ids(turns[index]) if turns[index] else []
        if isinstance(part, Text):
            ids = _text_ids(document, index, part, tokenizer)
            learnt = [part.role in LEARNT] * len(ids)
            if part.role == "assistant" and index + 1 < len(turns) and turns[index + 1]:
                ids, learnt = [*ids, tokenizer.eos_id], [*learnt, True]
            write([*mark, *ids], [*([False] * len(mark)), *learnt])
        else:
            write(mark, [False] * len(mark))
            if image_length > left:
                break
            left -= image_length
            if len(sequence.tokens) + image_length > room or len(sequence.images) == row_images:
                finished.append(sequence.finish())
                sequence = _Sequence.start(document, tokenizer, source)
            sequence.add_image(part, queries)
        if not left:
            break
    if len(sequence.tokens) > 1 or not finished:
        finished.append(sequence.finish())
    return [finished[0], *(dataclasses.replace(piece, continues=True) for piece in finished[1:])]


# Ways to fill a row: how much a choice prefers large documents to an even use of tokens and images, and of which
# proportion of the two it takes for even, relative to what is left.
WAYS = ((0.0, 1.0), (0.1, 1.0), (0.2, 1.0), (0.4, 1.0), (0.8, 1.0), (0.0, 1.2), (0.0, 0.8))
SCARCE = 0.95  # of what the window is shortest of: from here on the other is as dear


def pack_window(
    documents: Sequence[TokenizedDocument], row_tokens: int, row_images: int
) -> list[list[TokenizedDocument]]:
    """Distributes a window of documents over rows that hold both tokens and images; deterministic.

    A row is filled at a time: it starts with the largest document left, then takes the one that leaves room for tokens
    and for images in the proportion in which the remaining documents need them, so that both run out together. It is
    filled in several ways (`WAYS`), of which the one counts that wastes least of what the window is short of.
    Neighbours in the window that show the same pictures travel together where a row can hold them, so that those are
    encoded once.
    """
    for document in documents:
        _check_fits([document], row_tokens, row_images)
    units = _units_sharing_pictures(documents, row_tokens, row_images)
    sizes = np.array([(sum(map(len, unit)), len(_keys(unit))) for unit in units], np.int64).reshape(-1, 2)
    # Units of one size are interchangeable: what is chosen is a size, and of it the first in the window.
    kinds, kind_of, counts = np.unique(sizes, axis=0, return_inverse=True, return_counts=True)
    members = np.split(np.argsort(kind_of.reshape(-1), kind="stable"), np.cumsum(counts)[:-1])
    taken = np.zeros_like(counts)
    rows: list[list[TokenizedDocument]] = []
    while (left := counts - taken).any():
        row = _fill_row(kinds, left, np.array([row_tokens, row_images]))
        rows.append([])
        for kind in row:
            rows[-1] += units[members[kind][taken[kind]]]
            taken[kind] += 1
    return rows


def _fill_row(kinds: np.ndarray, counts: np.ndarray, row: np.ndarray) -> list[int]:
    """Chooses a row's units from `counts` [K] ones of the sizes `kinds` [K, 2]; `row` [2] is what it holds."""
    # Hosts must choose alike on any processor: whole numbers, and no sum, product of matrices or power that may round
    # in another way.
    shares = kinds / row
    need = (counts[:, None] * kinds).sum(0) / row  # rows that all units need of tokens, and of images
    price = np.where(need > SCARCE * need.max(), 1.0, 0.02)
    rows = math.ceil(need.max())
    # A quarter of what rows waste on average if there are no more than must be.
    enough = float(((1 - need / rows) * price).sum()) / 4
    largest = int(np.argmax(np.where(counts > 0, shares.sum(1), -1.0)))
    best, least = [], math.inf
    for preference, tilt in WAYS:
        chosen, left, room, rest = [largest], counts.copy(), row - kinds[largest], need - shares[largest]
        left[largest] -= 1
        while len(fits := np.flatnonzero((left > 0) & (kinds[:, 0] <= room[0]) & (kinds[:, 1] <= room[1]))):
            after = room / row - shares[fits]
            imbalance = np.abs(after[:, 0] - tilt * rest[0] / max(rest[1], 1e-9) * after[:, 1])
            kind = int(fits[np.argmin(imbalance - preference * shares[fits].sum(1))])
            chosen.append(kind)
            left[kind] -= 1
            room, rest = room - kinds[kind], rest - shares[kind]
        waste = float((room / row * price).sum())
        if waste < least:
            best, least = chosen, waste
        if least <= enough:
            break
    return best


def _keys(unit: Sequence[TokenizedDocument]) -> set[str]:
    return {image.key for document in unit for image in document.images}


def _check_fits(documents: Sequence[TokenizedDocument], row_tokens: int, row_images: int) -> None:
    tokens, pictures = sum(map(len, documents)), len(_keys(documents))
    if tokens > row_tokens or pictures > row_images:
        raise UserError(
            f"packing: {tokens} tokens and {pictures} pictures do not fit a row of config.data.row_tokens={row_tokens} "
            f"and row_images={row_images}; split the document by tokenize_document with these sizes"
        )


def _units_sharing_pictures(
    documents: Sequence[TokenizedDocument], row_tokens: int, row_images: int
) -> list[list[TokenizedDocument]]:
    units: list[list[TokenizedDocument]] = []
    for document in documents:
        joined = [*units[-1], document] if units and _keys(units[-1]) & _keys([document]) else []
        if joined and sum(map(len, joined)) <= row_tokens and len(_keys(joined)) <= row_images:
            units[-1] = joined
        else:
            units.append([document])
    return units


def build_row(
    documents: Sequence[TokenizedDocument],
    *,
    row_tokens: int,
    row_images: int,
    image_size: int,
    pad_id: int,
    with_images: bool = True,
    images: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], list[tuple[int, str]]]:
    """One row's arrays, named as the fields of `models.emu.Batch` (without its leading axis), and its faults.

    images uint8 [I, H, W, 3]; tokens, segments, slots, sources int32 [S]; text_weights, visual_weights float32 [S].
    Beside them `splits` int32 [S]: 1 where a document begins that continues one that was cut. Without images, none is
    read; else they are read into `images`, black as given, where it is.

    A document with a picture that cannot be read stays in its place, but with weights of 0 and black pictures: the
    rows were planned before a picture was read. A fault is the document's source and what is wrong.
    """
    _check_fits(documents, row_tokens, row_images)
    row = {
        "tokens": np.full(row_tokens, pad_id, np.int32),
        "segments": np.zeros(row_tokens, np.int32),
        "slots": np.full(row_tokens, -1, np.int32),
        "sources": np.zeros(row_tokens, np.int32),
        "text_weights": np.zeros(row_tokens, np.float32),
        "visual_weights": np.zeros(row_tokens, np.float32),
        "splits": np.zeros(row_tokens, np.int32),
    }
    if with_images:
        shape = (row_images, image_size, image_size, 3)
        row["images"] = np.zeros(shape, np.uint8) if images is None else images
    places: dict[str, int] = {}
    unreadable: dict[str, str] = {}
    faults: list[tuple[int, str]] = []
    start = 0
    for number, document in enumerate(documents, 1):
        for image in document.images:
            if image.key not in places:
                places[image.key] = len(places)
                if with_images:
                    try:
                        image.into(row["images"][places[image.key]])
                    except PictureError as error:
                        unreadable[image.key] = str(error)
        lookup = np.array([*(places[image.key] for image in document.images), -1], np.int32)
        piece = slice(start, start := start + len(document))
        row["tokens"][piece] = document.tokens
        row["segments"][piece] = number
        row["slots"][piece] = lookup[document.slots]
        row["sources"][piece] = document.source
        row["splits"][piece.start] = document.continues
        broken = [unreadable[image.key] for image in document.images if image.key in unreadable]
        if broken:
            faults.append((document.source, broken[0]))
            continue
        row["text_weights"][piece] = document.text_weights
        row["visual_weights"][piece] = document.visual_weights
    return row, faults


def batch_metrics(batch: dict[str, np.ndarray], row_images: int) -> dict[str, float]:
    """How full a batch is: share of padding positions, share of image slots in use, tokens, pictures, documents."""
    used = (batch["slots"][..., None] == np.arange(row_images)).any(1)  # [B, I]
    live = batch["segments"] > 0
    return {
        "pad_fraction": float(1.0 - live.mean()),
        "slot_occupancy": float(used.mean()),
        "tokens": float(live.sum()),
        "pictures": float(used.sum()),
        "documents": float(batch["segments"].max(1).sum()),
    }
