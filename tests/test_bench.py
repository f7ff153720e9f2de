"""Timings: one run over everything on the smallest config, figures that follow from each other, peaks of devices."""

import json
from pathlib import Path

import pytest

from emu_jax import bench
from emu_jax.chips import CHIPS
from emu_jax.cli import main
from emu_jax.config import load_config
from emu_jax.models import emu
from emu_jax.models.flops import forward_flops
from tests.train import tiny


@pytest.mark.slow
def test_a_table_of_consistent_figures(documents, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "SAMPLER_STEPS", 3)
    monkeypatch.setattr(bench, "REPETITION_SECONDS", 0.01)
    monkeypatch.setattr(bench, "load_config", lambda spec: tiny.decoder_config(Path(spec)))
    out = tmp_path / "speed.json"
    command = ["bench", "--config", tiny.__file__, f"--config.data.source={documents}"]
    assert main([*command, "--repetitions", "3", "--json", str(out)]) == 0

    _, _, header, *lines = capsys.readouterr().out.splitlines()
    assert header.split("  ")[-1] == "a second"
    assert header.split() == ["median", "ms", "min", "max", "GFLOP/s", "MFU", "GiB", "a", "second"]
    shapes = (
        "8 rows",
        "1 x 32 tokens after 32",
        "8 x 32 tokens after 32",
        "1 of 8 x 8, 3 steps",
        "8 of 8 x 8, 3 steps",
    )
    starts = [
        f"{name:18s}{shape}" for name, shape in zip(("input", *["decode"] * 2, *["draw"] * 2), shapes, strict=True)
    ]
    assert [line.startswith(start) for line, start in zip(lines, [*starts, "train step"], strict=True)] == [True] * 6

    timings = json.loads(out.read_text())["timings"]
    for timing in timings:
        assert len(timing["seconds"]) == 3
        assert min(timing["seconds"]) <= timing["median"] <= max(timing["seconds"])
        assert timing["flops_per_s"] * timing["median"] == pytest.approx(timing["flops"])
        for unit, count in timing["units"].items():
            assert timing["rates"][unit] * timing["median"] == pytest.approx(count)
    assert timings[0]["units"]["rows"] == 8
    assert timings[1]["units"] == {"tokens": 32} and timings[2]["units"] == {"tokens": 256}
    assert timings[2]["flops"] == 8 * timings[1]["flops"]
    assert timings[4]["flops"] == pytest.approx(8 * timings[3]["flops"], rel=0.01)

    # Three forward passes over the batch, of the vocabulary that the tokenizer turned out to have.
    config = load_config(tiny.__file__, [f"--config.data.source={documents}"])
    _, inputs = bench.make_task(config)
    inputs.stream.close()
    model = emu.EmuConfig.from_dict(inputs.config.model)
    assert timings[5]["flops"] == 3 * sum(forward_flops(model, 8 * 8, 8, 64).values())


def test_mfu_needs_a_peak():
    figures = {"name": "train step", "shape": "8 rows", "seconds": (2.0, 1.0, 4.0), "units": {"tokens": 10.0}}
    timing = bench.Timing(**figures, flops=8e12, devices=4, peak_flops=2e12, memory=float(3 << 30))
    assert (timing.median, timing.flops_per_s, timing.mfu) == (2.0, 4e12, 0.5)
    assert bench.describe([timing]).splitlines()[1].split() == [
        *("train", "step", "8", "rows", "2,000.00", "1,000.00", "4,000.00", "4,000.0", "50.0%", "3.00"),
        *("5.0", "tokens"),
    ]
    unknown = bench.Timing(**figures)
    assert bench.describe([unknown]).splitlines()[1].split()[4:] == [
        *("2,000.00", "1,000.00", "4,000.00", "-", "-", "-", "5.0", "tokens")
    ]


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", CHIPS["v4"].flops),
        ("TPU v5 lite", CHIPS["v5e"].flops),
        ("TPU v5", CHIPS["v5p"].flops),
        ("TPU v6 lite", CHIPS["v6e"].flops),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", 0.0),
    ],
)
def test_peaks(kind, peak):
    assert bench.peak_flops(kind) == peak


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--repetitions", "0"), "repetitions=0; expected at least 1"),
        (("--size", "big"), "size=big is unknown; choose one of quickstart, sd15"),
        (("--json", "gone/speed.json"), "--json gone/speed.json: no such folder gone; make it, or name another"),
    ],
)
def test_settings_that_cannot_work(capsys, words, expected):
    assert main(["bench", "--config", tiny.__file__, *words]) == 2
    assert capsys.readouterr().err == f"emu-jax bench: {expected}\n"
