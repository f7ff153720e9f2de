"""CIDEr, BLEU-1 to BLEU-4, METEOR and ROUGE-L of captions, by pycocoevalcap, the scorers of COCO's own server.

    predictions and questions, in the same order -> {"CIDEr": Figure, "BLEU-1": Figure, ...}

The tokenizer (Stanford's PTB) and METEOR are Java programs in that package. Scores with another tokenizer would not be
comparable, so there are none without Java. SPICE is left out: it downloads Stanford CoreNLP's models when first run.
"""

from __future__ import annotations

import functools
import math
import shutil
import subprocess
from collections.abc import Sequence

import numpy as np

from emu_jax.errors import UserError
from emu_jax.evaluate import intervals
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics.figures import check, subjects
from emu_jax.evaluate.question import Question

ORDER = 4  # longest n-grams
Captions = dict[int, list[str]]  # by item


def figures(predictions: Sequence[str], questions: Sequence[Question]) -> dict[str, Figure]:
    """Scores over all captions, on the scale of COCO's server (a CIDEr of 1.2 is often printed as 120).

    The 95% intervals are bootstrapped over images:
      CIDEr and ROUGE-L are means over images. CIDEr's document frequencies stay those of the whole set.
      BLEU is recomputed from each resample's n-gram counts and lengths.
      METEOR of a set is not the mean of its images' scores, and its program takes seconds for one set: the interval
      is that of the mean, shifted by the difference between the two.

    Args:
      predictions: one caption a question.
      questions: whose answers are the reference captions.

    Raises:
      UserError: a caption, a reference, Java or pycocoevalcap is missing.
    """
    check(predictions, questions)
    truth, found = tokenize([question.answers for question in questions]), tokenize([[text] for text in predictions])
    Bleu, Cider, Meteor, Rouge = _scorers()
    count, groups = len(questions), subjects(questions)
    scores = {"CIDEr": _over_images(groups, *Cider().compute_score(truth, found))}
    statistics = bleu_statistics(truth, found)
    by_images = np.zeros((groups.max() + 1, statistics.shape[1]))
    np.add.at(by_images, groups, statistics)
    bleu, _ = Bleu(ORDER).compute_score(truth, found, verbose=0)
    for order in range(1, ORDER + 1):
        resampled = functools.partial(lambda order, index: bleu_of(by_images[index])[order - 1], order)
        interval = intervals.bootstrap(resampled, len(by_images))
        scores[f"BLEU-{order}"] = Figure(float(bleu[order - 1]), interval, None, count)
    scores["METEOR"] = _over_images(groups, *_meteor(Meteor, truth, found))
    scores["ROUGE-L"] = _over_images(groups, *Rouge().compute_score(truth, found))
    return scores


def cider(predictions: Sequence[str], questions: Sequence[Question]) -> Figure:
    """CIDEr alone, as in `figures`."""
    check(predictions, questions)
    truth, found = tokenize([question.answers for question in questions]), tokenize([[text] for text in predictions])
    _, Cider, _, _ = _scorers()
    return _over_images(subjects(questions), *Cider().compute_score(truth, found))


def _over_images(groups: np.ndarray, score: float, values: Sequence[float]) -> Figure:
    """A set's score, with the interval of the captions' mean, shifted by the difference between the two.

    Args:
      groups: the number of each caption's images; captions of the same images are drawn together.
    """
    figure = intervals.mean(values, groups=groups)
    shift = float(score) - figure.value
    low, high = figure.interval
    return Figure(float(score), (max(low + shift, 0.0), high + shift), None, figure.count)


def tokenize(captions: Sequence[Sequence[str]]) -> Captions:
    """Captions of every image -> the same, tokenized by Stanford's PTB tokenizer, lower case, without punctuation.

    Raises:
      UserError: Java or pycocoevalcap is missing, or the tokenizer failed.
    """
    _check_java()
    try:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError as error:
        raise _not_installed() from error
    # The program tokenizes line by line: a line break inside a caption would shift all that follow.
    lines = {row: [{"caption": " ".join(text.split())} for text in texts] for row, texts in enumerate(captions)}
    try:
        tokens = PTBTokenizer().tokenize(lines)
    except OSError as error:  # it writes a file into its own folder
        raise UserError(f"the PTB tokenizer cannot run: {error}; pycocoevalcap's folder must be writable") from error
    if any(len(tokens.get(row, ())) != len(texts) for row, texts in lines.items()):
        raise UserError("the PTB tokenizer lost captions; run `java -version`: expected Java 8 or newer")
    return tokens


def bleu_statistics(truth: Captions, found: Captions) -> np.ndarray:
    """Tokenized captions -> float64 [N, 2 + 2 * 4]: a caption's length, that of the reference closest in length, its
    n-gram counts, and the counts of those that a reference has."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=ORDER)
    for row, references in truth.items():
        scorer += (found[row][0], references)
    rows = []
    for parts in scorer.ctest:
        length = parts["testlen"]
        closest = min((abs(other - length), other) for other in parts["reflen"])[1]
        rows.append([length, closest, *parts["guess"], *parts["correct"]])
    return np.array(rows, np.float64)


def bleu_of(statistics: np.ndarray) -> list[float]:
    """Rows of `bleu_statistics` -> BLEU-1 to BLEU-4 over all of them, with pycocoevalcap's guards against zeros."""
    length, closest, *counts = statistics.sum(0)
    ratio = (length + 1e-15) / (closest + 1e-9)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    guesses, correct = np.array(counts[:ORDER]), np.array(counts[ORDER:])
    precisions = np.cumprod((correct + 1e-15) / (guesses + 1e-9))
    return (brevity * precisions ** (1 / np.arange(1, ORDER + 1))).tolist()


def _meteor(Meteor: type, truth: Captions, found: Captions) -> tuple[float, list[float]]:
    meteor = Meteor()
    pipes = meteor.meteor_p.stdout, meteor.meteor_p.stderr
    try:
        return meteor.compute_score(truth, found)
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"METEOR failed ({reason}); it takes 2 GB of memory and Java 8 or newer") from error
    finally:
        if meteor.lock.locked():  # held by the failed call; its destructor would wait for the lock for ever
            meteor.lock.release()
        del meteor  # ends the program, but leaves its pipes open
        for pipe in pipes:
            pipe.close()


def _check_java() -> None:
    java = shutil.which("java")
    if java is None or subprocess.run([java, "-version"], capture_output=True).returncode:
        raise UserError(
            "caption scores need Java for the PTB tokenizer and METEOR, and no java runs here; install it "
            "(Debian: apt-get install default-jre-headless)"
        )


def _not_installed() -> UserError:
    return UserError("caption scores need pycocoevalcap; run `pip install 'emu-jax[eval]'`")


def _scorers() -> tuple[type, type, type, type]:
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise _not_installed() from error
    return Bleu, Cider, Meteor, Rouge
