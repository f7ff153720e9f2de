"""Which metrics a benchmark is scored by: questions and predictions -> figures by name."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emu_jax.data.images import load_image
from emu_jax.errors import UserError
from emu_jax.evaluate import intervals, vgg
from emu_jax.evaluate.benchmarks.benchmark import Benchmark
from emu_jax.evaluate.benchmarks.drawing import real_images
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics import captions, clip_score, frechet, inception, open_answers, ranking, vqa, wups
from emu_jax.evaluate.question import Question
from emu_jax.generate.model import Emu

log = logging.getLogger(__name__)

UNANSWERABLE = "unanswerable"  # VizWiz's answer, and its kind of such questions
CHANCES = {"tone": 1 / 5, "is-this": 1 / 2}  # of the embedded questions' kinds


@dataclasses.dataclass(frozen=True)
class Weights:
    """Files that some metrics need and nobody may ship; each is the user's own.

    Attributes:
      clip: folder of a CLIP, for CLIP scores. inception: FID's Inception. wordnet: WordNet's folder, for WUPS, where it
        is not found by itself.
    """

    clip: Path | None = None
    inception: Path | None = None
    wordnet: Path | None = None


def score(
    benchmark: Benchmark,
    questions: Sequence[Question],
    predictions: Mapping[str, Any],
    *,
    root: Path,
    weights: Weights,
    emu: Emu,
    drawn: Path,
) -> dict[str, Figure]:
    """Figures of a benchmark; {} where its answers are not published or only its own server scores it.

    Args:
      predictions: by the questions' ids, one each.
      root: the benchmark's folder. drawn: the folder of drawn images.

    Raises:
      UserError: predictions are missing, or a metric lacks what it needs.
    """
    missing = [question.id for question in questions if question.id not in predictions]
    if missing:
        raise UserError(f"{benchmark.name}: {len(missing)} questions have no prediction, {missing[0]} the first")
    said = [predictions[question.id] for question in questions]
    if benchmark.task == "drawing":
        return _drawings(questions, [drawn / name for name in said], root, weights, emu)
    if benchmark.task == "open" or not all(question.answers for question in questions):
        return {}
    metrics: dict[str, Callable[[], dict[str, Figure]]] = {
        "caption": lambda: captions.figures(said, questions),
        "vqa": lambda: _vqa(benchmark, said, questions),
        "dialogue": lambda: ranking.figures([np.asarray(scores) for scores in said], questions),
        "video_qa": lambda: _videos(benchmark, said, questions, weights),
        "embedded": lambda: _embedded(benchmark, said, questions),
    }
    return metrics[benchmark.task]()


def _vqa(benchmark: Benchmark, said: Sequence[str], questions: Sequence[Question]) -> dict[str, Figure]:
    """The official accuracy; of VizWiz also its second task, by what was answered: one threshold, no ranking."""
    vizwiz = benchmark.name == "vizwiz"
    figures = vqa.figures(said, questions, vizwiz=vizwiz)
    can = [question.kind != UNANSWERABLE for question in questions]
    if vizwiz and not all(can):
        figures |= vqa.answerability([float(text != UNANSWERABLE) for text in said], can)
    return figures


def _videos(
    benchmark: Benchmark, said: Sequence[str], questions: Sequence[Question], weights: Weights
) -> dict[str, Figure]:
    if benchmark.name == "nextqa":
        return wups.figures(wups.Wups(weights.wordnet), said, questions)
    return open_answers.figures(said, questions)


def _embedded(benchmark: Benchmark, said: Sequence[str], questions: Sequence[Question]) -> dict[str, Figure]:
    """Exact answers; of names also captions' scores, where Java is there: the quick start must not need it."""
    figures: dict[str, Figure] = {}
    for kind in sorted({question.kind for question in questions}):
        right = [text == q.answers[0] for text, q in zip(said, questions, strict=True) if q.kind == kind]
        figures[f"exactly right ({kind})"] = intervals.share(right, CHANCES.get(kind))
    if benchmark.name != "fluent":
        return figures
    try:
        return figures | captions.figures(said, questions)
    except UserError as error:
        log.warning("names are scored by exact match alone: %s", error)
        return figures


def _drawings(
    questions: Sequence[Question], drawn: Sequence[Path], root: Path, weights: Weights, emu: Emu
) -> dict[str, Figure]:
    """FID and CLIP score with the user's weights; distances of VGG's and the model's own features always."""

    def images(paths: Sequence[Path]) -> Any:
        return (load_image(path) for path in paths)

    real = real_images(root, questions)
    figures = {
        "Frechet distance, own features": frechet.figure(
            frechet.encoder_features(emu, images(drawn)), frechet.encoder_features(emu, images(real))
        )
    }
    if (file := vgg.find_weights()) is not None:
        params = vgg.load(file)
        features = [frechet.vgg_features(params, images(paths)) for paths in (drawn, real)]
        figures["Frechet distance, VGG-16 features"] = frechet.figure(*features)
    if weights.inception is not None:
        params = inception.load(weights.inception)
        figures["FID"] = frechet.figure(*(inception.features(params, images(paths)) for paths in (drawn, real)))
    if weights.clip is not None:
        from emu_jax.data.clip_scores import load_scorer

        scorer = load_scorer(str(weights.clip))
        figures[clip_score.CLIP_SCORE] = clip_score.figure(scorer, images(drawn), [q.text for q in questions])
    return figures
