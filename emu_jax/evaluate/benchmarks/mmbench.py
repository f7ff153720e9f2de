"""MMBench: questions with two to four options, each asked again with its options rotated (CircularEval).

`MMBench_DEV_EN.tsv`, tab-separated values, used are the columns
    index, image, question, hint, A, B, C, D, answer, category, l2-category
An image is a JPEG in base64, or the index of the row that has it (at most 64 characters). The rotations of a question
have its index plus a million each. A cell that is empty or "nan" holds nothing. Files for the test splits have no
column `answer`; files of before 2023-12 have an image in each row. Questions are in the files' order, each followed by
its rotations.

The split is the file: version 1.0 or 1.1 (`v11`), English or Chinese. A folder that holds several releases of a split
is read from the first in this list:
    MMBench_DEV_EN.tsv, MMBench_DEV_EN_legacy.tsv, mmbench_dev_en_20231003.tsv, mmbench_dev_20230712.tsv

The official program (VLMEvalKit, vlmeval/dataset/utils/multiple_choice.py) has a model generate an answer, finds an
option in it, and counts a question if the answers to all its rotations are right: `CircularEval`, over all questions,
by the six abilities of l2-category and by category. Here the options' letters are scored after VLMEvalKit's prompt, so
that every answer is an option. Its accuracy without rotations ("vanilla") is over the rows with the options in their
first order. The layout is that of VLMEvalKit's reader; the files themselves were not seen (unverified).

The server takes Excel files, which are not written: letters are the highest scores in the predictions.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from emu_jax.data.images import StoredImage
from emu_jax.evaluate import intervals
from emu_jax.evaluate.benchmarks.benchmark import Benchmark, Scoring
from emu_jax.evaluate.formats.files import Entry, Files, unique
from emu_jax.evaluate.formats.tables import read_table
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics.figures import by_kind, check
from emu_jax.evaluate.multiple_choice import (
    BY_LETTER,
    by_every_rule,
    chances,
    checked_letter,
    checked_options,
    is_right,
    letters,
    listed,
)
from emu_jax.evaluate.prompts import Calls, Example, ModelCall, Part, chat_prompt, join
from emu_jax.evaluate.question import Question

COLUMNS = ("index", "image", "question", "A", "B", "C", "D", "category", "l2-category")
FILES = {
    "dev": (
        "MMBench_DEV_EN.tsv",
        "MMBench_DEV_EN_legacy.tsv",
        "mmbench_dev_en_20231003.tsv",
        "mmbench_dev_20230712.tsv",
    ),
    "test": (
        "MMBench_TEST_EN.tsv",
        "MMBench_TEST_EN_legacy.tsv",
        "mmbench_test_en_20231003.tsv",
        "mmbench_test_20230712.tsv",
    ),
    "dev-cn": ("MMBench_DEV_CN.tsv", "MMBench_DEV_CN_legacy.tsv", "mmbench_dev_cn_20231003.tsv"),
    "test-cn": ("MMBench_TEST_CN.tsv", "MMBench_TEST_CN_legacy.tsv", "mmbench_test_cn_20231003.tsv"),
    "dev-v11": ("MMBench_DEV_EN_V11.tsv",),
    "test-v11": ("MMBench_TEST_EN_V11.tsv",),
    "dev-cn-v11": ("MMBench_DEV_CN_V11.tsv",),
    "test-cn-v11": ("MMBench_TEST_CN_V11.tsv",),
}
OPTIONS = ("A", "B", "C", "D")
REFERENCE = 64  # characters that a reference to another row has at most
ROTATION = 1_000_000
SEPARATOR = " / "  # between l2-category and category in a kind


def _read(files: Files, split: str) -> list[Question]:
    path = files.find(*FILES[split])
    images: dict[int, StoredImage] = {}
    known: dict[bytes, StoredImage] = {}  # older files repeat an image in every rotation
    rows = []
    for row in read_table(path, COLUMNS, separator="\t"):
        index, cell = _whole(row, "index"), row.text("image")
        if len(cell) > REFERENCE:
            image = _image(row, cell)
            images.setdefault(index, known.setdefault(image.data, image))
            row.fields["image"] = str(index)
        rows.append(row)
    questions = {}
    for index, row in unique(rows, lambda row: _whole(row, "index"), "index").items():
        if (image := images.get(_whole(row, "image"))) is None:
            raise row.wrong("image", "an image in base64, or the index of a row that has one")
        questions[index] = _question(str(index), row, image)
    place = {index: number for number, index in enumerate(questions)}
    counted = [index for index in questions if index % ROTATION in place]  # the others are no official question's
    return [questions[index] for index in sorted(counted, key=lambda index: (place[index % ROTATION], index))]


def _question(id: str, row: Entry, image: StoredImage) -> Question:
    given = [row.text(name) for name in OPTIONS if not _is_empty(row, name)]
    options = checked_options(row, OPTIONS[0], given)
    if missing := [name for name in letters(options) if _is_empty(row, name)]:
        raise row.wrong(missing[0], "an option, because a later one is there")
    return Question(
        id=id,
        images=(image,),
        hint="" if _is_empty(row, "hint") else row.text("hint"),
        text=row.text("question"),
        answers=() if "answer" not in row else (checked_letter(row, "answer", options),),
        kind=f"{row.text('l2-category')}{SEPARATOR}{row.text('category')}",
        candidates=options,
    )


def _is_empty(row: Entry, name: str) -> bool:
    return name not in row or row.text(name).strip().lower() in ("", "nan")


def _whole(row: Entry, name: str) -> int:
    if not re.fullmatch("[0-9]{1,15}", text := row.text(name)):
        raise row.wrong(
            name, "a whole number" if name == "index" else "an image in base64, or the index of another row"
        )
    return int(text)


def _image(row: Entry, cell: str) -> StoredImage:
    try:
        data = base64.b64decode(cell.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise row.wrong("image", "an image in base64") from error
    return StoredImage(data, f"{row.path}: {row.place}, image")


def asks(question: Question) -> str:
    """VLMEvalKit's prompt."""
    hint = f"Hint: {question.hint}\n" if question.hint else ""
    options = listed(question.candidates, "{}. {}")
    select = "Please select the correct answer from the options above. \n"
    return f"{hint}Question: {question.text}\nOptions:\n{options}{select}"


