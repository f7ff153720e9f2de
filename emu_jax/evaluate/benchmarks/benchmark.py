"""What a benchmark is: how its files are read, the model is prompted, predictions are scored and submitted.

    Benchmark.read(root, split) ─ [Question] ─ Benchmark.prompt, a model ─ {id: prediction} ─┬ Benchmark.score
                                                                                             └ .write_submission
Each benchmark's module defines one of these as `BENCHMARK`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from emu_jax.errors import UserError, nearest
from emu_jax.evaluate.formats.files import Files
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics.fid import check_rule, read_statistics
from emu_jax.evaluate.metrics.figures import Missing
from emu_jax.evaluate.metrics.ranking import ranks
from emu_jax.evaluate.prompts import Prompt
from emu_jax.evaluate.question import Question
from emu_jax.generate.model import Emu
from emu_jax.storage import Path, replace_text

# A submission's answer: a text, or the rank of every candidate, in the candidates' order, 1 for the best.
Answer = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Weights:
    """Files that some metrics need and that the package cannot ship. They are local: other libraries open them.

    Attributes:
      clip: folder of a CLIP, for CLIP scores.
      inception: FID's Inception.
      wordnet: WordNet's folder, for WUPS; None to search NLTK's usual folders.
      fid: which pixels Inception sees, one of `fid.RULES`.
      fid_statistics: .npz file of the real images' statistics for FID, which may be in a bucket; it is used if it
        exists, and otherwise written.
    """

    clip: pathlib.Path | None = None
    inception: pathlib.Path | None = None
    wordnet: pathlib.Path | None = None
    fid: str = "crop256"
    fid_statistics: Path | None = None

    def __post_init__(self):
        check_rule(self.fid)
        if self.fid_statistics is None:
            return
        if self.inception is None:
            raise UserError(f"fid_statistics={self.fid_statistics}: FID needs Inception's weights; give inception too")
        if self.fid_statistics.is_file():  # refused now, not after 30,000 drawings
            read_statistics(self.fid_statistics, self.fid)


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What a metric may use besides predictions and questions.

    Attributes:
      root: the benchmark's folder.
      drawn: the folder of drawn images.
      weights: files that the user gave.
      emu: the model that predicted.
      missing: takes the figures that a metric could not compute, with the reason (`figures.attempt`).
    """

    root: Path
    drawn: Path
    weights: Weights
    emu: Emu
    missing: Missing = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark; what is published of it fixes every field.

    Attributes:
      name: its name on the command line and in the registry.
      splits: the splits that can be read.
      split: the default split: the latest one with published answers.
      tree: the files that the folder must hold, a line a file; () where the benchmark needs none.
      described: where the official files are described.
      reader: files and split -> questions.
      prompt: question, images and few-shot examples -> the model's calls and a prediction.
      predicts: what a prediction is: a text, the file name of a drawn image, or scores of the question's candidates
        by each rule of `generate/candidates.py`, and a text where a question has no candidates.
      rule: the rule that ranks candidates in submissions.
      metrics: predictions and questions, in the same order -> figures by name; None where only the benchmark's own
        server or scorer gives scores.
      few_shot_split: the split that few-shot examples come from; "" where none is published.
      submission: questions and answers by id -> the content of a submission's JSON, or its text; None where no server
        or scorer defines a format.
    """

    name: str
    splits: tuple[str, ...]
    split: str
    tree: tuple[str, ...]
    described: str
    reader: Callable[[Files, str], list[Question]]
    prompt: Prompt
    predicts: Literal["text", "image", "scores"] = "text"
    metrics: Callable[[Sequence[Any], Sequence[Question], Scoring], dict[str, Figure]] | None = None
    few_shot_split: str = ""
    submission: Callable[[Sequence[Question], Mapping[str, Answer]], Any] | None = None
    rule: str = "reference"

    def read(self, root: Path, split: str = "") -> list[Question]:
        """The questions of a split ("": `self.split`), in the files' order, each with a unique id.

        Raises:
          UserError: a file, an image or a video is missing, two questions share an id, a question has no answer or an
            answer no question, or a file is not as published.
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
        """The benchmark's folder, which must exist."""
        return Files(root, f"{self.name} expects there: {'; '.join(self.tree)}. Official files: {self.described}")

    def score(
        self, questions: Sequence[Question], predictions: Mapping[str, Any], scoring: Scoring
    ) -> dict[str, Figure]:
        """Figures by name; {} where answers are not published or only the benchmark's own server scores them.

        Those that could not be computed are in `scoring.missing`.

        Args:
          predictions: by the questions' ids, one each.

        Raises:
          UserError: predictions are missing, or every metric lacks what it needs.
        """
        self._check_complete(questions, predictions)
        known = self.predicts == "image" or all(question.answers for question in questions)
        if self.metrics is None or not known:
            return {}
        figures = self.metrics([predictions[question.id] for question in questions], questions, scoring)
        if scoring.missing and not figures:
            raise UserError(f"{self.name}: {next(iter(scoring.missing.values()))}")
        return figures

    def answer(self, question: Question, prediction: Any) -> Answer:
        """What a submission holds of a prediction: the ranks of the candidates, or the prediction itself."""
        if self.predicts == "scores" and question.candidates:
            return ranks(np.asarray(prediction[self.rule])).tolist()
        return prediction

    def write_submission(self, path: Path, questions: Sequence[Question], answers: Mapping[str, Answer]) -> None:
        """Writes answers in the format of the benchmark's server or official scorer, completely or not at all.

        Args:
          path: the JSON file.
          questions: all questions that were asked.
          answers: by the questions' ids, one each.

        Raises:
          UserError: the answers belong to other questions or miss some, the benchmark has no such format, or the file
            cannot be written.
        """
        if self.submission is None:
            raise UserError(f"{path}: {self.name} has no submission format; its predictions are scored here")
        self._check_answers(questions, answers)
        content = self.submission(questions, answers)
        text = content if isinstance(content, str) else json.dumps(content) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, text)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error}); expected a file's path") from error

    def _check_complete(self, questions: Sequence[Question], predictions: Mapping[str, Any]) -> None:
        if missing := [question.id for question in questions if question.id not in predictions]:
            raise UserError(
                f"{self.name}: {len(missing)} of {len(questions)} questions have no prediction (the first: "
                f"{missing[0]!r}); expected one each: let the run finish"
            )

    def _check_answers(self, questions: Sequence[Question], answers: Mapping[str, Answer]) -> None:
        asked = {question.id: question for question in questions}
        if strange := [name for name in answers if name not in asked]:
            raise UserError(
                f"{self.name}: {len(strange)} of {len(answers)} predictions answer none of its {len(asked)} "
                f"questions (the first: {strange[0]!r}; questions are called {next(iter(asked), '')!r} and so on); "
                "are they of another benchmark or split?"
            )
        self._check_complete(questions, answers)
        for name, answer in answers.items():
            if self.predicts == "scores" and (count := len(asked[name].candidates)):
                if not _is_ranking(answer, count):
                    raise UserError(
                        f"{self.name}: the prediction of {name!r} is {ascii(answer)[:60]}; expected the ranks of "
                        f"its {count} candidates, 1 to {count}, each once"
                    )
            elif not isinstance(answer, str):
                raise UserError(f"{self.name}: the prediction of {name!r} is {ascii(answer)[:60]}; expected a text")


def _is_ranking(answer: Any, count: int) -> bool:
    try:
        return not isinstance(answer, str) and sorted(answer) == list(range(1, count + 1))
    except TypeError:
        return False
