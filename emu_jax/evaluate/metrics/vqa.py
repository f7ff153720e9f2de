"""VQA accuracy: an answer's agreement with what (usually ten) people said, after the official normalisation.

    accuracy = mean over people of min(1, others who gave the answer / 3)

The rules are those of the official evaluation (GT-Vision-Lab/VQA, vqaEval.py, 2021) and of the VizWiz API, oddities
included, because published numbers have them: tests compare with what these programs printed. The normalisations:

  VQA     answers and prediction alike, and only where people gave more than one answer: where all agree, the
          prediction must match to the letter, its case included.
  VizWiz  the prediction only, always; its table of contractions has typographic apostrophes but for a few.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from emu_jax.errors import UserError
from emu_jax.evaluate import intervals
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics.figures import by_kind, check
from emu_jax.evaluate.question import Question

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_WORDS)}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
PERIODS = 32  # as many are removed, no more: the official code passes a flag (re.UNICODE, 32) where a count belongs

# What is written without one of its apostrophes gets it back: "dont", "couldnt've" and "couldn'tve".
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
_PLAIN_IN_VIZWIZ = ("aint", "arent", "cant", "couldve", "couldnt", "weve", "wheres", "whove")
VIZWIZ_CONTRACTIONS = {
    key if key in ("couldn'tve", "hadn'tve") else key.replace("'", "’"): (
        word if key in _PLAIN_IN_VIZWIZ else word.replace("'", "’")
    )
    for key, word in CONTRACTIONS.items()
}


def tidy(text: str) -> str:
    """Without line breaks and tabs inside, or spaces around."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise(text: str, contractions: Mapping[str, str] = CONTRACTIONS) -> str:
    """Lower case without punctuation and articles, numbers to ten as digits, contractions with their apostrophes.

    >>> normalise("The two dogs, they arent brown.")
    "2 dogs they aren't brown"

    Punctuation beside a space vanishes, as all of it does where the text has a number like 1,000; elsewhere it becomes
    a space. A period stays before a digit.
    """
    text = tidy(text)
    vanishes = _COMMA_IN_NUMBER.search(text) is not None
    spaced = {mark for mark in PUNCTUATION if f"{mark} " in text or f" {mark}" in text}
    for mark in PUNCTUATION:
        text = text.replace(mark, "" if vanishes or mark in spaced else " ")
    text = _PERIOD.sub("", text, count=PERIODS)
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in ARTICLES)


def agreement(answer: str, answers: Sequence[str]) -> float:
    """Mean over `answers`, each left out in turn, of min(1, equals among the others / 3)."""
    equal = sum(other == answer for other in answers)
    # Whoever gave the answer too has one equal fewer among the others.
    with_own, without = min(1.0, max(equal - 1, 0) / 3), min(1.0, equal / 3)
    return (equal * with_own + (len(answers) - equal) * without) / len(answers)


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy of one answer.

    >>> accuracy("Yes", ["yes"] * 2 + ["no"] * 8)
    0.6
    """
    prediction, answers = tidy(prediction), [tidy(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalise(prediction), [normalise(answer) for answer in answers]
    return agreement(prediction, answers)


def vizwiz_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VizWiz accuracy of one answer."""
    return agreement(normalise(prediction, VIZWIZ_CONTRACTIONS), answers)


def figures(predictions: Sequence[str], questions: Sequence[Question], *, vizwiz: bool = False) -> dict[str, Figure]:
    """Accuracy over all questions and by type, from 0 to 1.

    Raises:
      UserError: no prediction for a question, or its answers are not published.
    """
    check(predictions, questions)
    score = vizwiz_accuracy if vizwiz else accuracy
    values = [score(text, question.answers) for text, question in zip(predictions, questions, strict=True)]
    return by_kind("accuracy", values, questions, intervals.mean)


def answerability(answerable: Sequence[float], truth: Sequence[bool]) -> dict[str, Figure]:
    """VizWiz's second task: average precision and F1 of finding the questions that cannot be answered.

    Args:
      answerable: [N], how sure the model is that a question can be answered, 0 to 1; below 0.5 it says no.
      truth: [N], whether people could answer it.

    Raises:
      UserError: the two differ in length, or every question can be answered, where neither score is defined.
    """
    sure, positive = 1.0 - np.asarray(answerable, np.float64), ~np.asarray(truth, bool)
    if sure.shape != positive.shape:
        raise UserError(f"answerability: {len(sure)} predictions for {len(positive)} questions; expected one each")
    if not positive.any():
        raise UserError("answerability: none of the questions is unanswerable; expected some of both kinds")
    count = len(sure)

    def figure(score: Callable[[np.ndarray, np.ndarray], float]) -> Figure:
        interval = intervals.bootstrap(lambda index: score(positive[index], sure[index]), count)
        return Figure(score(positive, sure), interval, None, count)

    return {"answerability: average precision": figure(average_precision), "answerability: F1": figure(f1)}


def average_precision(positive: np.ndarray, scores: np.ndarray) -> float:
    """Sum over thresholds of precision times the recall gained, without interpolation, as scikit-learn has it.

    Args:
      positive: bool [N].
      scores: [N], higher is more surely positive; equal ones pass a threshold together.

    Returns: 0 where nothing is positive.
    """
    if not positive.any():
        return 0.0
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # the last of every group of equals
    hits = np.cumsum(positive[order])[ends]
    recall = hits / hits[-1]
    return float((np.diff(recall, prepend=0.0) * hits / (ends + 1)).sum())


def f1(positive: np.ndarray, scores: np.ndarray) -> float:
    """F1 of scores [N] above 0.5 as predictions of bool [N]; 0 where nothing is found or there is nothing to find."""
    found = scores > 0.5
    total = int(found.sum() + positive.sum())
    return 2.0 * int((found & positive).sum()) / total if total else 0.0
