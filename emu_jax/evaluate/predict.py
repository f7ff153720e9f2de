"""Runs a model over a benchmark's questions, in batches of one size, and appends what it says.

    questions ─ images, read ahead by threads ─ prompts ─ steps of one kind, batched ─ Emu ─ predictions on disk

Prompts of several steps go on side by side: a step waits until a batch of its kind is full, whatever questions it
belongs to. Of N processes each takes every N-th question.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from emu_jax.errors import UserError
from emu_jax.evaluate import predictions
from emu_jax.evaluate.prompts import Asked, Example, Prompt, Step
from emu_jax.evaluate.question import Question
from emu_jax.generate.messages import Video, read_video
from emu_jax.generate.model import Emu
from emu_jax.generate.prompt import ImageLike, read_image

READERS = 4  # threads
AHEAD = 2  # batches of questions whose images are read before they are needed
KEPT = 1024  # images of examples kept, as several questions show them


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How a step that draws is drawn: the folder of its PNG files and settings of `Emu.generate_images`."""

    folder: Path
    settings: dict[str, Any]


def read_images(question: Question, size: int) -> list[np.ndarray]:
    """What a question shows: uint8 [size, size, 3] each; of a video, 8 frames.

    Raises:
      UserError: naming the file.
    """
    if question.video is not None:
        shown: Sequence[ImageLike] = read_video(Video(question.video))
    else:
        shown = question.images
    return [read_image(image, size, f"question {question.id}") for image in shown]


@dataclasses.dataclass
class _Asking:
    """A question on its way."""

    question: Question
    asked: Asked
    step: Step
    said: list[Any]


def predict(
    emu: Emu,
    questions: Sequence[Question],
    prompt: Prompt,
    folder: Path,
    run: predictions.Run,
    *,
    choose: Callable[[Question], list[tuple[Question, bool]]] = lambda question: [],
    batch: int = 16,
    part: tuple[int, int] = (0, 1),
    drawing: Drawing | None = None,
) -> dict[str, Any]:
    """Predicts what `folder` does not hold yet; returns all its predictions by id, other processes' included.

    Args:
      choose: question -> its examples, each with whether its images are shown.
      batch: prompts at a time.
      part: this process's number, and how many there are.
      drawing: for prompts that draw.

    Raises:
      UserError: the folder holds predictions of something else, or an image cannot be read.
    """
    if batch < 1:
        raise UserError(f"--batch {batch}; expected at least 1")
    ids = [question.id for question in questions]
    done = predictions.read(folder, run, ids)
    own = [q for number, q in enumerate(questions) if number % part[1] == part[0] and q.id not in done]
    if not own:
        return done
    with (
        predictions.Writer(folder / f"{part[0]}-of-{part[1]}.jsonl", run) as writer,
        tqdm(total=len(own), desc=run.name, unit="question") as bar,
    ):
        for finished in _answers(emu, own, prompt, choose, run.chat, batch, drawing):
            writer.write(finished)
            done |= {record["id"]: record["prediction"] for record in finished}
            bar.update(len(finished))
    return done


def _answers(
    emu: Emu,
    questions: Sequence[Question],
    prompt: Prompt,
    choose: Callable[[Question], list[tuple[Question, bool]]],
    chat: bool,
    batch: int,
    drawing: Drawing | None,
) -> Iterator[list[dict[str, Any]]]:
    """Records of the questions that a batch has finished, in batches."""
    waiting: dict[Any, list[_Asking]] = collections.defaultdict(list)  # by kind of step
    beginnings = _begin(questions, prompt, choose, chat, emu.config.vision.image_size, batch)
    more = True
    while True:
        while more and max(map(len, waiting.values()), default=0) < batch:
            asking = next(beginnings, None)
            if asking is None:
                more = False
            else:
                waiting[_kind(asking.step)].append(asking)
        if not any(waiting.values()):
            return
        fullest = max(waiting, key=lambda kind: len(waiting[kind]))
        some, waiting[fullest] = waiting[fullest][:batch], waiting[fullest][batch:]
        finished = []
        for asking, result in zip(some, _run(emu, some, batch, drawing), strict=True):
            asking.said.append(result.tolist() if isinstance(result, np.ndarray) else result)
            try:
                asking.step = asking.asked.send(result)
                waiting[_kind(asking.step)].append(asking)
            except StopIteration as end:
                value = end.value.tolist() if isinstance(end.value, np.ndarray) else end.value
                record = {"id": asking.question.id, "prediction": value}
                finished.append(record | ({} if asking.step.candidates else {"said": asking.said}))
        if finished:
            yield finished


def _begin(
    questions: Sequence[Question],
    prompt: Prompt,
    choose: Callable[[Question], list[tuple[Question, bool]]],
    chat: bool,
    size: int,
    batch: int,
) -> Iterator[_Asking]:
    """Questions at their first step, their images read ahead of time."""
    known: dict[str, Question] = {}
    images = functools.lru_cache(maxsize=KEPT)(lambda id: read_images(known[id], size))

    def example(question: Question, shown: bool) -> Example:
        known[question.id] = question
        return question, images(question.id) if shown else ()

    def begin(question: Question) -> _Asking:
        examples = [example(*chosen) for chosen in choose(question)]
        asked = prompt(question, read_images(question, size), examples, chat)
        return _Asking(question, asked, next(asked), [])

    with ThreadPoolExecutor(READERS) as threads:
        ahead: collections.deque[Future[_Asking]] = collections.deque()
        coming = iter(questions)
        try:
            while True:
                while len(ahead) < AHEAD * batch and (question := next(coming, None)) is not None:
                    ahead.append(threads.submit(begin, question))
                if not ahead:
                    return
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _kind(step: Step) -> Any:
    """Steps of one kind share a batch."""
    return step.draws, bool(step.candidates), tuple(sorted(step.decoding.items()))


def _run(emu: Emu, some: Sequence[_Asking], batch: int, drawing: Drawing | None) -> list[Any]:
    """What the model makes of steps of one kind; the batch is filled up with the last one: one shape, one program."""
    filled = [*some, *[some[-1]] * (batch - len(some))]
    prompts = [asking.step.parts for asking in filled]
    step = some[0].step
    if step.draws:
        return _draw(emu, some, filled, drawing)
    if step.candidates:
        return emu.score_candidate_lists(prompts, [asking.step.candidates for asking in filled])[: len(some)]
    return [result.text for result in emu.generate_text(prompts, **step.decoding)][: len(some)]


def _draw(emu: Emu, some: Sequence[_Asking], filled: Sequence[_Asking], drawing: Drawing | None) -> list[str]:
    """Draws and writes PNG files, whole or not at all; returns their names."""
    if drawing is None:
        raise UserError("a prompt draws, but nothing says where to; give `drawing`")
    drawing.folder.mkdir(parents=True, exist_ok=True)
    # A caption's image depends on its id alone, not on the batch or the process that draws it.
    seeds = [zlib.crc32(asking.question.id.encode()) for asking in filled]
    drawn = emu.generate_images([asking.step.parts for asking in filled], seeds=seeds, **drawing.settings)
    names = []
    for asking, result in zip(some, drawn, strict=False):
        name = f"{asking.question.id}.png"
        partial = drawing.folder / f"{name}.partial"
        result.image.save(partial, "PNG")
        partial.replace(drawing.folder / name)
        names.append(name)
    return names
