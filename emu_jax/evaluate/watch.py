"""Scores the checkpoints of a run while it trains, in a process beside it, each once.

workdir/evaluations.jsonl       on the embedded images: a line for each checkpoint, its step and its figures
workdir/evaluations-coco.jsonl  the same on a benchmark
workdir/best/                   the checkpoint with the best figure so far, where one was named
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from emu_jax.checkpoints.store import FOLDER, is_checkpoint, steps_in
from emu_jax.errors import UserError, nearest
from emu_jax.evaluate.intervals import Figure
from emu_jax.storage import Path, copy_folder, json_lines, move_folder, read_json_object, remove, replace_text
from emu_jax.workdir import CONFIG_FILE

EVALUATIONS, BEST = "evaluations", "best"
Score = Callable[[Path], Mapping[str, Figure]]  # the folder of a checkpoint, named by its step -> figures by name


def evaluations_file(workdir: Path, name: str = "") -> Path:
    """The file that has the lines; `name` names the benchmarks, and is empty for the embedded images."""
    return workdir / f"{EVALUATIONS}{name and f'-{name}'}.jsonl"


def watch(
    workdir: Path,
    score: Score,
    of: Mapping[str, Any],
    *,
    name: str = "",
    keep_best: str = "",
    seconds: float = 30.0,
) -> Iterator[dict[str, Any]]:
    """Scores every checkpoint that is there or comes, oldest first; yields its line.

    It ends after the last step of a run whose length is a number of steps. A checkpoint that the run removes before it
    is read has no line.

    Args:
      score: loads a checkpoint and scores it.
      of: what is scored, JSON-serialisable; a line with something else does not count as this one.
      name: as in `evaluations_file`.
      keep_best: name of a figure; the checkpoint where it is highest is copied into workdir/best.
      seconds: how often it looks for new checkpoints.

    Raises:
      UserError: no work directory, or one of another kind of run; no such figure.
    """
    if not (workdir / CONFIG_FILE).is_file():
        raise UserError(f"{workdir}: no {CONFIG_FILE} in it; expected a work directory of `emu-jax train`")
    config = read_json_object(workdir / CONFIG_FILE, "the config that `emu-jax train` wrote")
    last, file = config.get("train", {}).get("steps", 0), evaluations_file(workdir, name)
    of = json.loads(json.dumps(of))
    while True:
        rows = [row for _, row in json_lines(file, file.read_bytes())] if file.exists() else []
        same = [row for row in rows if row["of"] == of]
        done = {row["step"] for row in same}
        new = [step for step in steps_in(workdir / FOLDER) if step not in done]
        if not new:
            if last and last in done:
                return
            time.sleep(seconds)
            continue
        folder = workdir / FOLDER / str(new[0])
        try:
            figures = score(folder)
            row = {"step": new[0], "of": of, "figures": {figure: found.value for figure, found in figures.items()}}
            if keep_best:
                _keep_best(workdir, folder, row, same, keep_best)
        except (OSError, ValueError):
            if is_checkpoint(folder):
                raise
            continue  # the run has removed it meanwhile
        replace_text(file, "".join(json.dumps(each) + "\n" for each in [*rows, row]))
        yield row


def _keep_best(
    workdir: Path, folder: Path, row: dict[str, Any], earlier: Sequence[dict[str, Any]], figure: str
) -> None:
    """Copies a checkpoint into workdir/best if its figure is above all earlier ones; its line then says `best`."""
    if figure not in row["figures"]:
        raise UserError(f"keep_best={figure!r}: no such figure; did you mean {nearest(figure, row['figures'])}?")
    if any(other["figures"].get(figure, float("-inf")) >= row["figures"][figure] for other in earlier):
        return
    partial, best = workdir / f"{BEST}.partial", workdir / BEST
    remove(partial)
    copy_folder(folder, partial)
    remove(best)
    move_folder(partial, best)
    row["best"] = figure
