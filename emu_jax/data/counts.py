"""What batches hold, counted so that what several processes read is counted once.

A stream counts by part of a batch: `{part: {name: count}}`. Processes that read the same part count the same, under the
same name, so a part counts once however many of them there are. Counts of a batch add up over batches and parts; shares
are made of the sums.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping

import numpy as np

Counts = Mapping[str, Mapping[str, float]]  # part -> name -> count

SO_FAR = ("split_documents", "faulty_documents")  # counts of the whole run; the others are of a batch
# Share -> the counts that it is made of, (part, whole).
SHARES = {
    "slot_occupancy": ("images", "slots"),
    "predicted_share": ("predicted_documents", "shown_documents"),
    "read_share": ("read_documents", "shown_documents"),
}
PARTS_OF_SHARES = ("positions", "slots", "shown_documents", "predicted_documents", "read_documents")


def row_counts(rows: Mapping[str, np.ndarray], row_images: int) -> dict[str, float]:
    """Counts of the rows of a batch, or of a part of it.

    Args:
      rows: `segments`, `slots` and `visual_weights`, [B, S].

    Returns:
      positions, tokens: all positions, and those that are not padding.
      slots, images: all image slots, and those in use.
      documents, shown_documents: documents, and those with images.
      predicted_documents, read_documents: those whose images are regression targets, and whose images are only inputs.
    """
    used = (rows["slots"][..., None] == np.arange(row_images)).any(1)  # [B, I]
    live = rows["segments"] > 0
    documents = rows["segments"] + np.arange(len(live))[:, None] * (rows["segments"].max() + 1)  # unique in the batch
    shown = len(np.unique(documents[rows["slots"] >= 0]))
    predicted = len(np.unique(documents[(rows["slots"] >= 0) & (rows["visual_weights"] > 0)]))
    counts = {
        "positions": live.size,
        "tokens": live.sum(),
        "slots": used.size,
        "images": used.sum(),
        "documents": rows["segments"].max(1).sum(),
        "shown_documents": shown,
        "predicted_documents": predicted,
        "read_documents": shown - predicted,
    }
    return {name: float(count) for name, count in counts.items()}


def add_batches(batches: Iterable[Counts]) -> dict[str, dict[str, float]]:
    """The counts of several batches, one after the other, by part."""
    total: dict[str, dict[str, float]] = {}
    for batch in batches:
        for part, counts in batch.items():
            old = total.setdefault(part, {})
            for name, count in counts.items():
                old[name] = count if name in SO_FAR else old.get(name, 0.0) + count
    return total


def figures(processes: Iterable[Counts], batches: int = 1) -> dict[str, float]:
    """Figures of a batch over all processes: its counts, means over so many batches, and shares of them.

    Returns:
      tokens, images, documents, documents_<source>: as `row_counts` has them, of a batch.
      split_documents, faulty_documents: counts since the run began.
      pad_fraction: share of positions that are padding.
      slot_occupancy: share of image slots that are in use.
      predicted_share, read_share: shares of the documents with images.
    """
    sums: collections.Counter[str] = collections.Counter()
    for counts in collections.ChainMap(*map(dict, processes)).values():
        sums.update(counts)
    found = {
        name: float(count if name in SO_FAR else count / batches)
        for name, count in sums.items()
        if name not in PARTS_OF_SHARES
    }
    if "positions" in sums:
        found["pad_fraction"] = 1.0 - sums["tokens"] / sums["positions"]
    return found | {share: sums[part] / max(sums[whole], 1) for share, (part, whole) in SHARES.items() if whole in sums}
