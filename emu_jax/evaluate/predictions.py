"""Predictions in files: a JSON object a line, appended batch by batch: a killed run repeats none that is stored.

    FOLDER/0-of-2.jsonl    {"run": {"benchmark": "coco", "split": "test", "shots": 4, …}}
                           {"id": "391895", "prediction": "a man riding a motorcycle", "said": ["a man riding …"]}
    FOLDER/1-of-2.jsonl    the other process's

The first line identifies the run. On a local disk a kill loses no batch that has ended, and a last line that it cut off
is removed. In a bucket a file is uploaded whole from time to time (`growing_file.py`): a kill loses what was predicted
since the last upload, half a minute's worth.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from emu_jax.errors import UserError
from emu_jax.growing_file import GrowingFile
from emu_jax.storage import Path, json_lines

# Fields that predictions of one run share, and their names in error messages.
CHECKED = {
    "benchmark": "the benchmark",
    "split": "the split",
    "shots": "the number of few-shot examples",
    "examples": "what chose the examples",
    "text_examples": "text-only examples",
    "chat": "the kind of prompts",
    "model": "the model",
    "questions": "the questions",
    "drawing": "how images are drawn",
    "image_reading": "how images are read",
}


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """What predictions must share to be of one run; the fields' names are those of the files.

    Attributes:
      shots: number of few-shot examples.
      questions, model, examples: fingerprints of the benchmark's questions, of the model, and of what chose examples.
      text_examples: whether two text-only examples start each prompt (the paper's *).
      chat: whether prompts are the instruction-tuned model's.
      drawing: settings of drawn images, e.g. "sampler=pndm steps=50 guidance=5.0"; "" where none are drawn.
      image_reading: how files become pixels, one of `data.images.READINGS`.
    """

    benchmark: str
    split: str
    shots: int
    examples: str
    text_examples: bool
    chat: bool
    model: str
    questions: str
    drawing: str = ""
    image_reading: str = "upright"

    @property
    def name(self) -> str:
        """A folder's name: coco-test-4shot, coco-test-0shot-text."""
        return f"{self.benchmark}-{self.split}-{self.shots}shot" + ("-text" if self.text_examples else "")


def read(folder: Path, run: RunIdentity, ids: Sequence[str]) -> dict[str, Any]:
    """Predictions by id of all the folder's N-of-M.jsonl; {} where there are none.

    Raises:
      UserError: a file is of another run, a question has two predictions, or a line is no prediction.
    """
    found: dict[str, Any] = {}
    known = set(ids)
    for file in sorted(folder.glob("*-of-*.jsonl")):
        for number, record in enumerate(_lines(file), 1):
            where = f"{file}:{number}"
            if number == 1:
                _check_run(file, record, run)
                continue
            try:
                id, prediction = record["id"], record["prediction"]
            except (KeyError, TypeError) as error:
                raise UserError(
                    f'{where}: expected {{"id": …, "prediction": …}}; delete the file to start again'
                ) from error
            if id in found:
                raise UserError(f"{where}: a second prediction for {id}; delete one of the two")
            if id not in known:
                raise UserError(f"{where}: a prediction for {id}, which is no question of {run.benchmark} {run.split}")
            found[id] = prediction
    return found


def _lines(file: Path) -> list[Any]:
    """The JSON of every complete line."""
    data = file.read_bytes()
    try:
        return [record for _, record in json_lines(file, data[: data.rfind(b"\n") + 1])]
    except UserError as error:
        raise UserError(f"{error}; delete the file to start again") from error


def _check_run(file: Path, record: Any, run: RunIdentity) -> None:
    theirs = record.get("run") if isinstance(record, dict) else None
    if not isinstance(theirs, Mapping):
        raise UserError(f'{file}:1: expected {{"run": …}} as the first line; delete the file to start again')
    for name, about in CHECKED.items():
        if theirs.get(name) != getattr(run, name):
            raise UserError(
                f"{file}: predictions for another run: {about} was {theirs.get(name)!r}, is {getattr(run, name)!r}; "
                "write to another folder, or delete the file"
            )


class Writer:
    """Appends to one file; use as a context manager."""

    def __init__(self, file: Path, run: RunIdentity):
        file.parent.mkdir(parents=True, exist_ok=True)
        data = file.read_bytes() if file.exists() else b""
        complete = data[: data.rfind(b"\n") + 1]  # without a line that a kill cut off
        self._file = GrowingFile(file, complete or _encode([{"run": dataclasses.asdict(run)}]))

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends records; on a local disk they are in the file when it returns."""
        self._file.add(_encode(records))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _encode(records: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
