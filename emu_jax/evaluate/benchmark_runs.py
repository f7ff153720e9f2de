"""Benchmarks over one model: predictions, scores and submissions in a folder from which a killed run resumes.

OUT/coco-test-4shot/0-of-1.jsonl       predictions (predictions.py)
OUT/coco-test-4shot/scores.json        figures with intervals, the run that they belong to, and what is missing
OUT/coco-test-4shot/submission.json    in the format of the benchmark's server, if it has one
OUT/coco_drawing-val2014-0shot/drawn   PNG files
OUT/features/                          features of the images that few-shot examples are chosen by
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from emu_jax.data.decoding import READINGS
from emu_jax.errors import UserError
from emu_jax.evaluate import few_shot, predictions
from emu_jax.evaluate.benchmarks.benchmark import Benchmark, Scoring, Weights
from emu_jax.evaluate.benchmarks.registry import find_benchmark
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics.drawings import check_unfiltered
from emu_jax.evaluate.metrics.figures import Missing
from emu_jax.evaluate.predict import DrawingOutput, predict
from emu_jax.evaluate.question import Question, content_digest
from emu_jax.generate.decoder import Drawing
from emu_jax.generate.model import Emu
from emu_jax.storage import Path, replace_text


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What to evaluate.

    Attributes:
      benchmarks: names in the registry.
      data: folder of the benchmarks' files: either it has a folder of each benchmark's name, or it is that folder.
      split: "" for each benchmark's default split.
      few_shot: numbers of few-shot examples; each is a run.
      text_examples: whether two text-only examples start each prompt (the paper's *).
      frames: images that are shown of a video.
      image_reading: how images become pixels, one of `data.images.READINGS`.
      limit: use only this many questions, the first ones; 0 for all.
      batch: prompts at a time.
      part: this process's number, and the number of processes.
      rices: folder of a CLIP to choose examples by; None: by the model's own encoder.
      weights: files that some metrics need.
      drawing: settings of `Emu.generate_images`.
    """

    benchmarks: Sequence[str]
    data: Path | None = None
    split: str = ""
    few_shot: Sequence[int] = (0,)
    text_examples: bool = False
    frames: int = 8
    image_reading: str = "upright"
    limit: int = 0
    batch: int = 16
    part: tuple[int, int] = (0, 1)
    rices: pathlib.Path | None = None
    weights: Weights = dataclasses.field(default_factory=Weights)
    drawing: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in self.benchmarks:
            benchmark = find_benchmark(name)
            if self.data is None and benchmark.tree:
                raise UserError(
                    f"benchmark {name}: data is missing; give a folder with {'; '.join(benchmark.tree)} (official "
                    f"files: {benchmark.described})"
                )
            if (any(self.few_shot) or self.text_examples) and not benchmark.few_shot_split:
                raise UserError(f"benchmark {name}: has no split to take few-shot examples from; ask for 0 examples")
        if self.image_reading not in READINGS:
            raise UserError(f"image_reading={self.image_reading!r}: expected one of {', '.join(READINGS)}")
        if self.frames < 1:
            raise UserError(f"frames={self.frames}: expected 1 or more images of a video")
        if min(self.few_shot, default=-1) < 0 or self.limit < 0 or self.batch < 1:
            raise UserError(
                f"few_shot={list(self.few_shot)} limit={self.limit} batch={self.batch}: expected 0 or more examples "
                "and questions, and a batch of 1 or more"
            )


@dataclasses.dataclass(frozen=True)
class Result:
    """One run's figures; {} if other processes still predict (`waits`), or if only the benchmark's server scores.

    Attributes:
      missing: figures that could not be computed, with the reason; the same command computes them once it is mended.
    """

    run: predictions.RunIdentity
    figures: dict[str, Figure]
    folder: Path
    waits: bool = False
    missing: Missing = dataclasses.field(default_factory=dict)


def evaluate(emu: Emu, config: EvaluationConfig, out: Path) -> Iterator[Result]:
    """Runs every benchmark with every number of few-shot examples, and yields each run when it is scored."""
    for name in config.benchmarks:
        benchmark = find_benchmark(name)
        root = find_root(benchmark, config.data)
        if benchmark.predicts == "image":
            emu.check_drawing(Drawing(**config.drawing))
            check_unfiltered(emu, out)
        questions = _with_frames(benchmark.read(root, config.split)[: config.limit or None], config.frames)
        shows_examples = any(config.few_shot) or config.text_examples
        pool = _with_frames(benchmark.read(root, benchmark.few_shot_split), config.frames) if shows_examples else []
        _check_length(emu, benchmark, questions, pool, max(config.few_shot))
        for count in config.few_shot:
            yield _run(emu, benchmark, questions, pool, count, config, root, out)


