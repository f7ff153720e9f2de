"""Compares runs: the differences between their configs, and their scores.

In: work directories with config.json, metrics.jsonl and, after `emu-jax evaluate`, scores.json. Out: a `Comparison`, in
which runs whose configs differ only in train.seed form a group, with means over its seeds. Written as `compare.json`
and `compare.png`, printed as a table of text or Markdown.

A run initialised from another one (`config.init`) is identified by that run's config, whatever its seed, not its path.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from scipy.special import stdtrit

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from emu_jax.errors import UserError, nearest
from emu_jax.models.paths import flatten
from emu_jax.storage import Path, absolute, as_path, read_json_object, replace_text, write_atomically
from emu_jax.workdir import CONFIG_FILE, METRICS_FILE, OBSERVING, read_metrics

SEED = "train.seed"
WRITTEN = "the config that `emu-jax train` wrote"
LOSSES = ("text_loss", "regression_loss")
# The default figures: names in scores.json or, as "last …", in metrics.jsonl.
FIGURES = (
    "heldout_combinations: caption exactly right",
    "heldout_combinations: embeddings from text, right image in top 5",
    "heldout_combinations: embeddings from text, autoregressive R2",
    *(f"last {name}" for name in LOSSES),
)
LAST = 0.1  # "last …" is the mean over this share of the logged rows
CURVE_POINTS = 30  # in the plot of a loss
STAR = "*"


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over runs: values by run (None: missing), 95% interval by Student's t (None: fewer than two values).

    `difference` is from the first group's mean, its interval by Welch's t; None for the first group itself.
    """

    values: tuple[float | None, ...]
    mean: float | None
    interval: tuple[float, float] | None
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None

    @property
    def differs(self) -> bool:
        """Whether the interval of the difference excludes 0."""
        return self.difference_interval is not None and not (
            self.difference_interval[0] <= 0 <= self.difference_interval[1]
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """One work directory: its config by dotted field, its seed, its last logged step, its rows and its figures."""

    path: Path
    config: Mapping[str, Any]
    key: str  # equal for runs that differ only in their seeds
    seed: int
    step: int
    rows: Sequence[Mapping[str, float]]
    figures: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one config. `fields`: its differences from the first group's config, as (first group's, this group's)."""

    name: str
    runs: tuple[Run, ...]
    fields: Mapping[str, tuple[Any, Any]]
    figures: Mapping[str, Mean]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Groups in the order in which their first runs were named; the others are compared with the first."""

    figures: tuple[str, ...]
    groups: tuple[Group, ...]


# ---------------------------------------------------------------- reading


def compare(paths: Sequence[Path], figures: Sequence[str] = ()) -> Comparison:
    """Reads work directories and groups them.

    Args:
      figures: names as in scores.json, or "last <name>" of metrics.jsonl (default: those of `FIGURES` that exist).

    Raises:
      UserError: fewer than two runs, one that cannot be read, the same config and seed twice, or an unknown figure.
    """
    if len(paths) < 2:
        raise UserError(f"{' '.join(map(str, paths))}: only one run; expected two work directories or more")
    runs = [read_run(path) for path in paths]
    members: dict[str, list[Run]] = {}
    for run in runs:
        for other in members.setdefault(run.key, []):
            if other.seed == run.seed:
                raise UserError(
                    f"{run.path}: has the config and the seed {run.seed} of {other.path}; name each run once"
                )
        members[run.key].append(run)
    known = dict.fromkeys(name for run in runs for name in run.figures)
    for name in figures:
        if name not in known:
            raise UserError(f"figure {name!r}: no run has it; did you mean {nearest(name, known)}?")
    shown = tuple(figures) or tuple(name for name in FIGURES if name in known)
    if not shown:
        raise UserError(f"{paths[0]} and the others: nothing to compare; run `emu-jax evaluate --model RUN` on each")
    first, *_ = members.values()
    names = _names(list(members.values()))
    groups = []
    for name, some in zip(names, members.values(), strict=True):
        means = {}
        for figure in shown:
            base = None if some is first else [run.figures.get(figure) for run in first]
            means[figure] = mean_over([run.figures.get(figure) for run in some], base)
        groups.append(Group(name, tuple(some), differing(first[0].config, some[0].config), means))
    return Comparison(shown, tuple(groups))


def read_run(path: Path) -> Run:
    """Reads one work directory."""
    file = path / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{path}: no {CONFIG_FILE} in it; expected a work directory of `emu-jax train`")
    config = _flat(read_json_object(file, WRITTEN))
    if not isinstance(config.get(SEED), int):
        raise UserError(f"{file}: has no {SEED}; expected {WRITTEN}")
    rows = read_metrics(path / METRICS_FILE) if (path / METRICS_FILE).is_file() else []
    figures: dict[str, float] = {}
    if (scores := path / "scores.json").is_file():
        entries: Any = read_json_object(scores, "what `emu-jax evaluate` wrote").get("figures")
        try:
            figures = {name: float(entry["value"]) for name, entry in entries.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{scores}: holds no figures; expected what `emu-jax evaluate` wrote") from error
    for name in LOSSES:
        values = [row[name] for row in rows[-max(1, round(LAST * len(rows))) :] if name in row]
        figures |= {f"last {name}": sum(values) / len(values)} if values else {}
    step = int(rows[-1]["step"]) if rows else 0
    return Run(path, config, _key(config), config[SEED], step, rows, figures)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted field, without the fields that change no result."""
    fields = {name.replace("/", "."): value for name, value in flatten(config).items()}
    return {name: value for name, value in fields.items() if not _observes(name)}


def _observes(name: str) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in OBSERVING)


