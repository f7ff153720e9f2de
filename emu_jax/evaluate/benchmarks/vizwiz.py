"""VizWiz: questions that blind people asked about their own images, many of which cannot be answered.

`Annotations/val.json`, [{"image", "question", "answers": [{"answer"}], "answer_type"}], where test has only the first
two. Kind: answer_type (other, unanswerable, yes/no, number). Ids are the images' names, since each image has one
question. Results: [{"image", "answer"}].

There are two tasks: accuracy, which normalises only the prediction, always, and with a table of contractions whose
apostrophes are typographic but for a few (the VizWiz API); and to find the questions that cannot be answered. The
reference has no rule of its own for VizWiz: its code only writes results for the server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from emu_jax.errors import UserError
from emu_jax.evaluate import intervals
from emu_jax.evaluate.benchmarks.benchmark import Benchmark, Scoring
from emu_jax.evaluate.formats.files import Files, unique
from emu_jax.evaluate.formats.vqa import given_answers
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics import vqa
from emu_jax.evaluate.prompts import END, Calls, Example, ModelCall, Part, chat_prompt, one_phrase
from emu_jax.evaluate.prompts import vqa as vqa_prompt
from emu_jax.evaluate.question import Question

UNANSWERABLE = "unanswerable"  # an answer, and the kind of such questions


def _read(files: Files, split: str) -> list[Question]:
    records = files.records(f"Annotations/{split}.json", f"annotations/{split}.json", f"{split}.json")
    questions = []
    for name, entry in unique(records, lambda entry: entry.text("image"), "image").items():
        answers: tuple[str, ...] = ()
        kind = ""
        if split != "test":
            answers, kind = given_answers(entry), entry.text("answer_type")
        questions.append(
            Question(
                id=name,
                images=(files.shown(f"{split}/{name}", f"images/{split}/{name}"),),
                text=entry.text("question"),
                answers=answers,
                kind=kind,
            )
        )
    return questions


def prompt(question: Question, images: Sequence[Part], examples: Sequence[Example], chat: bool) -> Calls:
    """A short answer, or "unanswerable" where the tuned model says that the answer is not known."""
    if chat:
        parts = chat_prompt(question, images, (), lambda q: f"{one_phrase(q)}, is the answer known?")
        scores = yield ModelCall(parts, candidates=(f"yes.{END}", f"no.{END}"))
        known, unknown = scores.by("sum")  # as the reference, which pads the two to one length
        if unknown < known:
            return UNANSWERABLE
    return (yield from vqa_prompt(question, images, examples, chat))


# ---------------------------------------------------------------- scores

_PLAIN = ("aint", "arent", "cant", "couldve", "couldnt", "weve", "wheres", "whove")
CONTRACTIONS = {
    key if key in ("couldn'tve", "hadn'tve") else key.replace("'", "’"): (
        word if key in _PLAIN else word.replace("'", "’")
    )
    for key, word in vqa.CONTRACTIONS.items()
}


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VizWiz accuracy of one answer."""
    return vqa.agreement(vqa.normalise(prediction, CONTRACTIONS), answers)


def metrics(predictions: Sequence[str], questions: Sequence[Question], scoring: Scoring) -> dict[str, Figure]:
    """Accuracy, and answerability with "unanswerable" as the prediction: one threshold, no ranking."""
    figures = vqa.figures(predictions, questions, accuracy)
    answerable = [question.kind != UNANSWERABLE for question in questions]
    if not all(answerable):
        figures |= answerability([float(text != UNANSWERABLE) for text in predictions], answerable)
    return figures


def answerability(answerable: Sequence[float], truth: Sequence[bool]) -> dict[str, Figure]:
    """Average precision and F1 of finding the questions that cannot be answered.

    Args:
      answerable: [N], the model's confidence that a question can be answered, 0 to 1; below 0.5 it predicts no.
      truth: [N], whether people could answer it.

    Raises:
      UserError: the two differ in length, or every question can be answered, where neither score is defined.
    """
    scores, positive = 1.0 - np.asarray(answerable, np.float64), ~np.asarray(truth, bool)
    if scores.shape != positive.shape:
        raise UserError(f"answerability: {len(scores)} predictions for {len(positive)} questions; expected one each")
    if not positive.any():
        raise UserError("answerability: none of the questions is unanswerable; expected some of both kinds")
    count = len(scores)

    def figure(score: Callable[[np.ndarray, np.ndarray], float]) -> Figure:
        interval = intervals.bootstrap(lambda index: score(positive[index], scores[index]), count)
        return Figure(score(positive, scores), interval, None, count, 100.0)

    return {"answerability: average precision": figure(_average_precision), "answerability: F1": figure(_f1)}


def _average_precision(positive: np.ndarray, scores: np.ndarray) -> float:
    """Sum over thresholds of precision times the recall gained, without interpolation, as scikit-learn computes it.

    Args:
      positive: bool [N].
      scores: [N], higher is more surely positive; equal scores pass a threshold together.

    Returns: 0 where nothing is positive.
    """
    if not positive.any():
        return 0.0
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # the last of each group of equal scores
    hits = np.cumsum(positive[order])[ends]
    recall = hits / hits[-1]
    return float((np.diff(recall, prepend=0.0) * hits / (ends + 1)).sum())


def _f1(positive: np.ndarray, scores: np.ndarray) -> float:
    """F1 of scores [N] above 0.5 as predictions of bool [N]; 0 where none is above and none is positive."""
    found = scores > 0.5
    total = int(found.sum() + positive.sum())
    return 2.0 * int((found & positive).sum()) / total if total else 0.0


def results(questions: Sequence[Question], answers: Mapping[str, Any]) -> list[dict]:
    """VizWiz's format of results."""
    return [{"image": question.id, "answer": answers[question.id]} for question in questions]


BENCHMARK = Benchmark(
    name="vizwiz",
    splits=("val", "test", "train"),
    split="val",
    few_shot_split="train",
    tree=(
        "Annotations/val.json (and train.json, test.json), or the same in annotations/ or here",
        "val/VizWiz_val_00000000.jpg … (and train/, test/), here or in images/",
    ),
    described="vizwiz.org, page Tasks and Datasets, Visual Question Answering",
    reader=_read,
    prompt=prompt,
    metrics=metrics,
    submission=results,
)
