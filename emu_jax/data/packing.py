"""Sequences -> fixed rows of S tokens and I image slots.

A row holds whole sequences (`sequence.py`) one after the other; an image is never split, and sequences of a row that
show the same image share its slot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from emu_jax.data.images import ImageError
from emu_jax.data.sequence import TokenizedDocument
from emu_jax.errors import UserError

CONTINUES, CUT = 1, 2  # bits of a row's `cuts`

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
    Neighbours in the window that show the same images travel together where a row can hold them, so that those are
    encoded once.
    """
    for document in documents:
        _check_fits([document], row_tokens, row_images)
    units = _units_sharing_images(documents, row_tokens, row_images)
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
    tokens, images = sum(map(len, documents)), len(_keys(documents))
    if tokens > row_tokens or images > row_images:
        raise UserError(
            f"packing: {tokens} tokens and {images} images do not fit a row of config.data.row_tokens={row_tokens} "
            f"and row_images={row_images}; cut the document by tokenize_document with these sizes"
        )


def _units_sharing_images(
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

    images uint8 [I, H, W, 3]; tokens, segments, slots, source_ids int32 [S]; text_weights, visual_weights float32 [S].
    Beside them `cuts` int32 [S], at a document's first position: `CONTINUES` where it continues one that was cut, plus
    `CUT` where that goes on behind it. Without images, none is read; otherwise they are read into `images`, black as
    given, where it is.

    A document with an image that cannot be read stays in its place, but with weights of 0 and black images: the
    rows were planned before an image was read. A fault is the document's source and what is wrong.
    """
    _check_fits(documents, row_tokens, row_images)
    row = {
        "tokens": np.full(row_tokens, pad_id, np.int32),
        "segments": np.zeros(row_tokens, np.int32),
        "slots": np.full(row_tokens, -1, np.int32),
        "source_ids": np.zeros(row_tokens, np.int32),
        "text_weights": np.zeros(row_tokens, np.float32),
        "visual_weights": np.zeros(row_tokens, np.float32),
        "cuts": np.zeros(row_tokens, np.int32),
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
                    except ImageError as error:
                        unreadable[image.key] = str(error)
        lookup = np.array([*(places[image.key] for image in document.images), -1], np.int32)
        piece = slice(start, start := start + len(document))
        row["tokens"][piece] = document.tokens
        row["segments"][piece] = number
        row["slots"][piece] = lookup[document.slots]
        row["source_ids"][piece] = document.source
        row["cuts"][piece.start] = CONTINUES * document.continues + CUT * document.cut
        broken = [unreadable[image.key] for image in document.images if image.key in unreadable]
        if broken:
            faults.append((document.source, broken[0]))
            continue
        row["text_weights"][piece] = document.text_weights
        row["visual_weights"][piece] = document.visual_weights
    return row, faults


def batch_metrics(batch: dict[str, np.ndarray], row_images: int) -> dict[str, float]:
    """How full a batch is: share of padding positions, share of image slots in use, tokens, images, documents; and of
    the documents with images, which share has them predicted and which share only reads them."""
    used = (batch["slots"][..., None] == np.arange(row_images)).any(1)  # [B, I]
    live = batch["segments"] > 0
    documents = batch["segments"] + np.arange(len(live))[:, None] * (batch["segments"].max() + 1)  # one number each
    shown = len(np.unique(documents[batch["slots"] >= 0]))
    predicted = len(np.unique(documents[(batch["slots"] >= 0) & (batch["visual_weights"] > 0)]))
    return {
        "pad_fraction": float(1.0 - live.mean()),
        "slot_occupancy": float(used.mean()),
        "tokens": float(live.sum()),
        "images": float(used.sum()),
        "documents": float(batch["segments"].max(1).sum()),
        "predicted_share": predicted / max(shown, 1),
        "read_share": (shown - predicted) / max(shown, 1),
    }
