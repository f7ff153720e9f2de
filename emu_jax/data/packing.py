"""Sequence packing: sequences -> fixed rows of S tokens and I image slots.

A row holds complete sequences (`sequence.py`) one after another. An image is never split, and sequences in a row that
show the same image share its slot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from emu_jax.data.images import ImageError
from emu_jax.data.sequence import TokenizedDocument
from emu_jax.errors import UserError

CONTINUES, CUT = 1, 2  # bits of a row's `cuts`

# A row is filled once for each of these, and the best result is kept:
#   size_preference  how much a choice favours large units over an even use of tokens and images
#   tilt             the ratio of free tokens to free images that counts as even, relative to what the rest needs
SIZE_PREFERENCE_AND_TILT = ((0.0, 1.0), (0.1, 1.0), (0.2, 1.0), (0.4, 1.0), (0.8, 1.0), (0.0, 1.2), (0.0, 0.8))
# Waste of the scarcer resource (tokens or image slots) costs 1 per row; of the other one, if it is needed less than
# SCARCE_SHARE as much, only ABUNDANT_PRICE.
SCARCE_SHARE, ABUNDANT_PRICE = 0.95, 0.02
GOOD_ENOUGH = 0.25  # stop at this share of the mean waste per row that is unavoidable


def pack_window(
    documents: Sequence[TokenizedDocument], row_tokens: int, row_images: int
) -> list[list[TokenizedDocument]]:
    """Distributes a window of documents over rows, which have limits for both tokens and images; deterministic.

    Rows are filled one at a time. A row starts with the largest remaining document. Each next one is chosen such that
    the free tokens and free images keep the proportion in which the remaining documents need them, so that both run out
    together. Each row is tried with several settings (`SIZE_PREFERENCE_AND_TILT`), and the one that wastes least is
    kept. Neighbours in the window that show the same images form a unit if a row can hold them, so that these images
    are encoded once.

    Raises:
      UserError: a document is larger than a row.
    """
    for document in documents:
        _check_fits([document], row_tokens, row_images)
    units = _units_sharing_images(documents, row_tokens, row_images)
    sizes = np.array([(sum(map(len, unit)), len(_keys(unit))) for unit in units], np.int64).reshape(-1, 2)
    # Units of one size are interchangeable: the choice is a size, and then its first unit in the window.
    sizes, size_of, counts = np.unique(sizes, axis=0, return_inverse=True, return_counts=True)
    members = np.split(np.argsort(size_of.reshape(-1), kind="stable"), np.cumsum(counts)[:-1])
    taken = np.zeros_like(counts)
    rows: list[list[TokenizedDocument]] = []
    while (left := counts - taken).any():
        row = _fill_row(sizes, left, np.array([row_tokens, row_images]))
        rows.append([])
        for size in row:
            rows[-1] += units[members[size][taken[size]]]
            taken[size] += 1
    return rows


def _fill_row(sizes: np.ndarray, counts: np.ndarray, capacity: np.ndarray) -> list[int]:
    """Chooses the units of one row.

    Args:
      sizes: int [K, 2], the tokens and images of a unit of each size.
      counts: int [K], how many units of each size remain.
      capacity: int [2], the tokens and images of a row.

    Returns:
      Indices into `sizes`, one per chosen unit.
    """
    # All hosts must choose alike on any processor: whole numbers, and no sum, matrix product or power that may be
    # rounded differently.
    shares = sizes / capacity
    need = (counts[:, None] * sizes).sum(
        0
    ) / capacity  # rows that the remaining units fill with tokens, and with images
    price = np.where(need > SCARCE_SHARE * need.max(), 1.0, ABUNDANT_PRICE)
    rows = math.ceil(need.max())
    enough = float(((1 - need / rows) * price).sum()) * GOOD_ENOUGH
    largest = int(np.argmax(np.where(counts > 0, shares.sum(1), -1.0)))
    best, least = [], math.inf
    for size_preference, tilt in SIZE_PREFERENCE_AND_TILT:
        chosen, left, room, rest = [largest], counts.copy(), capacity - sizes[largest], need - shares[largest]
        left[largest] -= 1
        while len(fits := np.flatnonzero((left > 0) & (sizes[:, 0] <= room[0]) & (sizes[:, 1] <= room[1]))):
            after = room / capacity - shares[fits]
            imbalance = np.abs(after[:, 0] - tilt * rest[0] / max(rest[1], 1e-9) * after[:, 1])
            size = int(fits[np.argmin(imbalance - size_preference * shares[fits].sum(1))])
            chosen.append(size)
            left[size] -= 1
            room, rest = room - sizes[size], rest - shares[size]
        waste = float((room / capacity * price).sum())
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
            f"and row_images={row_images}; call tokenize_document with these sizes"
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


class BuiltRow(NamedTuple):
    """One row. A tuple of arrays, because Grain moves the arrays of tuples between processes through shared memory.

    Attributes:
      arrays: the fields of `models.emu.Batch` without their leading axis: tokens, segments, slots, source_ids int32
        [S]; text_weights, visual_weights float32 [S]; images uint8 [I, H, W, 3], unless the row was built without.
      cuts: int32 [S]. At a document's first position: `CONTINUES` if it continues a document that was cut, plus `CUT`
        if a later piece follows. 0 elsewhere.
      faults: (number of the source, what is wrong) for each document with an unreadable image.
      records: (number of the source, index of the record) for each document.
    """

    arrays: dict[str, np.ndarray]
    cuts: np.ndarray
    faults: list[tuple[int, str]]
    records: list[tuple[int, int]]


def build_row(
    documents: Sequence[TokenizedDocument],
    *,
    row_tokens: int,
    row_images: int,
    image_size: int,
    pad_id: int,
    with_images: bool = True,
    images: np.ndarray | None = None,
) -> BuiltRow:
    """Builds the arrays of a row.

    A document with an unreadable image keeps its positions, but its weights are 0 and that image is black: rows are
    planned before images are read.

    Args:
      with_images: whether to read the images.
      images: uint8 [I, H, W, 3] of zeros to read them into; None allocates it.

    Raises:
      UserError: the documents do not fit a row, or an image has another shape than the model's.
    """
    _check_fits(documents, row_tokens, row_images)
    cuts = np.zeros(row_tokens, np.int32)
    row = {
        "tokens": np.full(row_tokens, pad_id, np.int32),
        "segments": np.zeros(row_tokens, np.int32),
        "slots": np.full(row_tokens, -1, np.int32),
        "source_ids": np.zeros(row_tokens, np.int32),
        "text_weights": np.zeros(row_tokens, np.float32),
        "visual_weights": np.zeros(row_tokens, np.float32),
    }
    if with_images:
        shape = (row_images, image_size, image_size, 3)
        row["images"] = np.zeros(shape, np.uint8) if images is None else images
    slot_of: dict[str, int] = {}
    unreadable: dict[str, str] = {}
    faults: list[tuple[int, str]] = []
    start = 0
    for number, document in enumerate(documents, 1):
        for image in document.images:
            if image.key not in slot_of:
                slot_of[image.key] = len(slot_of)
                if with_images:
                    try:
                        image.into(row["images"][slot_of[image.key]])
                    except ImageError as error:
                        unreadable[image.key] = str(error)
        lookup = np.array([*(slot_of[image.key] for image in document.images), -1], np.int32)
        piece = slice(start, start := start + len(document))
        row["tokens"][piece] = document.tokens
        row["segments"][piece] = number
        row["slots"][piece] = lookup[document.slots]
        row["source_ids"][piece] = document.source
        cuts[piece.start] = CONTINUES * document.continues + CUT * document.cut
        broken = [unreadable[image.key] for image in document.images if image.key in unreadable]
        if broken:
            faults.append((document.source, broken[0]))
            continue
        row["text_weights"][piece] = document.text_weights
        row["visual_weights"][piece] = document.visual_weights
    return BuiltRow(row, cuts, faults, [(document.source, document.record) for document in documents])
