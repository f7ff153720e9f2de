"""MMMU: exam questions of thirty subjects, most with options, whose texts refer to up to seven images.

`<Subject>/validation-00000-of-00001.parquet` (and dev, test) of the dataset on Hugging Face, used are the columns
    id            "validation_Accounting_1"
    question      text with references such as "<image 1>"
    options       a Python list of texts, as text, which may have references, too; "[]" for an open question
    image_1 to image_7    {"bytes", "path"}, or null
    question_type "multiple-choice" or "open"
    answer        a letter; for an open question a text or a Python list of several; "?" in test
The kind of a question is its subject. Each reference shows its image at its place. Where there is none, image_1 comes
first, as in the official program; other images without a reference may belong to the explanation, and are not shown.
The images stay in memory as files, as large as in the tables. Subjects whose folders are missing are left out, as
officially, and the figures' names tell how many there are.

The official program (mmmu/main_parse_and_eval.py) has a model generate letters; here the options' letters are scored
after the same prompt (configs/llava1.5.yaml). Answers to open questions are generated and scored by the official rule
(metrics/open_responses.py). Accuracies are over all questions of both kinds, of a discipline, and of a subject. The
columns are those of the dataset's page and of the program; the files themselves were not seen (unverified).

Results: {"validation_Accounting_1": "D", "validation_Math_15": "24/7"} for main_eval_only.py and the server of test.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from emu_jax.data.images import StoredImage
from emu_jax.evaluate import intervals
from emu_jax.evaluate.benchmarks.benchmark import Answer, Benchmark, Scoring
from emu_jax.evaluate.formats.files import Entry, Files, unique
from emu_jax.evaluate.formats.tables import read_parquet
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics import open_responses
from emu_jax.evaluate.metrics.figures import by_kind, check
from emu_jax.evaluate.multiple_choice import (
    BY_LETTER,
    by_every_rule,
    chances,
    checked_letter,
    checked_options,
    is_right,
    letter_of,
    letters,
    listed,
)
from emu_jax.evaluate.prompts import LONG, Calls, Example, ModelCall, Part, base_examples, chat_prompt, join
from emu_jax.evaluate.question import Question
from emu_jax.storage import Path

# fmt: off
DISCIPLINES = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power",
        "Materials", "Mechanical_Engineering",
    ),
}
# fmt: on
DISCIPLINE = {subject: discipline for discipline, subjects in DISCIPLINES.items() for subject in subjects}
IMAGES = tuple(f"image_{number}" for number in range(1, 8))
COLUMNS = ("id", "question", "options", *IMAGES, "question_type", "answer")
CHOICE, OPEN = "multiple-choice", "open"
UNKNOWN = "?"
REFERENCE = re.compile("<image ([1-7])>")
TABLE = re.compile(r"(\w+)-[0-9]{5}-of-([0-9]{5})\.parquet")
MAX_LIST = 100_000  # characters
LISTED = "a Python list of texts"


def _read(files: Files, split: str) -> list[Question]:
    tables = [path for subject in sorted(DISCIPLINE) for path in _tables(files, subject, split)]
    if not tables:
        files.find(f"Accounting/{split}-00000-of-00001.parquet")  # which is not there: the error says what is expected
    rows = unique((row for path in tables for row in read_parquet(path, COLUMNS)), lambda row: row.text("id"), "id")
    return [_question(key, row) for key, row in rows.items()]


def _tables(files: Files, subject: str, split: str) -> list[Path]:
    """A subject's tables; () if it has none.

    Raises:
      UserError: there are some of them only.
    """
    if not (folder := files.root / subject).is_dir():
        return []
    counts = {int(found[2]) for path in folder.iterdir() if (found := TABLE.fullmatch(path.name)) and found[1] == split}
    return [
        files.find(f"{subject}/{split}-{number:05}-of-{count:05}.parquet")
        for count in sorted(counts)
        for number in range(count)
    ]


def _question(id: str, row: Entry) -> Question:
    if (kind := row.text("question_type")) not in (CHOICE, OPEN):
        raise row.wrong("question_type", f"{CHOICE} or {OPEN}")
    options = checked_options(row, "options", _texts(row, "options")) if kind == CHOICE else ()
    text = row.text("question")
    if not any(map(REFERENCE.search, (text, *options))) and row.fields["image_1"] is not None:
        text = f"<image 1>{text}"
    shown = [f"image_{number}" for part in (text, *options) for number in REFERENCE.findall(part)]
    images = {name: _image(row, name) for name in dict.fromkeys(shown)}
    return Question(
        id=id,
        images=tuple(images[name] for name in shown),
        text=text,
        answers=_answers(row, options),
        kind=row.path.parent.name,
        candidates=options,
    )


def _answers(row: Entry, options: Sequence[str]) -> tuple[str, ...]:
    if (answer := row.text("answer")) == UNKNOWN:
        return ()
    if options:
        return (checked_letter(row, "answer", options),)
    return _texts(row, "answer") if answer.startswith("[") else (answer,)


def _texts(row: Entry, name: str) -> tuple[str, ...]:
    """A list that the file has as Python's text; only literals are read."""
    if len(text := row.text(name)) > MAX_LIST:
        raise row.wrong(name, f"{LISTED}, of at most {MAX_LIST:,} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a LaTeX command may look like an unknown escape
            found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(item, str | int | float) for item in found):
        raise row.wrong(name, LISTED)
    return Entry({name: [str(item) for item in found]}, row.path, row.place).texts(name)


