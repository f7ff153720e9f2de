"""Counts of batches, and figures of them over processes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.data.counts import add_batches, figures, row_counts


def row(documents: str, length: int) -> dict[str, np.ndarray]:
    """A row of documents; a document is some of `t` (a token), `r` and `p` (an image's token, read or predicted)."""
    pieces = documents.split() or [""]
    tokens = "".join(pieces)
    segments = [number for number, piece in enumerate(pieces, 1) for _ in piece]
    slots = [-1 if token == "t" else number for number, token in enumerate(tokens)]
    fields = {
        "segments": (segments, 0),
        "slots": (slots, -1),
        "visual_weights": ([token == "p" for token in tokens], 0),
    }
    return {name: np.array([*values, *[empty] * (length - len(values))]) for name, (values, empty) in fields.items()}


def batch(*rows: str, length: int = 8) -> dict[str, np.ndarray]:
    made = [row(documents, length) for documents in rows]
    return {name: np.stack([each[name] for each in made]) for name in made[0]}


def test_figures_of_a_batch():
    counts = row_counts(batch("tp rt t", "pt"), row_images=8)
    assert figures([{"all": counts}]) == {
        "tokens": 7.0,
        "images": 3.0,
        "documents": 4.0,
        "pad_fraction": pytest.approx(9 / 16),
        "slot_occupancy": 3 / 16,
        "predicted_share": 2 / 3,  # text alone shows no image
        "read_share": 1 / 3,
    }


def test_a_part_that_two_processes_read_counts_once():
    first, second = (row_counts(batch(rows), row_images=8) for rows in ("tp", "tttt r"))
    processes = [{"shard 0": first}, {"shard 0": first, "shard 1": second}, {"shard 1": second}]
    assert figures(processes) == figures([{"shard 0": first, "shard 1": second}])
    assert figures(processes)["tokens"] == 7


def test_counts_add_up_over_batches_and_those_of_the_run_do_not():
    counts = [{"shard 0": {"tokens": tokens, "split_documents": so_far}} for tokens, so_far in ((3.0, 1.0), (5.0, 4.0))]
    assert figures([add_batches(counts)], batches=2) == {"tokens": 4.0, "split_documents": 4.0}


@given(st.lists(st.lists(st.sampled_from(["tp", "rt t", "t", "p p", "tr"]), min_size=2, max_size=2), min_size=1))
def test_parts_together_are_the_whole(batches):
    """Cut into rows or not, over however many batches: figures of the same rows are the same."""
    whole = add_batches({"all": row_counts(batch(*rows), row_images=8)} for rows in batches)
    parts = [
        add_batches({f"shard {shard}": row_counts(batch(rows[shard]), row_images=8)} for rows in batches)
        for shard in range(2)
    ]
    assert figures([whole], len(batches)) == pytest.approx(figures(parts, len(batches)))
