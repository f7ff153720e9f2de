"""Visual Dialog v1.0: an image, ten rounds of questions about it, and a hundred candidates to rank in each.

`visdial_1.0_val.json`, used are
    {"data": {"questions": [str], "answers": [str], "dialogs": [{"image_id", "caption", "dialog": [round]}]}}
    round: {"question": index, "answer": index, "answer_options": [index], "gt_index": index in answer_options}
`visdial_1.0_val_dense_annotations.json`: [{"image_id", "round_id": 1 to 10, "gt_relevance": [number]}], for one round
of each dialogue, from which NDCG is computed. In `visdial_1.0_test.json` only a dialogue's last round has
candidates: it is the one that is asked, and its answer is not published.

A round is one question: `history` holds the rounds before it, `candidates` the options, `answers` the one that people
gave, `caption` the line that the dialogue began with, which is COCO's for an image of COCO. The reference's prompt for
Emu-I leaves the caption out. Texts are kept as in the files, without a question mark. Few-shot examples (split train)
keep no candidates: all 123 million of them would take too much memory.

Candidates are ranked by each rule of `generate/candidates.py`. The figures without a name are of the reference's rule,
which published numbers of Emu have, and so are the results:
[{"image_id": int, "round_id": int, "ranks": [int]}]; ranks[i] is the rank of candidate i, 1 for the best.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emu_jax.data.system_messages import IMAGE_SYSTEM
from emu_jax.data.tokenizer import ASSISTANT, USER
from emu_jax.evaluate.benchmarks.benchmark import Answer, Benchmark, Scoring
from emu_jax.evaluate.formats.captions import coco_names
from emu_jax.evaluate.formats.files import Entry, Files, check_same, unique
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics import ranking
from emu_jax.evaluate.prompts import END, Calls, Example, ModelCall, Part, join
from emu_jax.evaluate.question import Question
from emu_jax.generate.candidates import RULES
from emu_jax.storage import Path

DENSE = "visdial_1.0_val_dense_annotations.json"


def _read(files: Files, split: str) -> list[Question]:
    document = files.document(f"visdial_1.0_{split}.json")
    data = document.entry("data")
    asked, said = data.texts("questions"), data.texts("answers")
    dialogues = unique(data.entries("dialogs"), lambda entry: entry.whole("image_id"), "image_id")
    dense: dict[int, Entry] = {}
    if split == "val":
        records = files.records(DENSE)
        dense = unique(records, lambda entry: entry.whole("image_id"), "image_id")
        check_same(dialogues, dense, "image_id", (document.path, files.find(DENSE)))
    questions = []
    for image_id, dialogue in dialogues.items():
        image = files.shown(*_image_names(split, image_id))
        rounds = _rounds(dialogue, split, image, asked, said)
        if (judged := dense.get(image_id)) is not None:
            rounds = _with_relevance(rounds, judged)
        questions += rounds
    return questions


def _rounds(dialogue: Entry, split: str, image: Path, asked: Sequence[str], said: Sequence[str]) -> list[Question]:
    """The rounds that have candidates, each with the earlier rounds as its history."""
    image_id, caption = dialogue.whole("image_id"), dialogue.text("caption")
    questions: list[Question] = []
    history: list[tuple[str, str]] = []
    for number, entry in enumerate(dialogue.entries("dialog"), 1):
        text = asked[_index(entry, "question", len(asked))]
        answer = said[_index(entry, "answer", len(said))] if split != "test" or "answer" in entry else None
        if split != "test" or "answer_options" in entry:
            candidates = _candidates(entry, said, answer)
            questions.append(
                Question(
                    id=f"{image_id}/{number}",
                    images=(image,),
                    text=text,
                    answers=() if answer is None else (answer,),
                    history=tuple(history),
                    caption=caption,
                    candidates=candidates if split != "train" else (),
                )
            )
        if answer is not None:
            history.append((text, answer))
    return questions


def _candidates(entry: Entry, said: Sequence[str], answer: str | None) -> tuple[str, ...]:
    """The options of a round; its answer must be the one that the file names."""
    options = entry.wholes("answer_options")
    if not options or min(options) < 0 or max(options) >= len(said):
        raise entry.wrong("answer_options", f"numbers of answers, 0 to {len(said) - 1}")
    candidates = tuple(said[option] for option in options)
    if answer is not None and candidates[_index(entry, "gt_index", len(candidates))] != answer:
        raise entry.wrong("gt_index", f"the index of the answer, {answer!a}, among the options")
    return candidates


def _index(entry: Entry, name: str, count: int) -> int:
    if not 0 <= (index := entry.whole(name)) < count:
        raise entry.wrong(name, f"a number from 0 to {count - 1}")
    return index


def _with_relevance(rounds: list[Question], judged: Entry) -> list[Question]:
    """A dialogue's questions, with relevance for the one that people judged."""
    if not 1 <= (number := judged.whole("round_id")) <= len(rounds):
        raise judged.wrong("round_id", f"a round of the dialogue, 1 to {len(rounds)}")
    relevance, question = judged.shares("gt_relevance"), rounds[number - 1]
    if len(relevance) != len(question.candidates):
        raise judged.wrong("gt_relevance", f"a number for each of the round's {len(question.candidates)} options")
    rounds[number - 1] = dataclasses.replace(question, relevance=relevance)
    return rounds


