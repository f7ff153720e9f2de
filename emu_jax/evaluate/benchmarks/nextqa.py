"""NExT-QA, open-ended: questions about videos, scored by WUPS.

`test.csv` (and val, train) of the repository NExT-OE, used are the columns
    video, question, answer, qid, type
with the kind type: CW CH (causal), TN TP TC (temporal), DB DC DL DO (descriptive). Some test questions have a second
reference, in `add_reference_answer_test.json`, {video: {qid: answer}}, or in a column additional_ref_answer. Videos are
`NExTVideo/1164/3238737531.mp4`, where `map_vid_vidorID.json` of the repository NExT-QA has {video: "1164/3238737531"}.
The published train.csv gives three numbers to two questions each: there, the later one's id ends in "/again".

Results: {video: {qid: answer}} for NExT-OE's `eval_oe.py`.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from emu_jax.errors import UserError
from emu_jax.evaluate import intervals
from emu_jax.evaluate.benchmarks.benchmark import Benchmark
from emu_jax.evaluate.formats.files import Entry, Files, check_asked, unique
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics.figures import by_kind, check
from emu_jax.evaluate.metrics.wups import Wups
from emu_jax.evaluate.prompts import vqa
from emu_jax.evaluate.question import Question
from emu_jax.storage import Path

COLUMNS = ("video", "question", "answer", "qid", "type")
TYPES = ("CW", "CH", "TN", "TP", "TC", "DB", "DC", "DL", "DO")
EXTRA = "additional_ref_answer"
THRESHOLDS = (0.0, 0.9)
EXACT = ("DC", "DB")  # how many, and yes or no: these answers are matched exactly
MERGED = {"TP": "TN"}  # what came before counts among what comes next


def _read(files: Files, split: str) -> list[Question]:
    table = files.find(f"{split}.csv")
    rows = _read_table(table, COLUMNS)
    entries = unique(_numbered(rows, split), lambda row: row.text("id"), "video and qid")
    ids = files.document("map_vid_vidorID.json", keyed=True)
    second = _second_references(files, entries, table) if split == "test" and EXTRA not in rows[0] else {}
    questions = []
    for key, row in entries.items():
        if (video := row.text("video")) not in ids:
            raise row.wrong("video", f"a video that {ids.path} knows")
        if not (answer := row.text("answer").strip()):
            raise row.wrong("answer", "an answer")
        if (kind := row.text("type")) not in TYPES:
            raise row.wrong("type", f"one of {', '.join(TYPES)}")
        other = second.get(key) or (row.fields.get(EXTRA) or "").strip()
        questions.append(
            Question(
                id=key,
                video=files.shown(f"NExTVideo/{ids.text(video)}.mp4"),
                text=row.text("question"),
                answers=(answer, other) if other else (answer,),
                kind=kind,
            )
        )
    return questions


def _read_table(path: Path, columns: Sequence[str]) -> list[Entry]:
    """The rows of a CSV with a header that has `columns`; a row's place is its line.

    Raises:
      UserError: the file is no CSV, a column is missing, or a row has fewer or more cells than the header.
    """
    rows = []
    try:
        text = path.read_bytes().decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)  # otherwise an open quote joins rows
        if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
            raise UserError(f"{path}: no column {', '.join(missing)}; expected {', '.join(columns)}")
        for fields in reader:
            if None in fields or None in fields.values():
                count = len(reader.fieldnames or ())
                raise UserError(
                    f"{path}: line {reader.line_num} does not have the {count} cells of the header; "
                    "expected the file as it is published, so fetch it again"
                )
            rows.append(Entry(fields, path, f"line {reader.line_num}"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected a CSV of {', '.join(columns)}") from error
    if not rows:
        raise UserError(f"{path}: no rows; expected a CSV of {', '.join(columns)}")
    return rows


def _numbered(rows: Iterable[Entry], split: str) -> list[Entry]:
    """Adds to each row its id, "video/qid"."""
    asked: dict[str, str] = {}
    for row in rows:
        key, text = f"{row.text('video')}/{row.text('qid')}", row.text("question")
        if split == "train" and asked.setdefault(key, text) != text:
            key += "/again"
        row.fields["id"] = key
    return list(rows)


def _second_references(files: Files, entries: Mapping[str, Entry], table: Path) -> dict[str, str]:
    document = files.document("add_reference_answer_test.json", keyed=True)
    found: dict[str, str] = {}
    for video in document.fields:
        answers = document.entry(video)
        found |= {f"{video}/{qid}": answers.text(qid).strip() for qid in answers.fields}
    check_asked(entries, found, "video and qid", (table, document.path))
    return found


def figures(wups: Wups, predictions: Sequence[str], questions: Sequence[Question]) -> dict[str, Figure]:
    """WUPS@0 and WUPS@0.9 over all questions, by type and by group of types, from 0 to 1.

    TP counts as TN. A type's first letter is its group: causal, temporal, descriptive.

    Raises:
      UserError: a question has no prediction, or its answers are not published.
    """
    check(predictions, questions)
    types = [dataclasses.replace(question, kind=MERGED.get(question.kind, question.kind)) for question in questions]
    groups = [dataclasses.replace(question, kind=question.kind[:1]) for question in types]
    found: dict[str, Figure] = {}
    for threshold in THRESHOLDS:
        values = [
            wups.score(text, question.answers, threshold, exact=question.kind in EXACT)
            for text, question in zip(predictions, questions, strict=True)
        ]
        for kinds in (types, groups):
            found |= by_kind(f"WUPS@{threshold:g}", values, kinds, intervals.mean)
    return found


def results(questions: Sequence[Question], answers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The input of NExT-OE's scorer."""
    found: dict[str, dict[str, Any]] = {}
    for question in questions:
        video, _, number = question.id.partition("/")
        found.setdefault(video, {})[number] = answers[question.id]
    return found


BENCHMARK = Benchmark(
    name="nextqa",
    splits=("test", "val", "train"),
    split="test",
    few_shot_split="train",
    tree=(
        "test.csv (and val.csv, train.csv) of the open-ended questions",
        "add_reference_answer_test.json (split test)",
        "map_vid_vidorID.json",
        "NExTVideo/1164/3238737531.mp4 …",
    ),
    described="doc-doc/NExT-OE on GitHub, dataset/nextqa (questions); doc-doc/NExT-QA, README (videos and their map)",
    reader=_read,
    prompt=vqa,
    metrics=lambda predictions, questions, scoring: figures(Wups(scoring.weights.wordnet), predictions, questions),
    submission=results,
)