def _with_frames(questions: Sequence[Question], frames: int) -> list[Question]:
    return [dataclasses.replace(q, frames=frames) if q.video is not None else q for q in questions]


def _check_length(
    emu: Emu, benchmark: Benchmark, questions: Sequence[Question], pool: Sequence[Question], examples: int
) -> None:
    """Raises UserError if the images of a question and its examples alone are longer than the model's context."""

    def shown(some: Sequence[Question]) -> int:
        return max((len(q.images) if q.video is None else q.frames for q in some), default=0)

    of_one, context = emu.config.causal.queries + 2, emu.config.llama.context  # [IMG] and [/IMG] too
    images = shown(questions) + examples * shown(pool)
    if images * of_one > context:
        asks = f"{examples} examples and the question show {images} images" if examples else f"it shows {images} images"
        fewer = "--frames" if any(q.video is not None for q in questions) else "--shots"
        raise UserError(
            f"benchmark {benchmark.name}: {asks}, {images * of_one:,} of the {context:,} tokens that the model takes; "
            f"expected room for text as well: ask for fewer ({fewer})"
        )


def find_root(benchmark: Benchmark, data: Path | None) -> Path:
    """The folder of the benchmark's name in `data` or, if there is none, `data` itself."""
    data = data or pathlib.Path()
    return data / benchmark.name if (data / benchmark.name).is_dir() else data


def _run(
    emu: Emu,
    benchmark: Benchmark,
    questions: Sequence[Question],
    pool: Sequence[Question],
    count: int,
    config: EvaluationConfig,
    root: Path,
    out: Path,
) -> Result:
    features: few_shot.Features | None = None
    if count:
        features = few_shot.EncoderFeatures(emu) if config.rices is None else few_shot.ClipFeatures(config.rices)
    shown = count or config.text_examples
    run = predictions.RunIdentity(
        benchmark=benchmark.name,
        split=config.split or benchmark.split,
        shots=count,
        # Zero-shot predictions do not depend on the pool, which is empty if no other run shows examples.
        examples=f"{features.name if features else ''} {_digest(pool) if pool and shown else ''}".strip(),
        text_examples=config.text_examples,
        chat=emu.tokenizer.instruct,
        model=emu.fingerprint,
        questions=_digest(questions),
        drawing=_describe(config.drawing) if benchmark.predicts == "image" else "",
        image_reading=config.image_reading,
    )
    folder = out / run.name
    choose = few_shot.choose_examples(
        pool, questions, count, features, out / "features", text_examples=config.text_examples
    )
    drawing = DrawingOutput(folder / "drawn", config.drawing)
    settings: dict[str, Any] = {"choose": choose, "batch": config.batch, "part": config.part, "drawing": drawing}
    found = predict(emu, questions, benchmark.prompt, folder, run, **settings)
    found |= predictions.read(folder, run, [question.id for question in questions])  # other processes' since then
    if any(question.id not in found for question in questions):
        return Result(run, {}, folder, waits=True)
    if benchmark.submission is not None:
        answers = {question.id: benchmark.answer(question, found[question.id]) for question in questions}
        benchmark.write_submission(folder / "submission.json", questions, answers)
    scoring = Scoring(root, folder / "drawn", config.weights, emu)
    figures = benchmark.score(questions, found, scoring)
    _write_scores(folder / "scores.json", run, figures, scoring.missing)
    return Result(run, figures, folder, missing=scoring.missing)


def _describe(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def _digest(questions: Sequence[Question]) -> str:
    """Fingerprint of a set of questions: SHA-256 over ids, texts, answers and names of images."""
    digest = hashlib.sha256()
    for q in questions:
        images = [image.name if isinstance(image, Path) else content_digest(image) for image in q.images]
        video = [q.video.name, q.frames] if q.video else ""
        hint = [q.hint] if q.hint else []  # few have one: the others' fingerprints are as they were without it
        digest.update(json.dumps([q.id, q.text, q.answers, q.history, q.candidates, images, video, *hint]).encode())
    return digest.hexdigest()[:16]


def _write_scores(file: Path, run: predictions.RunIdentity, figures: dict[str, Figure], missing: Missing) -> None:
    record: dict[str, Any] = {
        "run": dataclasses.asdict(run),
        "figures": {name: dataclasses.asdict(figure) for name, figure in figures.items()},
    }
    if missing:
        record["missing"] = missing
    replace_text(file, json.dumps(record, indent=2) + "\n")
