"""CIDEr, BLEU-1 to BLEU-4, METEOR and ROUGE-L of captions, by pycocoevalcap, the scorers of COCO's own server.

    predictions and questions, in the same order -> {"CIDEr": Figure, "BLEU-1": Figure, ...}

The tokenizer (Stanford's PTB) and METEOR are Java programs in that package. Scores with another tokenizer would not be
comparable, so there are none without Java. SPICE is left out: it downloads Stanford CoreNLP's models when first run.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator, Sequence

import numpy as np

from emu_jax.errors import UserError
from emu_jax.evaluate import intervals
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics.figures import Missing, attempt, check, subjects
from emu_jax.evaluate.question import Question

# Scores must not depend on the user's language.
JAVA_OPTIONS = ("-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US")
TOOL_OPTIONS = "JAVA_TOOL_OPTIONS"
ORDER = 4  # longest n-grams
Captions = dict[int, list[str]]  # by item


def figures(
    predictions: Sequence[str], questions: Sequence[Question], missing: Missing | None = None
) -> dict[str, Figure]:
    """Scores over all captions, on the scale of COCO's server: papers print a CIDEr of 1.2 as 120.

    The 95% intervals are bootstrapped over images:
      CIDEr and ROUGE-L are means over images. CIDEr's document frequencies stay those of the whole set.
      BLEU is recomputed from each resample's n-gram counts and lengths.
      METEOR of a set is not the mean of its images' scores, and its program takes seconds for one set: the interval
      is that of the mean, shifted by the difference between the two.

    Args:
      predictions: one caption a question.
      questions: whose answers are the reference captions.
      missing: takes the reason if METEOR, a program of its own, fails; without it, that is an error.

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
        scores[f"BLEU-{order}"] = Figure(float(bleu[order - 1]), interval, None, count, 100.0)

    def meteor() -> dict[str, Figure]:
        return {"METEOR": _over_images(groups, *_meteor(Meteor, truth, found))}

    scores |= meteor() if missing is None else attempt("METEOR", meteor, missing)
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
    return Figure(float(score), (max(low + shift, 0.0), high + shift), None, figure.count, 100.0)


def tokenize(captions: Sequence[Sequence[str]]) -> Captions:
    """Captions of every image -> the same, tokenized by Stanford's PTB tokenizer, lower case, without punctuation.

    Raises:
      UserError: Java or pycocoevalcap is missing, or the tokenizer failed.
    """
    _check_java()
    try:
        from pycocoevalcap.tokenizer import ptbtokenizer
    except ImportError as error:
        raise _not_installed() from error
    # The program tokenizes line by line: a line break inside a caption would shift all that follow.
    lines = [" ".join(text.split()) for texts in captions for text in texts]
    # pycocoevalcap's PTBTokenizer writes a file into its own folder, which may belong to another user.
    jar = ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    command = ["java", *JAVA_OPTIONS, "-cp", jar, "edu.stanford.nlp.process.PTBTokenizer"]
    done = subprocess.run(
        [*command, "-preserveLines", "-lowerCase"],
        input="".join(f"{line}\n" for line in lines).encode(),
        cwd=pathlib.Path(ptbtokenizer.__file__).parent,  # Java may not read the letters of the folder's name
        capture_output=True,
        check=False,
    )
    tokens = done.stdout.decode(errors="replace").split("\n")[: len(lines)]
    if done.returncode or len(tokens) < len(lines):
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise UserError(
            f"the PTB tokenizer failed with exit code {done.returncode} ({said[0]}); expected Java 8 or newer, so look "
            "at `java -version`"
        )
    kept = iter(" ".join(word for word in line.split() if word not in ptbtokenizer.PUNCTUATIONS) for line in tokens)
    return {row: [next(kept) for _ in texts] for row, texts in enumerate(captions)}


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
    try:
        with _java_options():  # in German, it would read 0.5 as 0,5
            meteor = Meteor()
    except OSError as error:
        raise UserError(f"METEOR cannot be started ({error.strerror or error}); look at `java -version`") from error
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


@contextlib.contextmanager
def _java_options() -> Iterator[None]:
    """Java programs that start inside use `JAVA_OPTIONS`, after the options that the user set."""
    before = os.environ.get(TOOL_OPTIONS)
    os.environ[TOOL_OPTIONS] = " ".join([before or "", *JAVA_OPTIONS]).strip()
    try:
        yield
    finally:
        if before is None:
            del os.environ[TOOL_OPTIONS]
        else:
            os.environ[TOOL_OPTIONS] = before


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
