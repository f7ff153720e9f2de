"""Scores of held-out images while a model learns."""

import numpy as np
import pytest

from emu_jax.cli import main
from emu_jax.evaluate.quickstart import held_out
from emu_jax.evaluate.quickstart.captions import score
from emu_jax.evaluate.quickstart.held_out import CAPTION, CLOSEST, SPLIT, HeldOut
from emu_jax.generate.model import Emu
from emu_jax.workdir import read_metrics
from tests.train import tiny


def test_scores_are_those_of_the_report(trained, monkeypatch, capsys):
    """Of a whole split, the captions are scored as in the report; images are searched in the sample, not in all."""
    model = Emu.load(trained)
    monkeypatch.setattr(held_out, "SAMPLE", 140)
    seen = HeldOut(model.config, model.tokenizer)(7, model.params, model.statistics)
    scores = seen.numbers
    report = score(model, [SPLIT])
    assert scores[CAPTION] == report.figures[f"{SPLIT}: caption exactly right"].value
    right = np.array([answer.rank == 0 for answer in report.answers])
    assert scores[CLOSEST] >= right.mean(), "a sample of the images has fewer rivals than all of them"
    ranks = seen.histograms["held_out_ranks"]
    assert len(ranks) == 140 and (ranks == 0).mean() == scores[CLOSEST]
    assert seen.images["held_out_captions"].shape[1:] == (720, 3), "six images of 1.5 inches at 80 dots an inch"
    assert capsys.readouterr().out.startswith("step 7: ")


@pytest.mark.long
def test_a_run_has_rows_of_them(documents, tmp_path):
    words = [f"--config.data.source={documents}", "--config.train.steps=3", "--config.train.log_every=2"]
    assert main(["train", "--config", tiny.__file__, "--workdir", str(tmp_path), "--score-every", "2", *words]) == 0
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if CAPTION in row and CLOSEST in row] == [2, 3]
    goodput = read_metrics(tmp_path / "goodput.jsonl")[-1]
    assert goodput["scoring_s"] > 0


@pytest.mark.parametrize("every", ["-1", "x"])
def test_an_interval_that_cannot_be(every, tmp_path, capsys):
    try:
        code = main(["train", "--config", tiny.__file__, "--workdir", str(tmp_path), f"--score-every={every}"])
    except SystemExit as error:
        code = error.code
    assert code == 2 and "score" in capsys.readouterr().err


def test_a_decoder_names_nothing(tmp_path, capsys):
    words = ["--config", "configs/vae.py", "--workdir", str(tmp_path), "--score-every", "2", "--config.train.steps=2"]
    assert main(["train", *words]) == 2
    assert "this run trains vae" in capsys.readouterr().err
