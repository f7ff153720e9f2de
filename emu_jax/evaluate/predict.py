"""Runs a model over a benchmark's questions, in batches of one size, and appends its predictions to files.

    questions ─ images, read ahead by threads ─ prompts ─ calls of one kind, batched ─ Emu ─ predictions on disk

Prompts of several calls are interleaved: a call waits until a batch of its kind is full, whichever questions it comes
from. With N processes, each takes every N-th question.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from emu_jax.data.images import StoredImage
from emu_jax.data.padding import pad_to
from emu_jax.errors import UserError
from emu_jax.evaluate import predictions
from emu_jax.evaluate.prompts import Calls, Example, ModelCall, Prompt
from emu_jax.evaluate.question import Question
from emu_jax.evaluate.read_ahead import read_ahead
from emu_jax.generate.candidates import CandidateScores
from emu_jax.generate.messages import Video, read_video
from emu_jax.generate.model import Emu
from emu_jax.generate.prompt import ImageLike, read_image
from emu_jax.storage import Path, write_atomically

AHEAD = 2  # batches of questions whose images are read before they are needed
KEPT = 1024  # images of few-shot examples kept in memory: several questions show the same ones

ChooseExamples = Callable[[Question], list[tuple[Question, bool]]]  # each example with whether its images are shown


@dataclasses.dataclass(frozen=True)
class DrawingOutput:
    """Where a drawing prompt's PNG files go, and the settings of `Emu.generate_images`."""

    folder: Path
    settings: dict[str, Any]


def read_images(question: Question, size: int, reading: str = "upright") -> list[np.ndarray]:
    """A question's images, or the frames of its video: uint8 [size, size, 3] each.

    Args:
      reading: how images become pixels, one of `data.images.READINGS`.

    Raises:
      UserError: a file cannot be read; names it.
    """
    if question.video is not None:
        shown: Sequence[ImageLike] = read_video(Video(question.video, question.frames))
    else:
        shown = [image() if isinstance(image, StoredImage) else image for image in question.images]
    return [read_image(image, size, f"question {question.id}", reading) for image in shown]


@dataclasses.dataclass
class _Pending:
    """A question without a prediction yet: its prompt, the call that is due, and the results so far."""

    question: Question
    calls: Calls
    call: ModelCall
    results: list[Any]


def predict(
    emu: Emu,
    questions: Sequence[Question],
    prompt: Prompt,
    folder: Path,
    run: predictions.RunIdentity,
    *,
    choose: ChooseExamples = lambda question: [],
    batch: int = 16,
    part: tuple[int, int] = (0, 1),
    drawing: DrawingOutput | None = None,
) -> dict[str, Any]:
    """Predicts what `folder` does not hold yet; returns all its predictions by id, other processes' included.

    Args:
      choose: question -> its few-shot examples, each with whether its images are shown.
      batch: prompts at a time.
      part: this process's number, and the number of processes.
      drawing: for prompts that draw.

    Raises:
      UserError: the folder holds predictions of another run, or an image cannot be read.
    """
    if batch < 1:
        raise UserError(f"batch={batch}; expected at least 1")
    ids = [question.id for question in questions]
    done = predictions.read(folder, run, ids)
    own = [q for number, q in enumerate(questions) if number % part[1] == part[0] and q.id not in done]
    if not own:
        return done
    with (
        predictions.Writer(folder / f"{part[0]}-of-{part[1]}.jsonl", run) as writer,
        tqdm(total=len(own), desc=run.name, unit="question") as bar,
    ):
        for finished in _answers(emu, own, prompt, choose, run, batch, drawing):
            writer.write(finished)
            done |= {record["id"]: record["prediction"] for record in finished}
            bar.update(len(finished))
    return done


