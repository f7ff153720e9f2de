"""Runs beside one another: groups by seed, fields that differ, means and intervals, the files, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emu_jax.cli import main
from emu_jax.config import load_config, to_json
from emu_jax.errors import UserError
from emu_jax.evaluate.compare import compare, table

CAPTION = "heldout_combinations: caption exactly right"
TOP5 = "heldout_combinations: embeddings from text, right image in top 5"


def make_run(path: Path, seed: int = 0, *, caption: float | None = None, top5: float = 0.5, **fields) -> Path:
    """A work directory as `emu-jax train` and `evaluate` leave it: config, 20 rows of metrics, scores."""
    path.mkdir(parents=True)
    config = {
        "model": {"regression_loss_weight": 4.0, "causal": {"kind": "causal"}},
        "init": {"vision": ""},
        "train": {"seed": seed, "steps": 200, "log_every": 10, "mesh": {"fsdp": -1}},
    }
    for name, value in fields.items():
        group, *rest = name.split("__")
        node = config[group]
        for part in rest[:-1]:
            node = node[part]
        node[rest[-1]] = value
    (path / "config.json").write_text(json.dumps(config))
    rows = [{"step": 10 * (i + 1), "text_loss": 20.0 - i, "regression_loss": 0.5} for i in range(20)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if caption is not None:
        figures = {CAPTION: caption, TOP5: top5}
        entries = {name: {"value": v, "interval": [0, 1], "chance": 0.1, "count": 140} for name, v in figures.items()}
        (path / "scores.json").write_text(json.dumps({"figures": entries, "gallery": 9}))
    return path


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Two configs with three seeds each, the second without regression and logged more often."""
    paths = [make_run(tmp_path / f"base-{seed}", seed, caption=c) for seed, c in enumerate((0.2, 0.3, 0.4))]
    other = {"model__regression_loss_weight": 0.0, "train__log_every": 5}
    paths += [make_run(tmp_path / f"none-{s}", s, caption=c, **other) for s, c in enumerate((0.7, 0.8, 0.9))]
    return paths


def test_groups_by_seed(runs):
    found = compare([runs[0], runs[3], runs[1], runs[4], runs[2], runs[5]])
    assert [(group.name, [run.seeds[0] for run in group.runs]) for group in found.groups] == [
        ("base", [0, 1, 2]),
        ("none", [0, 1, 2]),
    ]
    assert found.groups[0].fields == {}
    # How often a run logs is no difference.
    assert found.groups[1].fields == {"model.regression_loss_weight": (4.0, 0.0)}
    # The last tenth of 20 rows: losses 2 and 1.
    assert found.groups[0].figures["last text_loss"].values == (1.5, 1.5, 1.5)


def test_the_table(runs):
    assert table(compare(runs, [CAPTION])) == (
        "      seeds  steps  A\n"
        "base  3      200    0.300 (0.052 to 0.548)\n"
        "none  3      200    0.800* (0.552 to 1.048)\n"
        "\n"
        f"A  {CAPTION}: differences from 0.000 on are found with 80% power\n"
        "\n"
        "means over seeds with 95% intervals by Student's t; *: differs from base by a t test, paired by seed, at 5% "
        "for the whole table (Holm, 1 tests)\n"
        "\n"
        "none: model.regression_loss_weight 0.0 (base: 4.0)\n"
    )


def test_the_command_writes_files(runs, tmp_path, capsys):
    out = tmp_path / "out"
    names = [str(run) for run in runs]
    assert main(["compare", *names, "--out", str(out), "--markdown", "--figures", CAPTION, "last text_loss"]) == 0
    printed = capsys.readouterr().out
    assert f"none  3      200    0.800* (0.552 to 1.048)  1.500 (1.500 to 1.500)\n\nA  {CAPTION}: " in printed
    assert sorted(path.name for path in out.iterdir()) == ["compare.json", "compare.md", "compare.png"]
    found = json.loads((out / "compare.json").read_text())
    assert found["compared_with"] == "base"
    assert found["groups"][1]["differs"] == {"model.regression_loss_weight": [4.0, 0.0]}
    assert found["groups"][1]["figures"][CAPTION]["values"] == [0.7, 0.8, 0.9]
    assert found["groups"][1]["runs"][2] == {"path": names[5], "seeds": [2, 0], "step": 200}
    assert found["groups"][1]["differences"][CAPTION]["differs"] is True
    assert "| none | 3 | 200 | 0.800\\* (0.552 to 1.048) | 1.500 (1.500 to 1.500) |" in (out / "compare.md").read_text()
    pixels = np.asarray(Image.open(out / "compare.png").convert("L"))
    assert min(pixels.shape) > 200 and pixels.std() > 5


