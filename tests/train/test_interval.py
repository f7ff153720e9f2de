"""Figures of all processes between two logged steps."""

import pytest

from emu_jax.train import interval
from emu_jax.train.interval import Interval

FLOPS = {"vision": 6e9, "llama": 4e9}
COUNTS = {"tokens": 100.0, "images": 4.0, "documents": 10.0, "documents_web": 6.0}
ONE = COUNTS | {"pad_fraction": 0.5, "slot_occupancy": 0.25}


class Batches:
    """A stream of described batches: `faulty_documents` counts on."""

    def __init__(self):
        self.read = 0

    def __next__(self) -> dict:
        self.read += 1
        return {}

    def describe(self) -> dict[str, float]:
        return ONE | {"faulty_documents": float(self.read)}


def row(monkeypatch, others: list[dict], steps: int = 4) -> dict[str, float]:
    """The row of this process beside others, which differ in these fields."""
    monkeypatch.setattr(interval, "gather", lambda own: [own, *({**own, **other} for other in others)])
    made, batches = Interval(FLOPS), Batches()
    for _ in range(steps):
        made.next_batch(batches)
    return made.finish()


def test_counts_are_summed_and_times_are_the_slowest_s(monkeypatch):
    found = row(monkeypatch, [{"seconds": 8.0, "wait": 6.0}, {"seconds": 7.0, "wait": 1.0}])
    expected = {
        "tokens_per_s": 3 * 100 * 4 / 8.0,
        "images_per_s": 3 * 4 * 4 / 8.0,
        "documents": 30.0,
        "documents_web": 18.0,
        "faulty_documents": 3 * 4.0,  # so far, not a mean over steps
        "pad_fraction": 0.5,
        "slot_occupancy": 0.25,
        "step_ms": 2000.0,
        "input_wait_ms": 1500.0,
        "compute_ms": 500.0,
        "slowest_process": 1.0,
        "model_gflop_per_s": 10.0 * 4 / 8,
        "useful_gflop_per_s": (6 * 0.25 + 4 * 0.5) * 4 / 8,
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
