"""Benchmarks over one model: predictions, scores and submissions in a folder that a killed run goes on with.

OUT/coco-test-4shot/0-of-1.jsonl       predictions (predictions.py)
OUT/coco-test-4shot/scores.json        figures with intervals, and what they are of
OUT/coco-test-4shot/submission.json    in the format of the benchmark's server, where it has one
OUT/coco_drawing-val2014-0shot/drawn   PNG files
OUT/features/                          of the images that examples are chosen by
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emu_jax.errors import UserError
from emu_jax.evaluate import few_shot as shots
from emu_jax.evaluate import predictions
from emu_jax.evaluate.benchmarks.benchmark import Benchmark
from emu_jax.evaluate.benchmarks.names import find_benchmark
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics.ranking import ranks
from emu_jax.evaluate.predict import Drawing, predict
from emu_jax.evaluate.prompts import PROMPTS
from emu_jax.evaluate.question import Question
from emu_jax.evaluate.scores import Weights, score
from emu_jax.generate.model import Emu

TASK_PROMPTS = {"video_qa": "vqa", "open": "open_ended"}  # others are called as their task


@dataclasses.dataclass(frozen=True)
class Request:
    """What to evaluate.

    Attributes:
      benchmarks: names. data: folder that holds each benchmark's files, in a folder of its name or themselves.
      split: "" for each benchmark's own. shots: numbers of examples, each a run.
      text_examples: whether two text-only examples stand in front (the paper's *).
      limit: of questions, the first ones; 0 for all.
      batch: prompts at a time. part: this process's number, and how many there are.
      rices: folder of a CLIP to choose examples by; None: by the model's own encoder.
      drawing: settings of `Emu.generate_images`.
    """

    benchmarks: Sequence[str]
    data: Path | None = None
    split: str = ""
    shots: Sequence[int] = (0,)
    text_examples: bool = False
    limit: int = 0
    batch: int = 16
    part: tuple[int, int] = (0, 1)
    rices: Path | None = None
    weights: Weights = dataclasses.field(default_factory=Weights)
    drawing: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in self.benchmarks:
            benchmark = find_benchmark(name)
            if self.data is None and benchmark.task != "embedded":
                raise UserError(
                    f"--benchmark {name}: give --data, a folder with {'; '.join(benchmark.tree)} (official files: "
                    f"{benchmark.described})"
                )
            if (any(self.shots) or self.text_examples) and not benchmark.shots:
                raise UserError(f"--benchmark {name}: has no split to take examples from; use --shots 0 alone")
        if min(self.shots, default=-1) < 0 or self.limit < 0 or self.batch < 1:
            raise UserError(f"--shots {list(self.shots)} --limit {self.limit} --batch {self.batch}: expected 0 or more")


@dataclasses.dataclass(frozen=True)
class Result:
    """One run's figures; {} where other processes still predict, or only the benchmark's server can score."""

    run: predictions.Run
    figures: dict[str, Figure]
    folder: Path
    waits: bool = False


def evaluate(emu: Emu, request: Request, out: Path) -> Iterator[Result]:
    """Runs every benchmark with every number of examples, and yields each when it is scored."""
    for name in request.benchmarks:
        benchmark = find_benchmark(name)
        root = folder_of(benchmark, request.data)
        if benchmark.task == "drawing":
            emu.check_drawing(*(request.drawing[field] for field in ("sampler", "steps", "guidance")))
        questions = benchmark.read(root, request.split)[: request.limit or None]
        pool = benchmark.read(root, benchmark.shots) if any(request.shots) or request.text_examples else []
        for count in request.shots:
            yield _run(emu, benchmark, questions, pool, count, request, root, out)


def folder_of(benchmark: Benchmark, data: Path | None) -> Path:
    """The benchmark's folder in `data`, or `data` itself."""
    data = data or Path()
    return data / benchmark.name if (data / benchmark.name).is_dir() else data


def _run(
    emu: Emu,
    benchmark: Benchmark,
    questions: Sequence[Question],
    pool: Sequence[Question],
    count: int,
    request: Request,
    root: Path,
    out: Path,
) -> Result:
    features: shots.Features | None = None
    if count:
        features = shots.EncoderFeatures(emu) if request.rices is None else shots.ClipFeatures(request.rices)
    shown = count or request.text_examples
    run = predictions.Run(
        benchmark=benchmark.name,
        split=request.split or benchmark.split,
        shots=count,
        # Without examples it does not matter which there are: 0 shots are one run, alone or beside 4.
        examples=f"{features.name if features else ''} {_digest(pool) if pool and shown else ''}".strip(),
        text_examples=request.text_examples,
        chat=emu.tokenizer.instruct,
        model=emu.fingerprint,
        questions=_digest(questions),
        drawing=_told(request.drawing) if benchmark.task == "drawing" else "",
    )
    folder = out / run.name
    choose = shots.choose_examples(
        pool, questions, count, features, out / "features", text_examples=request.text_examples
    )
    prompt = PROMPTS["vizwiz" if benchmark.name == "vizwiz" else TASK_PROMPTS.get(benchmark.task, benchmark.task)]
    drawing = Drawing(folder / "drawn", request.drawing)
    settings: dict[str, Any] = {"choose": choose, "batch": request.batch, "part": request.part, "drawing": drawing}
    found = predict(emu, questions, prompt, folder, run, **settings)
    found |= predictions.read(folder, run, [question.id for question in questions])  # others' that came meanwhile
    if any(question.id not in found for question in questions):
        return Result(run, {}, folder, waits=True)
    if benchmark.submission is not None:
        ranked = benchmark.task == "dialogue"
        answers = {id: ranks(np.asarray(p)).tolist() for id, p in found.items()} if ranked else found
        benchmark.write_submission(folder / "submission.json", questions, answers)
    figures = score(benchmark, questions, found, root=root, weights=request.weights, emu=emu, drawn=folder / "drawn")
    _write_scores(folder / "scores.json", run, figures)
    return Result(run, figures, folder)


def _told(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def _digest(questions: Sequence[Question]) -> str:
    """Tells sets of questions apart: SHA-256 over ids, texts, answers and names of images."""
    digest = hashlib.sha256()
    for q in questions:
        images = [p.name if isinstance(p, Path) else hashlib.sha256(p.tobytes()).hexdigest() for p in q.images]
        video = q.video.name if q.video else ""
        digest.update(json.dumps([q.id, q.text, q.answers, q.history, q.candidates, images, video]).encode())
    return digest.hexdigest()[:16]


def _write_scores(file: Path, run: predictions.Run, figures: dict[str, Figure]) -> None:
    record = {
        "run": dataclasses.asdict(run),
        "figures": {name: dataclasses.asdict(figure) for name, figure in figures.items()},
    }
    partial = file.with_suffix(".json.partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)
