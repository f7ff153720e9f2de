"""Scores the checkpoints of a run on the embedded images while it trains, in a process beside it, each once.

workdir/evaluations.jsonl   a line for each checkpoint: its step and its figures
workdir/best/               the checkpoint with the best figure so far, where one was named
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from emu_jax.checkpoints.store import FOLDER, is_checkpoint, steps_in
from emu_jax.errors import UserError, nearest
from emu_jax.evaluate.quickstart import captions
from emu_jax.generate.model import Emu
from emu_jax.storage import Path, copy_folder, json_lines, move_folder, read_json_object, remove, replace_text
from emu_jax.workdir import CONFIG_FILE

EVALUATIONS_FILE, BEST = "evaluations.jsonl", "best"


def watch(
    workdir: Path, splits: Sequence[str], *, keep_best: str = "", weights: str = "auto", seconds: float = 30.0
) -> Iterator[dict[str, Any]]:
    """Scores every checkpoint that is there or comes, oldest first; yields its line of evaluations.jsonl.

    It ends after the last step of a run whose length is a number of steps. A checkpoint that the run removes before it
    is read has no line.

    Args:
      keep_best: name of a figure; the checkpoint where it is highest is copied into workdir/best.
      seconds: how often it looks for new checkpoints.

    Raises:
      UserError: no work directory, or one of another kind of run; no such figure.
    """
    if not (workdir / CONFIG_FILE).is_file():
        raise UserError(f"{workdir}: no {CONFIG_FILE} in it; expected a work directory of `emu-jax train`")
    config = read_json_object(workdir / CONFIG_FILE, "the config that `emu-jax train` wrote")
    last, file = config.get("train", {}).get("steps", 0), workdir / EVALUATIONS_FILE
    while True:
        rows = [row for _, row in json_lines(file, file.read_bytes())] if file.exists() else []
        done = {row["step"] for row in rows}
        new = [step for step in steps_in(workdir / FOLDER) if step not in done]
        if not new:
            if last and last in done:
                return
            time.sleep(seconds)
            continue
        folder = workdir / FOLDER / str(new[0])
        try:
            scores = captions.score(Emu.load(folder, weights=weights), splits)
            row = {"step": new[0], "figures": {name: figure.value for name, figure in scores.figures.items()}}
            if keep_best:
                _keep_best(workdir, folder, row, rows, keep_best)
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