def _image(row: Entry, name: str) -> StoredImage:
    cell = row.fields[name]
    data = cell.get("bytes") if isinstance(cell, dict) else None
    if not isinstance(data, bytes):
        raise row.wrong(name, "an image with its bytes, because the question shows it")
    return StoredImage(data, f"{row.path}: {row.place}, {name}")


def asks(question: Question) -> str:
    """The prompt of the official program."""
    if not question.candidates:
        return f"{question.text}\nAnswer the question using a single word or phrase."
    options = listed(question.candidates, "({}) {}")
    return f"{question.text}\n{options}\nAnswer with the option's letter from the given choices directly."


def interleaved(text: str, images: Sequence[Part]) -> tuple[Part, ...]:
    """A text whose references are replaced by images, one each; without images it stays as it is.

    >>> interleaved("<image 1> or <image 2>?", ("[red]", "[blue]"))
    ('[red] or [blue]?',)
    """
    if not images:
        return join(text)
    texts = REFERENCE.split(text)[::2]
    return join(texts[0], *(part for pair in zip(images, texts[1:], strict=True) for part in pair))


def prompt(question: Question, images: Sequence[Part], examples: Sequence[Example], chat: bool) -> Calls:
    """Scores of the options' letters by every rule, or an answer to an open question."""
    shown = [(example, interleaved(asks(example), parts)) for example, parts in examples]
    parts = interleaved(asks(question), images)
    if chat:
        parts = chat_prompt(question, parts, shown, lambda _: "")
    else:  # [I]
        parts = join(base_examples(shown, lambda _: " Answer:"), parts, " Answer:")
    if question.candidates:
        return by_every_rule((yield ModelCall(parts, candidates=letters(question.candidates))))
    return (yield ModelCall(parts, LONG)).strip()


def metrics(predictions: Sequence[Any], questions: Sequence[Question], scoring: Scoring) -> dict[str, Figure]:
    """Accuracy over all questions, by subject, by discipline and by type of question."""
    check(predictions, questions)
    hits = [
        is_right(found, question, "sum") if question.candidates else open_responses.is_right(found, question.answers)
        for found, question in zip(predictions, questions, strict=True)
    ]
    there = len({question.kind for question in questions})
    part = f", {there} of {len(DISCIPLINE)} subjects" if there < len(DISCIPLINE) else ""
    name = f"accuracy, choices {BY_LETTER}{part}"
    found: dict[str, Figure] = {}
    for kinds in (
        questions,
        [dataclasses.replace(q, kind=DISCIPLINE[q.kind]) for q in questions],
        [dataclasses.replace(q, kind=CHOICE if q.candidates else OPEN) for q in questions],
    ):
        found |= by_kind(name, hits, kinds, intervals.share, chances(questions))
    return found


def results(questions: Sequence[Question], answers: Mapping[str, Answer]) -> dict[str, Answer]:
    """The program's input."""
    return {q.id: letter_of(answers[q.id]) if q.candidates else answers[q.id] for q in questions}


BENCHMARK = Benchmark(
    name="mmmu",
    splits=("validation", "dev", "test"),
    split="validation",
    few_shot_split="dev",
    tree=("Accounting/validation-00000-of-00001.parquet (and dev, test) … of up to thirty subjects",),
    described="MMMU-Benchmark/MMMU on GitHub, README (Dataset)",
    reader=_read,
    prompt=prompt,
    predicts="scores",
    metrics=metrics,
    submission=results,
    rule="sum",
)
