"""Figures of all processes between two logged steps."""

import pytest

from emu_jax.data.counts import Counts
from emu_jax.train import interval
from emu_jax.train.interval import Interval

FLOPS = {"vision": 6e9, "llama": 4e9}
COUNTS = {"tokens": 100.0, "positions": 200.0, "images": 4.0, "slots": 16.0, "documents": 10.0, "documents_web": 6.0}


class Batches:
    """A stream of counted batches: `faulty_documents` counts on."""

    def __init__(self):
        self.read = 0

    def __next__(self) -> dict:
        self.read += 1
        return {}

    def counts(self) -> Counts:
        return {"shard 0": COUNTS, "shard 0, rows from 0": {"faulty_documents": float(self.read)}}


# What a process of four steps counts that reads other rows of the same shard, and one that reads another shard.
FOUR = {name: 4 * count for name, count in COUNTS.items()}
SAME = {"counts": {"shard 0": FOUR, "shard 0, rows from 4": {"faulty_documents": 1.0}}}
OTHER = {"counts": {"shard 1": FOUR | {"tokens": 200.0}, "shard 1, rows from 0": {"faulty_documents": 2.0}}}


def row(monkeypatch, others: list[dict], steps: int = 4) -> dict[str, float]:
    """The row of this process beside others, which differ in these fields."""
    monkeypatch.setattr(interval, "gather", lambda own: [own, *({**own, **other} for other in others)])
    made, batches = Interval(FLOPS), Batches()
    for _ in range(steps):
        made.next_batch(batches)
    return made.finish()


def test_counts_are_summed_and_times_are_the_slowest_s(monkeypatch):
    found = row(monkeypatch, [SAME | {"seconds": 8.0, "wait": 6.0}, OTHER | {"seconds": 7.0, "wait": 1.0}])
    expected = {
        "tokens_per_s": (400 + 200) / 8.0,
        "images_per_s": 2 * 4 * 4 / 8.0,
        "documents": 20.0,
        "documents_web": 12.0,
        "faulty_documents": 4.0 + 1.0 + 2.0,  # so far, not a mean over steps
        "pad_fraction": 1 - 600 / 1600,
        "slot_occupancy": 0.25,
        "step_ms": 2000.0,
        "input_wait_ms": 1500.0,
        "compute_ms": 500.0,
        "slowest_process": 1.0,
        "model_gflop_per_s": 10.0 * 4 / 8,
        "useful_gflop_per_s": (6 * 0.25 + 4 * 600 / 1600) * 4 / 8,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_a_single_process_has_no_slowest_one(monkeypatch):
    found = row(monkeypatch, [])
    assert "slowest_process" not in found
    assert not {"mfu", "useful_mfu", "memory_gb"} & set(found), "this device's peak and memory are not known"


def test_shares_of_the_peak_and_of_memory(monkeypatch):
    monkeypatch.setattr(interval, "peak_flops", lambda kind: 100e9)
    found = row(monkeypatch, [{"seconds": 8.0, "memory": (12e9, 16e9)}, {"memory": (9e9, 16e9)}])
    assert found["mfu"] * interval.jax.device_count() == pytest.approx(5e9 / 100e9)
    assert found["useful_mfu"] / found["mfu"] == pytest.approx(0.35)
    assert (found["memory_gb"], found["memory_share"]) == (12.0, 0.75)
