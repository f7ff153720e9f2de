"""Compares runs: the differences between their configs, and their scores.

In: work directories with config.json, metrics.jsonl and, after `emu-jax evaluate`, scores.json and
benchmarks/*/scores.json. Out: a `Comparison`, in which runs whose configs differ only in their seeds form a group, with
means over its seeds, and differences from the first group (`differences.py`). Written as `compare.json` and
`compare.png`, printed as a table of text or Markdown.

A run initialised from another one (`config.init`) is identified by that run's config, whatever its seed, not its path.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from emu_jax.errors import UserError, nearest
from emu_jax.evaluate.differences import POWER, Difference, Mean, corrected, difference, mean_over, spreads
from emu_jax.models.paths import flatten
from emu_jax.storage import Path, absolute, as_path, read_json_object, replace_text, write_atomically
from emu_jax.workdir import CONFIG_FILE, METRICS_FILE, OBSERVING, read_metrics

SEED, DATA_SEED = "train.seed", "data.seed"
WRITTEN = "the config that `emu-jax train` wrote"
LOSSES = ("text_loss", "regression_loss")
# The default figures: names in scores.json or, as "last …", in metrics.jsonl.
FIGURES = (
    "heldout_combinations: caption exactly right",
    "heldout_combinations: embeddings from text, right image in top 5",
    "heldout_combinations: embeddings from text, autoregressive R2",
    # Only a fixed space compares models whose embeddings differ (`quickstart/fixed_space.py`).
    "heldout_combinations: embeddings from text in emu-mini's space, right image in top 5",
    "heldout_combinations: embeddings from text in emu-mini's space, R2",
    "heldout_combinations: embeddings of images in emu-mini's space, R2",
    *(f"last {name}" for name in LOSSES),
)
HELD_OUT = "held_out_"  # metrics of evaluations while a run trains: "last …" is their last value
LAST = 0.1  # "last …" of a training loss is the mean over this share of the logged rows
CURVE_POINTS = 30  # in the plot of a loss
STAR = "*"
SEEDS = (SEED, DATA_SEED)
BENCHMARKS = "benchmarks"  # where `evaluate --benchmark` writes in a work directory


@dataclasses.dataclass(frozen=True)
class Run:
    """One work directory: its config by dotted field, its seeds, its last logged step, its rows and its figures.

    Attributes:
      key: equal for runs that differ only in their seeds.
      seeds: train.seed (initial weights) and data.seed (order of the data).
    """

    path: Path
    config: Mapping[str, Any]
    key: str
    seeds: tuple[int, int]
    step: int
    rows: Sequence[Mapping[str, float]]
    figures: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one config.

    Attributes:
      fields: differences from the first group's config, as (first group's, this group's).
      figures: means over seeds.
      differences: from the first group's figures; {} for the first group itself, None where there are too few values.
      spreads: standard deviations over initial weights and over the data's order, where both seeds vary on their own.
    """

    name: str
    runs: tuple[Run, ...]
    fields: Mapping[str, tuple[Any, Any]]
    figures: Mapping[str, Mean]
    differences: Mapping[str, Difference | None]
    spreads: Mapping[str, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Groups in the order in which their first runs were named; the others are compared with the first."""

    figures: tuple[str, ...]
    groups: tuple[Group, ...]


# ---------------------------------------------------------------- reading


def compare(paths: Sequence[Path], figures: Sequence[str] = ()) -> Comparison:
    """Reads work directories and groups them.

    Args:
      figures: names as in scores.json, "<run>: <name>" of benchmarks/<run>/scores.json (on the scale of papers), or
        "last <name>" of metrics.jsonl (default: those of `FIGURES` that exist).

    Raises:
      UserError: fewer than two runs, one that cannot be read, the same config and seed twice, or an unknown figure.
    """
    if len(paths) < 2:
        raise UserError(f"{' '.join(map(str, paths))}: only one run; expected two work directories or more")
    runs = [read_run(path) for path in paths]
    members: dict[str, list[Run]] = {}
    for run in runs:
        for other in members.setdefault(run.key, []):
            if other.seeds == run.seeds:
                raise UserError(
                    f"{run.path}: has the config and the seed {run.seeds[0]} of {other.path}; name each run once"
                )
        members[run.key].append(run)
    known = dict.fromkeys(name for run in runs for name in run.figures)
    for name in figures:
        if name not in known:
            raise UserError(f"figure {name!r}: no run has it; did you mean {nearest(name, known)}?")
    shown = tuple(figures) or tuple(name for name in FIGURES if name in known)
    if not shown:
        raise UserError(f"{paths[0]} and the others: nothing to compare; run `emu-jax evaluate --model RUN` on each")
    first, *others = members.values()
    tests = [difference(_by_seed(some, figure), _by_seed(first, figure)) for some in others for figure in shown]
    found = iter(corrected(tests))
    groups = []
    for name, some in zip(_names(list(members.values())), members.values(), strict=True):
        groups.append(
            Group(
                name,
                tuple(some),
                differing(first[0].config, some[0].config),
                {figure: mean_over([run.figures.get(figure) for run in some]) for figure in shown},
                {} if some is first else {figure: next(found) for figure in shown},
                {figure: s for figure in shown if (s := spreads(_by_seed(some, figure))) is not None},
            )
        )
    return Comparison(shown, tuple(groups))


def _by_seed(runs: Sequence[Run], figure: str) -> dict[tuple[int, int], float]:
    return {run.seeds: run.figures[figure] for run in runs if figure in run.figures}


def read_run(path: Path) -> Run:
    """Reads one work directory."""
    file = path / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{path}: no {CONFIG_FILE} in it; expected a work directory of `emu-jax train`")
    config = _flat(read_json_object(file, WRITTEN))
    if not isinstance(config.get(SEED), int):
        raise UserError(f"{file}: has no {SEED}; expected {WRITTEN}")
    rows = read_metrics(path / METRICS_FILE) if (path / METRICS_FILE).is_file() else []
    figures = _scores(path / "scores.json") if (path / "scores.json").is_file() else {}
    for folder in sorted((path / BENCHMARKS).iterdir()) if (path / BENCHMARKS).is_dir() else ():
        if (folder / "scores.json").is_file():
            scores = _scores(folder / "scores.json", papers=True)
            figures |= {f"{folder.name}: {name}": value for name, value in scores.items()}
    for name in LOSSES:
        values = [row[name] for row in rows[-max(1, round(LAST * len(rows))) :] if name in row]
        figures |= {f"last {name}": sum(values) / len(values)} if values else {}
    figures |= {f"last {name}": row[name] for row in rows for name in row if name.startswith(HELD_OUT)}
    step = int(rows[-1]["step"]) if rows else 0
    seeds = config[SEED], int(config.get(DATA_SEED) or 0)
    return Run(path, config, _key(config), seeds, step, rows, figures)


def _scores(file: Path, *, papers: bool = False) -> dict[str, float]:
    """Figures of a scores.json, on the scale of papers if asked."""
    entries: Any = read_json_object(file, "what `emu-jax evaluate` wrote").get("figures")
    try:
        scales = {name: float(entry.get("paper_scale", 1)) if papers else 1.0 for name, entry in entries.items()}
        return {name: scales[name] * float(entry["value"]) for name, entry in entries.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: holds no figures; expected what `emu-jax evaluate` wrote") from error


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted field, without the fields that change no result."""
    fields = {name.replace("/", "."): value for name, value in flatten(config).items()}
    return {name: value for name, value in fields.items() if not _observes(name)}


def _observes(name: str) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in OBSERVING)


