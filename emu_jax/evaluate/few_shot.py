"""Few-shot examples: questions with images most similar to the asked one's (RICES, Yang et al. 2022), or text only.

    images ─ features [N, F], of unit length ─ a file, built once ─ Rices: question -> examples, the nearest last

Features are those of the model's own encoder, or of a CLIP whose weights the user gives.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np
from tqdm import tqdm

from emu_jax.data.images import StoredImage
from emu_jax.data.padding import pad_to
from emu_jax.errors import UserError
from emu_jax.evaluate.predict import ChooseExamples, read_images
from emu_jax.evaluate.question import Question, content_digest
from emu_jax.generate.model import Emu
from emu_jax.models import emu as emu_model
from emu_jax.storage import Path, write_atomically

BATCH = 64  # images encoded at a time
TEXT_EXAMPLES = 2  # as in the paper's runs marked *


class Features(Protocol):
    """Images -> vectors whose similarity is compared."""

    name: str  # changes when the features do
    size: int  # images are read at size x size pixels

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, S, S, 3] -> float32 [N, F]."""
        ...


class EncoderFeatures:
    """The vision encoder's patch features, `ln_visual`, averaged over an image."""

    def __init__(self, emu: Emu):
        config = emu.config
        self.name = f"encoder {emu.fingerprint}"
        self.size = config.vision.image_size
        self._params = emu.params

        def encode(params: emu_model.Params, pixels: jax.Array) -> jax.Array:
            pixels = emu_model.normalise_pixels(pixels, config)
            return emu_model.bind(config, params).encode(pixels)["ln_visual"].mean(1)  # [N, P+1, Dv] -> [N, Dv]

        self._encode = jax.jit(encode)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self._encode(self._params, images), np.float32)


class ClipFeatures:
    """A CLIP's image embeddings, from a folder of its published files (the extra `clip`)."""

    size = 224

    def __init__(self, folder: pathlib.Path):
        from emu_jax.data.clip_scores import load_scorer

        self._scorer = load_scorer(str(folder))
        weights = sorted(folder.glob("*.safetensors"))
        self.name = (
            "clip " + hashlib.sha256("".join(f"{f.name}{f.stat().st_size}" for f in weights).encode()).hexdigest()
        )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self._scorer.embed_images(images)


def index(questions: Sequence[Question], features: Features, folder: Path) -> np.ndarray:
    """Features of each question's image, or the mean over its images or frames: float32 [N, F] of unit length.

    An image is encoded once, however many questions show it. The result is cached in `folder` under a name that
    changes with the images and the features.
    """
    shown = [json.dumps([str(q.video), q.frames, [_name(image) for image in q.images]]) for q in questions]
    first = {what: number for number, what in reversed(list(enumerate(shown)))}
    rows = {what: row for row, what in enumerate(first)}
    digest = hashlib.sha256(json.dumps([features.name, list(first)]).encode()).hexdigest()[:16]
    file = folder / f"features-{digest}.npy"
    if not file.exists():
        found = _encoded([questions[number] for number in first.values()], features)
        folder.mkdir(parents=True, exist_ok=True)
        with write_atomically(file) as partial, partial.open("wb") as stream:
            np.save(stream, found)
    with file.open("rb") as stream:
        found = np.load(stream)
    if len(found) != len(first):
        raise UserError(f"{file}: holds {len(found)} features, expected {len(first)}; delete it")
    return found[[rows[what] for what in shown]]


def _name(image: Path | np.ndarray | StoredImage) -> str:
    return str(image) if isinstance(image, Path) else content_digest(image)


def _encoded(questions: Sequence[Question], features: Features) -> np.ndarray:
    """float32 [N, F] of unit length; `BATCH` images are in memory at a time."""
    shown = (
        (number, image)
        for number, question in enumerate(tqdm(questions, desc="examples", unit="image", leave=False))
        for image in read_images(question, features.size)
    )
    sums: np.ndarray | None = None
    while some := list(itertools.islice(shown, BATCH)):
        values = features(np.stack(pad_to([image for _, image in some], BATCH)))[: len(some)]
        sums = np.zeros((len(questions), values.shape[1]), np.float32) if sums is None else sums
        np.add.at(sums, [number for number, _ in some], values)
    if sums is None:
        raise UserError("few-shot examples are chosen by their images, but these questions show none")
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)


@dataclasses.dataclass(frozen=True)
class Rices:
    """Chooses the `count` questions of a pool whose images are most similar to a question's own.

    Attributes:
      pool: questions with answers.
      pool_features: float32 [P, F], of unit length.
      rows: by a question's id, its row in `features`.
      features: float32 [N, F], of unit length.
    """

    pool: Sequence[Question]
    pool_features: np.ndarray
    rows: dict[str, int]
    features: np.ndarray
    count: int

    def __call__(self, question: Question) -> list[tuple[Question, bool]]:
        """The examples, the most similar last (next to the question); never one with the question's own image."""
        similarity = self.pool_features @ self.features[self.rows[question.id]]  # [P]
        chosen: list[Question] = []
        for row in np.argsort(-similarity, kind="stable"):
            if len(chosen) == self.count:
                break
            if not _same(self.pool[row], question):
                chosen.append(self.pool[row])
        return [(example, True) for example in reversed(chosen)]


def _same(example: Question, question: Question) -> bool:
    """Whether both show the same images or video, so that the example's answer could reveal the question's."""
    if question.video is not None:
        return example.video == question.video
    ours, theirs = ([image for image in q.images if not isinstance(image, np.ndarray)] for q in (question, example))
    return bool(ours) and ours == theirs


def choose_examples(
    pool: Sequence[Question],
    questions: Sequence[Question],
    count: int,
    features: Features | None,
    folder: Path,
    *,
    text_examples: bool = False,
    seed: int = 0,
) -> ChooseExamples:
    """Returns a function from a question to its few-shot examples, each with whether its images are shown.

    Args:
      pool: questions to choose from.
      questions: all questions that will be asked.
      count: examples by RICES.
      features: required if `count` is not 0.
      folder: cache of features.
      text_examples: add two text-only examples in front, the same for all questions.

    Raises:
      UserError: the pool has too few answered questions.
    """
    answered = [question for question in pool if question.answers]
    needed = max(count + 1 if count else 0, TEXT_EXAMPLES if text_examples else 0)  # one may show the question's image
    if len(answered) < needed:
        raise UserError(
            f"{count} few-shot examples: {len(answered)} answered questions to choose from; expected {needed} or more"
        )
    texts: list[tuple[Question, bool]] = []
    if text_examples:
        picked = np.random.default_rng(seed).choice(len(answered), TEXT_EXAMPLES, replace=False)
        texts = [(answered[number], False) for number in picked]
    if not count:
        return lambda question: texts
    if features is None:
        raise UserError(f"{count} few-shot examples: features are missing; give those to compare images by")
    rices = Rices(
        answered,
        index(answered, features, folder),
        {question.id: row for row, question in enumerate(questions)},
        index(questions, features, folder),
        count,
    )
    return lambda question: texts + rices(question)