def _key(config: Mapping[str, Any]) -> str:
    """Identifies a config up to its seed, and up to the seeds of the runs that it was initialised from."""

    def meaning(name: str, value: Any) -> Any:
        if name.startswith("init.") and value and (file := as_path(value) / CONFIG_FILE).is_file():
            return _key(_flat(read_json_object(file, WRITTEN)))
        return value

    return json.dumps({name: meaning(name, config[name]) for name in sorted(config) if name != SEED})


def differing(first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted fields, except the seed, that differ between two configs, as (in the first, in the other)."""
    names = sorted((first.keys() | other.keys()) - {SEED})
    return {n: (first.get(n), other.get(n)) for n in names if first.get(n) != other.get(n)}


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Names of groups: their folders' names without seeds (base-0 and base-1 are `base`)."""
    names = []
    for runs in groups:
        folders = [absolute(run.path).name for run in runs]
        plain = {name.removesuffix(str(run.seed)).rstrip("-_.") for name, run in zip(folders, runs, strict=True)}
        names.append((plain.pop() if len(plain) == 1 else "") or folders[0])
    return [name if names.count(name) == 1 else str(runs[0].path) for name, runs in zip(names, groups, strict=True)]


# ---------------------------------------------------------------- statistics


def mean_over(values: Sequence[float | None], base: Sequence[float | None] | None = None) -> Mean:
    """Mean of the values that are not None, and its difference from the mean of `base`."""
    known = np.array([value for value in values if value is not None], np.float64)
    if not len(known):
        return Mean(tuple(values), None, None)
    mean, variance = float(known.mean()), _variance_of_mean(known)
    interval = None if variance is None else _interval(mean, variance, len(known) - 1)
    other = np.array([value for value in base or () if value is not None], np.float64)
    if not len(other):
        return Mean(tuple(values), mean, interval)
    difference, other_variance = mean - float(other.mean()), _variance_of_mean(other)
    if variance is None or other_variance is None:
        return Mean(tuple(values), mean, interval, difference)
    total = variance + other_variance
    parts = variance**2 / (len(known) - 1) + other_variance**2 / (len(other) - 1)
    freedom = total**2 / parts if parts else 1.0  # Welch's; with zero variance the interval is a point
    return Mean(tuple(values), mean, interval, difference, _interval(difference, total, freedom))


def _variance_of_mean(values: np.ndarray) -> float | None:
    return float(values.var(ddof=1) / len(values)) if len(values) > 1 else None


def _interval(centre: float, variance: float, freedom: float) -> tuple[float, float]:
    spread = float(stdtrit(freedom, 0.975)) * math.sqrt(variance)
    return centre - spread, centre + spread


# ---------------------------------------------------------------- writing


def table(comparison: Comparison, *, markdown: bool = False) -> str:
    """Means with intervals, one line for each group; then the figures' names, and the fields that differ."""
    letters = [chr(ord("A") + i % 26) * (1 + i // 26) for i in range(len(comparison.figures))]
    head = ["", "seeds", "steps", *(comparison.figures if markdown else letters)]
    lines = [head]
    for group in comparison.groups:
        steps = sorted({run.step for run in group.runs})
        cells = [group.name, str(len(group.runs)), "-".join(f"{s:,}" for s in dict.fromkeys((steps[0], steps[-1])))]
        lines.append(cells + [_cell(group.figures[figure], markdown) for figure in comparison.figures])
    first = comparison.groups[0].name
    fields = [
        f"{group.name}: " + (", ".join(f"{n} {b} ({first}: {a})" for n, (a, b) in group.fields.items()) or "as it is")
        for group in comparison.groups[1:]
    ]
    note = (
        f"means over seeds with 95% intervals by Student's t; {STAR}: the interval of the difference from {first} by "
        "Welch's t leaves out 0"
    )
    if markdown:
        note = note.replace(STAR, f"\\{STAR}")
        rows = [f"| {' | '.join(cells)} |" for cells in lines]
        rows.insert(1, "|" + " --- |" * len(head))
        return "\n".join([*rows, "", note[0].upper() + note[1:] + ".", "", *(f"- {line}" for line in fields)]) + "\n"
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(head))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in lines]
    keys = [f"{letter}  {figure}" for letter, figure in zip(letters, comparison.figures, strict=True)]
    return "\n".join([*rows, "", *keys, "", note, "", *fields]) + "\n"


def _cell(mean: Mean, markdown: bool) -> str:
    if mean.mean is None:
        return "-"
    value = f"{mean.mean:.3f}"
    mark = (f"\\{STAR}" if markdown else STAR) if mean.differs else ""
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
            "runs": [{"path": str(run.path), "seed": run.seed, "step": run.step} for run in group.runs],
            "differs": {name: list(pair) for name, pair in group.fields.items()},
            "figures": {name: dataclasses.asdict(mean) for name, mean in group.figures.items()},
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