def _key(config: Mapping[str, Any]) -> str:
    """Identifies a config up to its seeds, and up to those of the runs that it was initialised from."""

    def meaning(name: str, value: Any) -> Any:
        if name.startswith("init.") and value and (file := as_path(value) / CONFIG_FILE).is_file():
            return _key(_flat(read_json_object(file, WRITTEN)))
        return value

    return json.dumps({name: meaning(name, config[name]) for name in sorted(config) if name not in SEEDS})


def differing(first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted fields, except seeds, that differ between two configs, as (in the first, in the other)."""
    names = sorted((first.keys() | other.keys()) - {*SEEDS})
    return {n: (first.get(n), other.get(n)) for n in names if first.get(n) != other.get(n)}


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Names of groups: their folders' names without seeds (base-0 and base-1 are `base`)."""
    names = []
    for runs in groups:
        folders = [absolute(run.path).name for run in runs]
        plain = {name.removesuffix(str(run.seeds[0])).rstrip("-_.") for name, run in zip(folders, runs, strict=True)}
        names.append((plain.pop() if len(plain) == 1 else "") or folders[0])
    return [name if names.count(name) == 1 else str(runs[0].path) for name, runs in zip(names, groups, strict=True)]


# ---------------------------------------------------------------- writing


def table(comparison: Comparison, *, markdown: bool = False) -> str:
    """Means with intervals, one line for each group; then the figures' names, and the fields that differ."""
    letters = [chr(ord("A") + i % 26) * (1 + i // 26) for i in range(len(comparison.figures))]
    head = ["", "seeds", "steps", *(comparison.figures if markdown else letters)]
    lines = [head]
    for group in comparison.groups:
        steps = sorted({run.step for run in group.runs})
        cells = [group.name, str(len(group.runs)), "-".join(f"{s:,}" for s in dict.fromkeys((steps[0], steps[-1])))]
        lines.append(cells + [_cell(group, figure, markdown) for figure in comparison.figures])
    first = comparison.groups[0].name
    fields = [
        f"{group.name}: " + (", ".join(f"{n} {b} ({first}: {a})" for n, (a, b) in group.fields.items()) or "as it is")
        for group in comparison.groups[1:]
    ]
    for group in comparison.groups:
        fields += [
            f"{group.name}, {figure}: standard deviation {weights:.3f} over initial weights, {data:.3f} over the "
            "data's order"
            for figure, (weights, data) in group.spreads.items()
        ]
    tests = [found for group in comparison.groups for found in group.differences.values() if found is not None]
    note = "means over seeds with 95% intervals by Student's t"
    if tests:
        how = {True: "paired by seed", False: "Welch's"}
        kinds = " or ".join(sorted({how[found.paired] for found in tests}, reverse=True))
        note += (
            f"; {STAR}: differs from {first} by a t test, {kinds}, at 5% for the whole table (Holm, {len(tests)} tests)"
        )
    if markdown:
        note = note.replace(STAR, f"\\{STAR}")
        rows = [f"| {' | '.join(cells)} |" for cells in lines]
        rows.insert(1, "|" + " --- |" * len(head))
        power = [f"- {name}{text}" for name in comparison.figures if (text := _found_from(comparison, name))]
        return "\n".join([*rows, "", f"{note[0].upper()}{note[1:]}.", "", *power, *(f"- {x}" for x in fields)]) + "\n"
    labelled = zip(letters, comparison.figures, strict=True)
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(head))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in lines]
    keys = [f"{letter}  {figure}{_found_from(comparison, figure)}" for letter, figure in labelled]
    return "\n".join([*rows, "", *keys, "", note, "", *fields]) + "\n"


def _found_from(comparison: Comparison, figure: str) -> str:
    """What is said of a figure's power: the median over its tests of the difference that they would find."""
    tests = [group.differences.get(figure) for group in comparison.groups]
    sizes = [found.detectable for found in tests if found is not None]
    return f": differences from {np.median(sizes):.3f} on are found with {POWER:.0%} power" if sizes else ""


def _cell(group: Group, figure: str, markdown: bool) -> str:
    mean, test = group.figures[figure], group.differences.get(figure)
    if mean.mean is None:
        return "-"
    value = f"{mean.mean:.3f}"
    mark = (f"\\{STAR}" if markdown else STAR) if test is not None and test.differs else ""
    low, high = mean.interval or (None, None)
    return value + mark + ("" if low is None else f" ({low:.3f} to {high:.3f})")


def write(comparison: Comparison, folder: Path, *, markdown: bool = False) -> list[Path]:
    """Writes compare.json, compare.png and, if asked, compare.md; each completely or not at all."""
    contents = {"compare.json": json.dumps(_to_json(comparison), indent=2) + "\n"}
    if markdown:
        contents["compare.md"] = table(comparison, markdown=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            replace_text(folder / name, text)
        _plot(comparison, folder / "compare.png")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); name another folder") from error
    return [folder / name for name in (*contents, "compare.png")]


def _to_json(comparison: Comparison) -> dict[str, Any]:
    groups = [
        {
            "name": group.name,
            "runs": [{"path": str(run.path), "seeds": list(run.seeds), "step": run.step} for run in group.runs],
            "differs": {name: list(pair) for name, pair in group.fields.items()},
            "figures": {name: dataclasses.asdict(mean) for name, mean in group.figures.items()},
            "differences": {
                name: None if test is None else dataclasses.asdict(test) | {"differs": test.differs}
                for name, test in group.differences.items()
            },
            "spreads": {name: list(pair) for name, pair in group.spreads.items()},
        }
        for group in comparison.groups
    ]
    return {"figures": list(comparison.figures), "compared_with": comparison.groups[0].name, "groups": groups}


def _plot(comparison: Comparison, path: Path) -> None:
    """A panel for each figure: runs as dots, means with intervals; below, the losses in training."""
    groups, figures = comparison.groups, comparison.figures
    curves = [name for name in LOSSES if any(name in row for g in groups for run in g.runs for row in run.rows)]
    colours = plt.get_cmap("tab20")
    heights = [0.34 * len(groups) + 1.4, max(3.2, 0.18 * len(groups) + 0.6)][: 2 if curves else 1]
    canvas = plt.figure(figsize=(3.4 * max(len(figures), len(curves), 1) + 1.6, sum(heights)), layout="constrained")
    parts = canvas.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis, figure in zip(parts[0].subplots(1, max(len(figures), 1), squeeze=False)[0], figures, strict=False):
        for row, group in enumerate(groups):
            found, colour = group.figures[figure], colours(row % 20)
            known = [value for value in found.values if value is not None]
            axis.plot(known, [row] * len(known), ".", color=colour, alpha=0.6)
            if found.interval is not None:
                axis.plot(found.interval, [row, row], "-", color=colour, linewidth=1.5)
            if found.mean is not None:
                axis.plot([found.mean], [row], "D", color=colour, markersize=5)
        axis.set_yticks(
            range(len(groups)), [group.name for group in groups] if figure == figures[0] else [""] * len(groups)
        )
        axis.set_ylim(len(groups) - 0.5, -0.5)
        axis.set_title(figure.replace(": ", ":\n", 1).replace(", ", ",\n", 1), fontsize=8)
        axis.grid(alpha=0.25, axis="x")
    if curves:
        axes = parts[1].subplots(1, len(curves), squeeze=False)[0]
        for axis, loss in zip(axes, curves, strict=True):
            for number, group in enumerate(groups):
                points = _curve([run.rows for run in group.runs], loss)
                axis.plot(points[:, 0], points[:, 1], color=colours(number % 20), linewidth=1, label=group.name)
            axis.set_title(f"{loss} while training", fontsize=8)
            axis.set_xlabel("step", fontsize=8)
            axis.set_yscale("log")
            axis.grid(alpha=0.25)
        parts[1].legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside right center")
    with write_atomically(path) as partial:
        canvas.savefig(partial, format="png", dpi=110)
    plt.close(canvas)


def _curve(runs: Sequence[Sequence[Mapping[str, float]]], loss: str) -> np.ndarray:
    """A loss by step, averaged over runs and over neighbouring rows: [n, 2], n at most about CURVE_POINTS."""
    by_step: dict[float, list[float]] = {}
    for row in (row for rows in runs for row in rows if loss in row):
        by_step.setdefault(row["step"], []).append(row[loss])
    points = np.array([(step, np.mean(values)) for step, values in sorted(by_step.items())]).reshape(-1, 2)
    pieces = np.array_split(points, max(1, min(len(points), CURVE_POINTS)))
    return np.array([piece.mean(0) for piece in pieces if len(piece)]).reshape(-1, 2)