def _answers(
    emu: Emu,
    questions: Sequence[Question],
    prompt: Prompt,
    choose: ChooseExamples,
    run: predictions.RunIdentity,
    batch: int,
    drawing: DrawingOutput | None,
) -> Iterator[list[dict[str, Any]]]:
    """Records of the questions that each batch finishes."""
    waiting: dict[Any, list[_Pending]] = collections.defaultdict(list)  # by kind of call
    started = _start(questions, prompt, choose, run, emu.config.vision.image_size, batch)
    more = True
    while True:
        while more and max(map(len, waiting.values()), default=0) < batch:
            pending = next(started, None)
            if pending is None:
                more = False
            else:
                waiting[_kind(pending.call)].append(pending)
        if not any(waiting.values()):
            return
        fullest = max(waiting, key=lambda kind: len(waiting[kind]))
        some, waiting[fullest] = waiting[fullest][:batch], waiting[fullest][batch:]
        finished = []
        for pending, result in zip(some, _call_model(emu, some, batch, drawing), strict=True):
            pending.results.append(result.sums.tolist() if isinstance(result, CandidateScores) else result)
            try:
                pending.call = pending.calls.send(result)
                waiting[_kind(pending.call)].append(pending)
            except StopIteration as end:
                record = {"id": pending.question.id, "prediction": end.value}
                finished.append(record | ({} if pending.call.candidates else {"said": pending.results}))
        if finished:
            yield finished


def _start(
    questions: Sequence[Question],
    prompt: Prompt,
    choose: ChooseExamples,
    run: predictions.RunIdentity,
    size: int,
    batch: int,
) -> Iterator[_Pending]:
    """Questions at their first call; threads read their images ahead of time."""
    known: dict[str, Question] = {}
    images = functools.lru_cache(maxsize=KEPT)(lambda id: read_images(known[id], size, run.image_reading))

    def example(question: Question, shown: bool) -> Example:
        known[question.id] = question
        return question, images(question.id) if shown else ()

    def start(question: Question) -> _Pending:
        examples = [example(*chosen) for chosen in choose(question)]
        calls = prompt(question, read_images(question, size, run.image_reading), examples, run.chat)
        return _Pending(question, calls, next(calls), [])

    return read_ahead(start, questions, AHEAD * batch)


def _kind(call: ModelCall) -> Any:
    """Calls of one kind share a batch."""
    return call.draws, bool(call.candidates), tuple(sorted(call.decoding.items()))


def _call_model(emu: Emu, some: Sequence[_Pending], batch: int, drawing: DrawingOutput | None) -> list[Any]:
    """The model's results for calls of one kind."""
    filled = pad_to(some, batch)
    prompts = [pending.call.parts for pending in filled]
    call = some[0].call
    if call.draws:
        return _draw(emu, some, filled, drawing)
    if call.candidates:
        return emu.score_candidate_lists(prompts, [pending.call.candidates for pending in filled])[: len(some)]
    return [result.text for result in emu.generate_text(prompts, **call.decoding)][: len(some)]


def _draw(emu: Emu, some: Sequence[_Pending], filled: Sequence[_Pending], drawing: DrawingOutput | None) -> list[str]:
    """Draws and writes PNG files, each completely or not at all; returns their names, "00000/0002.png" for such an id.

    Raises:
      UserError: `drawing` is missing, or an id leads out of its folder.
    """
    if drawing is None:
        raise UserError("the prompt draws images, but `drawing` is missing; give their folder and settings")
    names = [_file_name(pending.question.id) for pending in some]
    # A caption's image depends on its id only, not on the batch or the process that draws it.
    seeds = [zlib.crc32(pending.question.id.encode()) for pending in filled]
    drawn = emu.generate_images([pending.call.parts for pending in filled], seeds=seeds, **drawing.settings)
    for name, result in zip(names, drawn, strict=False):
        file = drawing.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(file) as partial:
            result.image.save(partial, "PNG")
    return names


def _file_name(id: str) -> str:
    """The name of a question's drawing; "/" in its id makes folders."""
    if "\0" in id or any(part in ("", ".", "..") for part in id.split("/")):
        raise UserError(
            f"question {id!a}: its drawing would be stored out of its folder; expected an id such as 42 or 42/3"
        )
    return f"{id}.png"