def prompt(question: Question, images: Sequence[Part], examples: Sequence[Example], chat: bool) -> Calls:
    """Scores of the options' letters by every rule."""
    # The pretrained model's form is inferred [I].
    parts = chat_prompt(question, images, (), asks) if chat else join(images, f" {asks(question)}Answer:")
    return by_every_rule((yield ModelCall(parts, candidates=letters(question.candidates))))


def metrics(predictions: Sequence[Any], questions: Sequence[Question], scoring: Scoring) -> dict[str, Figure]:
    """CircularEval where there are rotations, and the accuracy without them, over all, by ability and by category."""
    check(predictions, questions)
    hits = [is_right(scores, question, "sum") for scores, question in zip(predictions, questions, strict=True)]
    rotations = _rotations(questions)
    first = [numbers[0] for numbers in rotations]
    guessed = chances(questions)
    found: dict[str, Figure] = {}
    if any(len(numbers) > 1 for numbers in rotations):
        all_right = [all(hits[number] for number in numbers) for numbers in rotations]
        by_luck = [float(np.prod(guessed[numbers])) for numbers in rotations]
        found |= _by_category("CircularEval", all_right, [questions[number] for number in first], by_luck)
    unrotated = [hits[number] for number in first]
    return found | _by_category("accuracy", unrotated, [questions[n] for n in first], guessed[first])


def _rotations(questions: Sequence[Question]) -> list[list[int]]:
    """The numbers of each question and of its rotations, which follow it."""
    found: dict[int, list[int]] = {}
    for number, question in enumerate(questions):
        found.setdefault(int(question.id) % ROTATION, []).append(number)
    return list(found.values())


def _by_category(
    name: str, values: Sequence[bool], questions: Sequence[Question], guessed: Sequence[float] | np.ndarray
) -> dict[str, Figure]:
    found: dict[str, Figure] = {}
    for level in (0, 1):
        kinds = [dataclasses.replace(q, kind=q.kind.split(SEPARATOR)[level]) for q in questions]
        found |= by_kind(f"{name} {BY_LETTER}", values, kinds, intervals.share, guessed)
    return found


BENCHMARK = Benchmark(
    name="mmbench",
    splits=tuple(FILES),
    split="dev",
    tree=("MMBench_DEV_EN.tsv (and other splits' or older files)",),
    described="open-compass/MMBench on GitHub, README (Download)",
    reader=_read,
    prompt=prompt,
    predicts="scores",
    metrics=metrics,
    rule="sum",
)
