"""VQA accuracy: an answer's agreement with what (usually ten) people said, after the official normalisation.

    accuracy = mean over people of min(1, others who gave the answer / 3)

There are four rules, oddities included, because published numbers have them; tests compare with what the programs
print.

    accuracy             the official evaluation (GT-Vision-Lab/VQA, vqaEval.py, 2021). Answers and prediction are
                         normalised only where people gave more than one answer: where all agree, the prediction must
                         match to the letter, its case included
    reference_accuracy   the reference's `VQAEval`: the prediction is always normalised, answers lose their punctuation
    okvqa_accuracy       the reference's `OKVQAEval`: the same, and prediction and answers are stemmed, each as one word
    textvqa_accuracy     `TextVQAAccuracyEvaluator` of Pythia and MMF (facebookresearch/mmf, m4c_evaluators.py), which
                         LLaVA copies: prediction and answers are always normalised, without commas and question marks,
                         and an apostrophe before an s begins a word
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence

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
PERIODS = 32  # removed at most: the official code passes a flag (re.UNICODE, which is 32) where a count belongs

# Words written without one of their apostrophes get it back: "dont", "couldnt've" and "couldn'tve".
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


def tidy(text: str) -> str:
    """Replaces line breaks and tabs by spaces, and strips the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise(text: str, contractions: Mapping[str, str] = CONTRACTIONS) -> str:
    """Lower case without punctuation and articles, numbers to ten as digits, contractions with their apostrophes.

    >>> normalise("The two dogs, they arent brown.")
    "2 dogs they aren't brown"

    Punctuation next to a space is removed, and all punctuation is where the text has a number like 1,000; otherwise it
    becomes a space. A period stays before a digit.
    """
    return _by_word(_without_punctuation(tidy(text)), contractions)


def _without_punctuation(text: str) -> str:
    vanishes = _COMMA_IN_NUMBER.search(text) is not None
    spaced = {mark for mark in PUNCTUATION if f"{mark} " in text or f" {mark}" in text}
    for mark in PUNCTUATION:
        text = text.replace(mark, "" if vanishes or mark in spaced else " ")
    return _PERIOD.sub("", text, count=PERIODS)


def _by_word(text: str, contractions: Mapping[str, str]) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in ARTICLES)


def agreement(answer: str, answers: Sequence[str]) -> float:
    """Mean over `answers`, each left out in turn, of min(1, matches among the others / 3)."""
    equal = sum(other == answer for other in answers)
    # Leaving out a matching answer leaves one match fewer among the others.
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


def reference_accuracy(prediction: str, answers: Sequence[str], stem: Callable[[str], str] = str) -> float:
    """Accuracy of one answer by the reference's `VQAEval`.

    >>> reference_accuracy("Two", ["2"] * 3 + ["two"] * 7)  # answers keep their numbers as words
    0.9

    Args:
      stem: applied to prediction and answers after their punctuation is removed.
    """
    prediction = _by_word(stem(_without_punctuation(tidy(prediction))), CONTRACTIONS)
    if len(set(answers)) > 1:
        answers = [stem(_without_punctuation(answer)) for answer in answers]
    return agreement(prediction, answers)


def okvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy of one answer by the reference's `OKVQAEval`, with NLTK's Porter stemmer.

    >>> okvqa_accuracy("surfing", ["surf"] * 8 + ["wave ride"] * 2)
    1.0

    Raises:
      UserError: NLTK is not installed.
    """
    return reference_accuracy(prediction, answers, _stemmer())


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA accuracy of one answer.

    >>> textvqa_accuracy("1,000", ["1000"] * 10), textvqa_accuracy("Lay's", ["lays"] * 10)
    (1.0, 0.0)
    """
    return agreement(_textvqa_normal(prediction), [_textvqa_normal(answer) for answer in answers])


def _textvqa_normal(text: str) -> str:
    """MMF's `EvalAIAnswerProcessor`; its table of contractions has no other effect than this one's."""
    return normalise(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


@functools.cache
def _stemmer() -> Callable[[str], str]:
    try:
        from nltk.stem import PorterStemmer
    except ImportError as error:
        raise UserError("OK-VQA is scored with NLTK's stemmer; install it: pip install 'emu-jax[eval]'") from error
    return PorterStemmer().stem


def figures(
    predictions: Sequence[str],
    questions: Sequence[Question],
    accuracy: Callable[[str, Sequence[str]], float] = accuracy,
    name: str = "accuracy",
) -> dict[str, Figure]:
    """Accuracy over all questions and by type, from 0 to 1.

    Raises:
      UserError: a question has no prediction, or its answers are not published.
    """
    check(predictions, questions)
    values = [accuracy(text, question.answers) for text, question in zip(predictions, questions, strict=True)]
    return by_kind(name, values, questions, intervals.mean)
