"""What a benchmark is: a reader of its published files, and a writer of what its server or scorer takes.

Benchmark.read(root, split) ─ [Question] ─ prompts, a model … ─ {id: prediction} ─ Benchmark.write_submission
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from emu_jax.errors import UserError, nearest
from emu_jax.evaluate.benchmarks.files import Files
from emu_jax.evaluate.question import Question

Task = Literal["caption", "vqa", "dialogue", "video_qa", "open", "drawing", "embedded"]
# Of a dialogue: the rank of every candidate, in the candidates' order, 1 for the best. A text elsewhere.
Prediction = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark; every field is fixed by what is published of it.

    Attributes:
      name: what the command line calls it.
      task: what its questions ask for, by which prompts are chosen.
      splits: that can be read.
      split: the one that is read unless another is asked for: the latest whose answers are published.
      shots: the split that few-shot examples come from; "" where none is published.
      tree: the files that the folder must hold, a line a file.
      described: where the official files are described.
      reader: files and split -> questions.
      submission: questions and predictions -> what the JSON of a submission holds; None where no server or scorer
        defines one.
    """

    name: str
    task: Task
    splits: tuple[str, ...]
    split: str
    shots: str
    tree: tuple[str, ...]
    described: str
    reader: Callable[[Files, str], list[Question]]
    submission: Callable[[Sequence[Question], Mapping[str, Prediction]], Any] | None = None

    def read(self, root: Path, split: str = "") -> list[Question]:
        """The questions of a split ("": `self.split`), in the files' order, each with an id of its own.

        Raises:
          UserError: a file, an image or a video is missing, an id stands twice, a question has no answer or an answer
            no question, or a file is not as published.
        """
        split = split or self.split
        if split not in self.splits:
            raise UserError(
                f"{self.name} has no split {split!r}; did you mean {nearest(split, self.splits)}? "
                f"(splits: {', '.join(self.splits)})"
            )
        files = self.files(root)
        questions = self.reader(files, split)
        files.check_shown()
        if not questions:
            raise UserError(f"{root}: holds no question of {self.name}, split {split}; {files.expected}")
        return questions

    def files(self, root: Path) -> Files:
        """The folder, which must be there."""
        return Files(Path(root), f"{self.name} expects there: {'; '.join(self.tree)}. Official files: {self.described}")

    def write_submission(
        self, path: Path, questions: Sequence[Question], predictions: Mapping[str, Prediction]
    ) -> None:
        """Writes predictions as the benchmark's server or official scorer takes them, whole or not at all.

        Args:
          path: the JSON file.
          questions: all that were asked.
          predictions: by the questions' ids, one each.

        Raises:
          UserError: the predictions are of other questions or miss some, the benchmark has no such format, or the file
            cannot be written.
        """
        if self.submission is None:
            raise UserError(f"{path}: {self.name} has no submission format; its predictions are scored here")
        self._check_covers(questions, predictions)
        text = json.dumps(self.submission(questions, predictions))
        path = Path(path)
        partial = path.with_name(f"{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise UserError(f"{path}: cannot be written ({error.strerror}); expected a file's path") from error

    def _check_covers(self, questions: Sequence[Question], predictions: Mapping[str, Prediction]) -> None:
        asked = {question.id: question for question in questions}
        if strange := [name for name in predictions if name not in asked]:
            raise UserError(
                f"{self.name}: {len(strange)} of {len(predictions)} predictions answer none of its {len(asked)} "
                f"questions (the first: {strange[0]!r}; questions are called {next(iter(asked), '')!r} and so on); "
                "are they of another benchmark or split?"
            )
        if missing := [name for name in asked if name not in predictions]:
            raise UserError(
                f"{self.name}: {len(missing)} of {len(asked)} questions have no prediction (the first: "
                f"{missing[0]!r}); expected one each: let the run finish"
            )
        for name, prediction in predictions.items():
            if self.task == "dialogue":
                count = len(asked[name].candidates)
                if not _is_ranking(prediction, count):
                    raise UserError(
                        f"{self.name}: the prediction of {name!r} is {ascii(prediction)[:60]}; expected the ranks of "
                        f"its {count} candidates, 1 to {count}, each once"
                    )
            elif not isinstance(prediction, str):
                raise UserError(f"{self.name}: the prediction of {name!r} is {ascii(prediction)[:60]}; expected a text")


def _is_ranking(prediction: Any, count: int) -> bool:
    try:
        return not isinstance(prediction, str) and sorted(prediction) == list(range(1, count + 1))
    except TypeError:
        return False