def test_seeds_of_weights_and_of_data_are_told_apart(tmp_path):
    """Captions 0.3 higher by the data's seed, 0.02 by that of the weights."""
    paths = []
    for data in range(2):
        for weights in range(2):
            path = make_run(tmp_path / f"run-{weights}{data}", weights, caption=0.2 + 0.3 * data + 0.02 * weights)
            config = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps(config | {"data": {"seed": data}}))
            paths.append(path)
    (group,) = compare(paths, [CAPTION]).groups
    assert [run.seeds for run in group.runs] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert group.spreads[CAPTION] == pytest.approx((0.02 / 2**0.5, 0.3 / 2**0.5))
    assert "standard deviation 0.014 over initial weights, 0.212 over the data's order" in table(compare(paths))


def test_benchmarks_and_held_out_losses_are_figures_too(runs):
    for run, score in zip(runs, (1.0, 1.1, 1.2, 0.9, 1.0, 1.1), strict=True):
        folder = run / "benchmarks" / "coco-test-0shot"
        folder.mkdir(parents=True)
        figures = {"CIDEr": {"value": score, "interval": [0, 2], "chance": None, "count": 5000}}
        (folder / "scores.json").write_text(json.dumps({"figures": figures}))
        with (run / "metrics.jsonl").open("a") as metrics:
            for step, loss in ((150, 3.0), (200, 2.0 + score)):
                metrics.write(json.dumps({"step": step, "held_out_text_loss": loss}) + "\n")
    base, other = compare(runs, ["coco-test-0shot: CIDEr", "last held_out_text_loss"]).groups
    assert base.figures["coco-test-0shot: CIDEr"].values == (1.0, 1.1, 1.2)
    assert other.figures["last held_out_text_loss"].mean == pytest.approx(3.0)
    assert other.differences["coco-test-0shot: CIDEr"].value == pytest.approx(-0.1)


