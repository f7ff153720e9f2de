"""Examples in front of a question: those whose images are most like its own (RICES, Yang et al. 2022), or text alone.

    images ─ features [N, F], of unit length ─ a file, built once ─ Rices: question -> examples, the nearest last

Features are the model's own encoder's, or a CLIP's whose weights the user gives.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from tqdm import tqdm

from emu_jax.errors import UserError
from emu_jax.evaluate.predict import read_images
from emu_jax.evaluate.question import Question
from emu_jax.generate.model import Emu
from emu_jax.models import emu as model

BATCH = 64  # images encoded at a time
TEXT_EXAMPLES = 2  # of the paper's *


class Features(Protocol):
    """Images -> what they are compared by."""

    name: str  # changes when the features do
    size: int  # pixels of a side that images are read at

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
        self._encode = jax.jit(
            lambda params, x: model.bind(config, params).encode(model.normalise_pixels(x, config))["ln_visual"].mean(1)
        )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self._encode(self._params, images), np.float32)  # [N, P+1, Dv] -> [N, Dv]


class ClipFeatures:
    """A CLIP's, from a folder of its published files (the extra `clip`)."""

    size = 224

    def __init__(self, folder: Path):
        from emu_jax.data.clip_scores import load_scorer

        self._scorer = load_scorer(str(folder))
        weights = sorted(folder.glob("*.safetensors"))
        self.name = (
            "clip " + hashlib.sha256("".join(f"{f.name}{f.stat().st_size}" for f in weights).encode()).hexdigest()
        )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self._scorer.embed_images(images)


def index(questions: Sequence[Question], features: Features, folder: Path) -> np.ndarray:
    """Features of what each question shows, float32 [N, F] of unit length; of a video, the mean of its frames.

    An image is encoded once, however many questions show it. Stored in `folder` under a name that changes with the
    images and the features, and read again from there.
    """
    shown = [json.dumps([str(q.video), [_name(image) for image in q.images]]) for q in questions]
    first = {what: place for place, what in reversed(list(enumerate(shown)))}
    places = {what: row for row, what in enumerate(first)}
    digest = hashlib.sha256(json.dumps([features.name, list(first)]).encode()).hexdigest()[:16]
    file = folder / f"features-{digest}.npy"
    if not file.exists():
        found = _encoded([questions[place] for place in first.values()], features)
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial.npy")
        np.save(partial, found)
        partial.replace(file)
    found = np.load(file)
    if len(found) != len(first):
        raise UserError(f"{file}: holds {len(found)} features, expected {len(first)}; delete it")
    return found[[places[what] for what in shown]]


def _name(image: Path | np.ndarray) -> str:
    return str(image) if isinstance(image, Path) else hashlib.sha256(image.tobytes()).hexdigest()


def _encoded(questions: Sequence[Question], features: Features) -> np.ndarray:
    """float32 [N, F] of unit length; `BATCH` images are in memory at a time."""
    sums: np.ndarray | None = None

    def add(some: list[tuple[int, np.ndarray]]) -> None:
        nonlocal sums
        filled = np.stack([image for _, image in some] + [some[-1][1]] * (BATCH - len(some)))
        values = features(filled)[: len(some)]
        sums = np.zeros((len(questions), values.shape[1]), np.float32) if sums is None else sums
        np.add.at(sums, [place for place, _ in some], values)

    some: list[tuple[int, np.ndarray]] = []
    for place, question in enumerate(tqdm(questions, desc="examples", unit="image", leave=False)):
        for image in read_images(question, features.size):
            some.append((place, image))
            if len(some) == BATCH:
                add(some)
                some = []
    if some:
        add(some)
    if sums is None:
        raise UserError("examples are chosen by their images, but these questions show none")
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)


@dataclasses.dataclass(frozen=True)
class Rices:
    """Chooses the `shots` questions of a pool whose images are most like a question's own.

    Attributes:
      pool: questions with answers. pool_features: float32 [P, F], of unit length.
      places: of each question's id the row of `features` float32 [N, F].
    """

    pool: Sequence[Question]
    pool_features: np.ndarray
    places: dict[str, int]
    features: np.ndarray
    shots: int

    def __call__(self, question: Question) -> list[tuple[Question, bool]]:
        """The examples, the most similar last, next to the question; never the question's own image."""
        similarity = self.pool_features @ self.features[self.places[question.id]]  # [P]
        chosen: list[Question] = []
        for place in np.argsort(-similarity, kind="stable"):
            if len(chosen) == self.shots:
                break
            if not _same(self.pool[place], question):
                chosen.append(self.pool[place])
        return [(example, True) for example in reversed(chosen)]


def _same(example: Question, question: Question) -> bool:
    """Whether both show the same thing, so that one's answer may tell the other's."""
    if question.video is not None:
        return example.video == question.video
    ours, theirs = ([p for p in q.images if isinstance(p, Path)] for q in (question, example))
    return bool(ours) and ours == theirs


def choose_examples(
    pool: Sequence[Question],
    questions: Sequence[Question],
    shots: int,
    features: Features | None,
    folder: Path,
    *,
    text_examples: bool = False,
    seed: int = 0,
) -> Callable[[Question], list[tuple[Question, bool]]]:
    """What gives each question its examples: `shots` by RICES; or two text-only ones, the same for all questions.

    Raises:
      UserError: the pool has too few answered questions.
    """
    answered = [question for question in pool if question.answers]
    needed = max(shots + 1 if shots else 0, TEXT_EXAMPLES if text_examples else 0)  # one may be the question's own
    if len(answered) < needed:
        raise UserError(
            f"--shots {shots}: {len(answered)} answered questions to choose from; expected {needed} or more"
        )
    texts: list[tuple[Question, bool]] = []
    if text_examples:
        picked = np.random.default_rng(seed).choice(len(answered), TEXT_EXAMPLES, replace=False)
        texts = [(answered[place], False) for place in picked]
    if not shots:
        return lambda question: texts
    if features is None:
        raise UserError(f"--shots {shots}: no features to compare images by")
    rices = Rices(
        answered,
        index(answered, features, folder),
        {question.id: place for place, question in enumerate(questions)},
        index(questions, features, folder),
        shots,
    )
    return lambda question: texts + rices(question)
