"""The whole evaluation of a model that has learnt nothing: figures at chance, and a page that stands alone."""

import json
import re

import pytest

from emu_jax.cli import main
from emu_jax.data.fluent_emoji import SPLITS


@pytest.fixture(scope="module")
def report(trained, tmp_path_factory):
    """(report.html, scores.json) of two steps of training."""
    out = tmp_path_factory.mktemp("report")
    assert main(["evaluate", "--model", str(trained), "--out", str(out)]) == 0
    return (out / "report.html").read_text(encoding="utf-8"), json.loads((out / "scores.json").read_text())


def test_every_figure_has_an_interval_and_chance(report):
    _, scores = report
    figures = scores["figures"]
    for split in SPLITS:
        for name in (
            "caption exactly right",
            "embeddings from text, right image in top 1",
            "embeddings from text, right image in top 5",
            "embeddings from text, autoregressive R2",
        ):
            figure = figures[f"{split}: {name}"]
            low, high = figure["interval"]
            assert low <= figure["value"] <= high, name
            assert figure["count"] >= 40
    assert scores["gallery"] == 3372


def test_an_untrained_model_scores_chance(report):
    _, scores = report
    for name, figure in scores["figures"].items():
        if "exactly" in name or "top" in name:
            assert figure["value"] < 0.05, name


def test_the_page_needs_no_other_file(report):
    page, _ = report
    assert page.startswith("<!doctype html>")
    assert set(re.findall(r'src="(.{5})', page)) == {"data:"}
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", page)