def test_the_paper_s_row(tmp_path, capsys):
    """The ablation at the paper's size, from its configs and its three benchmarks, as the paper prints it."""
    published = {
        "coco-test-0shot: CIDEr": (1.129, 1.108),
        "msvdqa-test-0shot: accuracy": (0.179, 0.169),
        "msrvttqa-test-4shot: accuracy": (0.208, 0.199),
    }
    for number, name in enumerate(("base", "no_storyboards")):
        run = tmp_path / f"{name}-0"
        run.mkdir()
        (run / "config.json").write_text(to_json(load_config(f"configs/ablations/{name}.py:7b")))
        for figure, values in published.items():
            benchmark, score = figure.split(": ")
            entry = {"value": values[number], "interval": [0, 2], "chance": None, "count": 5000, "paper_scale": 100.0}
            folder = run / "benchmarks" / benchmark
            folder.mkdir(parents=True)
            (folder / "scores.json").write_text(json.dumps({"figures": {score: entry}}))
    runs = [str(tmp_path / name) for name in ("base-0", "no_storyboards-0")]
    assert main(["compare", *runs, "--figures", *published, "--out", str(tmp_path / "out"), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[3:] for line in lines[1:3]}
    assert rows == {"base": ["112.900", "17.900", "20.800"], "no_storyboards": ["110.800", "16.900", "19.900"]}
    fields = "no_storyboards: data.mixture.storyboard.weight 0.0 (base: 16.0)"
    assert fields in lines, "\n".join(lines)


def test_runs_without_scores_are_compared_by_their_losses(tmp_path):
    found = compare([make_run(tmp_path / "a"), make_run(tmp_path / "b", model__causal__kind="pooled")])
    assert found.figures == ("last text_loss", "last regression_loss")
    assert [group.name for group in found.groups] == ["a", "b"]
    assert "b  1      200    1.500  0.500\n" in table(found)


def test_a_run_that_has_no_score_yet_leaves_a_gap(tmp_path):
    paths = [make_run(tmp_path / "a-0", caption=0.5), make_run(tmp_path / "b-0", model__causal__kind="pooled")]
    assert "b  1      200    -\n" in table(compare(paths, [CAPTION]))


def test_what_a_run_began_with_is_told_by_its_config(runs, tmp_path):
    """Frozen encoders of three seeds of the base are one group; one of another config is another."""
    frozen = [make_run(tmp_path / f"frozen-{s}", s, caption=0.5, init__vision=str(runs[s])) for s in range(3)]
    other = make_run(tmp_path / "frozen-none", 3, caption=0.5, init__vision=str(runs[3]))
    gone = make_run(tmp_path / "frozen-gone", 3, caption=0.5, init__vision="not there")
    found = compare([*runs[:3], *frozen, other, gone])
    assert [(group.name, len(group.runs)) for group in found.groups] == [
        ("base", 3),
        ("frozen", 3),
        ("frozen-none", 1),
        ("frozen-gone", 1),
    ]
    assert found.groups[1].fields == {"init.vision": ("", str(runs[0]))}


def test_groups_of_one_name_are_told_by_their_paths(tmp_path):
    paths = [make_run(tmp_path / "x" / "run-0"), make_run(tmp_path / "y" / "run-0", model__causal__kind="pooled")]
    assert [group.name for group in compare(paths).groups] == [str(path) for path in paths]


def broken(path: Path, **texts: str) -> Path:
    path.mkdir()
    for name, text in texts.items():
        (path / f"{name}.json").write_text(text)
    return path


GOOD = '{"train": {"seed": 1}}'


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, r"bad: no config\.json in it; expected a work directory of `emu-jax train`"),
        (
            {"config": '{"train": {'},
            r"bad/config\.json: not JSON \(.*\); expected the config that `emu-jax train` wrote",
        ),
        ({"config": "[1]"}, r"bad/config\.json: not a JSON object; expected the config that"),
        ({"config": '{"train": {"steps": 1}}'}, r"bad/config\.json: has no train\.seed; expected the config that"),
        (
            {"config": GOOD, "scores": "{}"},
            r"bad/scores\.json: holds no figures; expected what `emu-jax evaluate`",
        ),
        ({"config": GOOD, "scores": '{"figures": {"a": {"value": "x"}}}'}, r"bad/scores\.json: holds no figures"),
    ],
)
def test_runs_that_cannot_be_read(runs, tmp_path, texts, message):
    with pytest.raises(UserError, match=message):
        compare([runs[0], broken(tmp_path / "bad", **texts)])


def test_what_is_refused(runs, tmp_path, capsys):
    again = make_run(tmp_path / "again", 1)
    bare = [broken(tmp_path / f"bare-{i}", config=f'{{"train": {{"seed": {i}}}}}') for i in range(2)]
    file = tmp_path / "file"
    file.touch()
    cases = [
        ([runs[0]], [], f"{runs[0]}: only one run; expected two work directories or more"),
        ([runs[1], again], [], f"{again}: has the config and the seed 1 of {runs[1]}; name each run once"),
        (runs, ["--figures", "captions"], "figure 'captions': no run has it; did you mean "),
        (bare, [], f"{bare[0]} and the others: nothing to compare; run `emu-jax evaluate --model RUN` on each"),
        (runs, ["--out", str(file)], f"{file}: cannot be written (File exists); name another folder"),
    ]
    for paths, words, expected in cases:
        assert main(["compare", *map(str, paths), "--out", str(tmp_path / "out"), *words]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"emu-jax compare: {expected}"), lines
    assert not (tmp_path / "out").exists()