def _image_names(split: str, image_id: int) -> tuple[str, ...]:
    if split == "train":  # COCO's two folders of 2014; the files do not say which of them holds an image
        names = [coco_names(folder, f"COCO_{folder}_{image_id:012d}.jpg") for folder in ("train2014", "val2014")]
        return tuple(name for pair in names for name in pair)
    folder = f"VisualDialog_{split}2018"
    return coco_names(folder, f"{folder}_{image_id:012d}.jpg")


def prompt(question: Question, images: Sequence[Part], examples: Sequence[Example], chat: bool) -> Calls:
    """Scores of the candidates, M by each rule; the lowest is the best. Few-shot examples are not used."""
    if chat:
        turns = [f" {USER}: {asked}? {ASSISTANT}: {answer}.{END}" for asked, answer in question.history]
        parts = join(IMAGE_SYSTEM, f" {USER}: ", images, END, *turns, f" {USER}: {question.text}? {ASSISTANT}:")
    else:  # [I]
        turns = [f" question: {asked}? answer: {answer}." for asked, answer in question.history]
        parts = join(images, *turns, f" question: {question.text}? answer:")
    scores = yield ModelCall(parts, candidates=question.candidates)
    return {rule: scores.by(rule).tolist() for rule in RULES}


def metrics(predictions: Sequence[Any], questions: Sequence[Question], scoring: Scoring) -> dict[str, Figure]:
    """R@k, mean rank, MRR and NDCG, by each rule."""
    found: dict[str, Figure] = {}
    for rule, after in zip(RULES, ("", " (by sum)", " (by token)"), strict=True):
        figures = ranking.figures([np.asarray(scores[rule]) for scores in predictions], questions)
        found |= {f"{name}{after}": figure for name, figure in figures.items()}
    return found


def results(questions: Sequence[Question], answers: Mapping[str, Answer]) -> list[dict]:
    """The server's format of results."""
    rows = []
    for question in questions:
        image_id, _, number = question.id.partition("/")
        ranks = [int(rank) for rank in answers[question.id]]
        rows.append({"image_id": int(image_id), "round_id": int(number), "ranks": ranks})
    return rows


BENCHMARK = Benchmark(
    name="visdial",
    splits=("val", "test", "train"),
    split="val",
    few_shot_split="train",
    tree=(
        "visdial_1.0_val.json (and test, train)",
        DENSE,
        "VisualDialog_val2018/VisualDialog_val2018_000000284024.jpg … (split test: VisualDialog_test2018/…; split "
        "train: COCO's train2014/ and val2014/), here or in images/",
    ),
    described="visualdialog.org, page Data",
    reader=_read,
    prompt=prompt,
    predicts="scores",
    metrics=metrics,
    submission=results,
)
