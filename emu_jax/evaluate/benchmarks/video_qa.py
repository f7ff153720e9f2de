"""Questions about videos: MSVD-QA, MSRVTT-QA and open-ended NExT-QA.

MSVD-QA and MSRVTT-QA: `test_qa.json` (and val, train), [{"id", "video_id", "question", "answer"}]. Kind: the question's
first word where it is what, who, how, when or where, by which the datasets' paper tells scores apart. MSVD's videos are
`YouTubeClips/-4wsuPCjDBc_5_15.avi`, and `youtube_mapping.txt` says in its lines, "-4wsuPCjDBc_5_15 vid1", which one a
number is; or they are `video/vid1.avi` already, as the authors' code wants them. MSRVTT's are `video/video0.mp4`, or in
the release's `TrainValVideo/` and `TestVideo/`. No server takes results of the two. (Fields: from code that reads the
files; the files themselves: unverified.)

NExT-QA, open-ended: `test.csv` (and val, train) of the repository NExT-OE, used are the columns
    video, question, answer, qid, type
with the kind type: CW CH (causal), TN TP TC (temporal), DB DC DL DO (descriptive). Some test questions have a second
reference, in `add_reference_answer_test.json`, {video: {qid: answer}}, or in a column additional_ref_answer. Videos are
`NExTVideo/1164/3238737531.mp4`, where `map_vid_vidorID.json` of the repository NExT-QA has {video: "1164/3238737531"}.
The published train.csv gives three numbers to two questions each: there, the later one's id ends in "/again".

Results: {video: {qid: answer}} for NExT-OE's `eval_oe.py`.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emu_jax.errors import UserError
from emu_jax.evaluate.benchmarks.benchmark import Benchmark, Prediction
from emu_jax.evaluate.benchmarks.files import Entry, Files, check_asked, unique
from emu_jax.evaluate.question import Question

WORDS = ("what", "who", "how", "when", "where")


def _reader(
    video_names: Callable[[Files], Callable[[Entry], tuple[str, ...]]],
) -> Callable[[Files, str], list[Question]]:
    """Of MSVD-QA's format; `video_names` tells where a question's video may stand."""

    def read(files: Files, split: str) -> list[Question]:
        names = video_names(files)
        records = files.records(f"{split}_qa.json")
        questions = []
        for key, entry in unique(records, lambda entry: entry.whole("id"), "id").items():
            text = entry.text("question")
            word = text.split(maxsplit=1)[0].lower() if text.strip() else ""
            questions.append(
                Question(
                    id=str(key),
                    video=files.shown(*names(entry)),
                    text=text,
                    answers=(entry.text("answer"),),
                    kind=word if word in WORDS else "",
                )
            )
        return questions

    return read


# ---------------------------------------------------------------- MSVD-QA


def _msvd_names(files: Files) -> Callable[[Entry], tuple[str, ...]]:
    if (files.root / "video").is_dir():
        return lambda entry: (f"video/vid{entry.whole('video_id')}.avi",)
    mapping = files.find("youtube_mapping.txt")
    clips = read_mapping(mapping)

    def names(entry: Entry) -> tuple[str, ...]:
        if (clip := clips.get(f"vid{entry.whole('video_id')}")) is None:
            raise entry.wrong("video_id", f"the number of a video in {mapping}")
        return (f"YouTubeClips/{clip}.avi",)

    return names


def read_mapping(path: Path) -> dict[str, str]:
    """`youtube_mapping.txt` -> the clip's name by its number's name: {"vid1": "-4wsuPCjDBc_5_15"}."""
    clips: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected lines such as -4wsuPCjDBc_5_15 vid1") from error
    for number, line in enumerate(lines, 1):
        match line.split():
            case []:
                continue
            case [clip, name] if name not in clips:
                clips[name] = clip
            case [_, name]:
                raise UserError(f"{path}: line {number} has {name!a} again; expected every number once")
            case _:
                raise UserError(f"{path}: line {number} is {line[:60]!a}; expected a clip and its number: …_5_15 vid1")
    return clips


MSVD_QA = Benchmark(
    name="msvdqa",
    task="video_qa",
    splits=("test", "val", "train"),
    split="test",
    shots="train",
    tree=(
        "test_qa.json (and val_qa.json, train_qa.json)",
        "youtube_mapping.txt and YouTubeClips/-4wsuPCjDBc_5_15.avi …, or video/vid1.avi …",
    ),
    described="xudejing/video-question-answering on GitHub, README (questions); Microsoft Research Video Description "
    "Corpus, page of the University of Texas (videos)",
    reader=_reader(_msvd_names),
)


# ---------------------------------------------------------------- MSRVTT-QA


def _msrvtt_names(files: Files) -> Callable[[Entry], tuple[str, ...]]:
    def names(entry: Entry) -> tuple[str, ...]:
        video = f"video{entry.whole('video_id')}.mp4"
        return f"video/{video}", f"TrainValVideo/{video}", f"TestVideo/{video}"

    return names


MSRVTT_QA = Benchmark(
    name="msrvttqa",
    task="video_qa",
    splits=("test", "val", "train"),
    split="test",
    shots="train",
    tree=(
        "test_qa.json (and val_qa.json, train_qa.json)",
        "video/video0.mp4 …, or the same in TrainValVideo/ and TestVideo/",
    ),
    described="xudejing/video-question-answering on GitHub, README (questions); MSR-VTT, page of the 2016 challenge "
    "(videos)",
    reader=_reader(_msrvtt_names),
)


# ---------------------------------------------------------------- NExT-QA

COLUMNS = ("video", "question", "answer", "qid", "type")
TYPES = ("CW", "CH", "TN", "TP", "TC", "DB", "DC", "DL", "DO")
EXTRA = "additional_ref_answer"


def _read_nextqa(files: Files, split: str) -> list[Question]:
    table = files.find(f"{split}.csv")
    rows = read_table(table, COLUMNS)
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


def read_table(path: Path, columns: Sequence[str]) -> list[Entry]:
    """The rows of a CSV with a header, of which `columns` must be filled; a row's place is its line.

    Raises:
      UserError: it is none, a column is missing, or a row has fewer or more cells than the header.
    """
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
                raise UserError(f"{path}: no column {', '.join(missing)}; expected {', '.join(columns)}")
            for fields in reader:
                if None in fields or None in fields.values():
                    count = len(reader.fieldnames or ())
                    raise UserError(
                        f"{path}: line {reader.line_num} has not the {count} cells of the header; "
                        "expected the file as it is published, so fetch it again"
                    )
                rows.append(Entry(fields, path, f"line {reader.line_num}"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected a CSV of {', '.join(columns)}") from error
    if not rows:
        raise UserError(f"{path}: no rows; expected a CSV of {', '.join(columns)}")
    return rows


def _numbered(rows: Iterable[Entry], split: str) -> list[Entry]:
    """Rows with their id, "video/qid"."""
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


def nextqa_results(questions: Sequence[Question], predictions: Mapping[str, Prediction]) -> dict[str, dict[str, Any]]:
    """What NExT-OE's scorer reads."""
    results: dict[str, dict[str, Any]] = {}
    for question in questions:
        video, _, number = question.id.partition("/")
        results.setdefault(video, {})[number] = predictions[question.id]
    return results


NEXT_QA = Benchmark(
    name="nextqa",
    task="video_qa",
    splits=("test", "val", "train"),
    split="test",
    shots="train",
    tree=(
        "test.csv (and val.csv, train.csv) of the open-ended questions",
        "add_reference_answer_test.json (split test)",
        "map_vid_vidorID.json",
        "NExTVideo/1164/3238737531.mp4 …",
    ),
    described="doc-doc/NExT-OE on GitHub, dataset/nextqa (questions); doc-doc/NExT-QA, README (videos and their map)",
    reader=_read_nextqa,
    submission=nextqa_results,
)
