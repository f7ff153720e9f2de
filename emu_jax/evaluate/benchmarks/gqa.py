"""GQA: questions about scenes that were made from scene graphs, with one right answer each.

`testdev_balanced_questions.json` (version 1.2), used are
    {"201307251": {"imageId": "n161313", "question", "answer", "isBalanced": true,
                   "types": {"structural": "verify", "semantic": "attr"}, "groups": {"global": "color" or null},
                   "entailed": ["201307252"]}}
A split is named as its file. The `_all` files also hold the questions that balancing left out. submission_all, the
union of val, testdev, test and challenge, has only questions and images: its answers are for the server. Kind: the
structural type. Results: [{"questionId": str, "prediction": str}].

Scored as the official eval.py does, over balanced questions, with the exact answer as the only right one. (Known from
the copy in PKU-YuanGroup/Video-LLaVA; the original: unverified.) Consistency is the accuracy over the questions that a
rightly answered one entails; it is reported where all of them were asked, as in the `_all` splits. Distribution is the
chi-square statistic between right and given answers in each global group, divided by 100; lower is better, and it grows
with the number of questions.

Left out: validity and plausibility, whose choices the release of version 1.2 lacks; grounding, which is for maps of
attention; accuracy by the number of words and of reasoning steps.

The prompt is the reference's for short answers [I], since the reference has no GQA.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from emu_jax.evaluate import intervals
from emu_jax.evaluate.benchmarks.benchmark import Answer, Benchmark, Scoring
from emu_jax.evaluate.formats.files import Entry, Files
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics.figures import by_kind, check, subjects
from emu_jax.evaluate.prompts import vqa
from emu_jax.evaluate.question import Question

SUBMISSION = "submission_all"
SPLITS = ("testdev_balanced", "testdev_all", "val_balanced", "val_all", "train_balanced", SUBMISSION)
OPEN = "query"  # the structural type of open questions; all others are binary
SEMANTIC = {"attr": "attribute", "cat": "category", "global": "scene", "obj": "object", "rel": "relation"}


@dataclasses.dataclass(frozen=True)
class SceneQuestion(Question):
    """A question with what only GQA's scores use.

    Attributes:
      semantic: what it asks about: an attribute, a category, an object, a relation or the scene.
      balanced: whether it belongs to the balanced set, over which scores are computed.
      group: the global group of questions whose answers are compared as a distribution; "" if it is in none.
      entailed: ids of questions whose answers follow from this one's.
    """

    semantic: str = ""
    balanced: bool = True
    group: str = ""
    entailed: tuple[str, ...] = ()


def _read(files: Files, split: str) -> list[Question]:
    name = f"{split}_questions.json"
    document = files.document(name, f"questions/{name}", f"questions1.2/{name}", keyed=True)
    questions: list[Question] = []
    for key in document.fields:  # duplicate names were refused when the file was read
        entry = document.entry(key)
        question = SceneQuestion(
            id=key,
            images=(files.shown(f"images/{entry.text('imageId')}.jpg"),),
            text=entry.text("question"),
        )
        questions.append(question if split == SUBMISSION else _with_answer(question, entry))
    return questions


def _with_answer(question: SceneQuestion, entry: Entry) -> SceneQuestion:
    types, groups = entry.entry("types"), entry.entry("groups")
    semantic = types.text("semantic")
    return dataclasses.replace(
        question,
        answers=(sys.intern(entry.text("answer")),),
        kind=sys.intern(types.text("structural")),
        semantic=sys.intern(SEMANTIC.get(semantic, semantic)),
        balanced=entry.flag("isBalanced"),
        group="" if groups.fields.get("global") is None else sys.intern(groups.text("global")),
        entailed=entry.texts("entailed"),
    )


# ---------------------------------------------------------------- scores


def metrics(predictions: Sequence[str], questions: Sequence[Question], scoring: Scoring) -> dict[str, Figure]:
    """Accuracy over balanced questions and by type, distribution, and consistency where all its questions were asked.

    Returns: {} if none of the questions is balanced.
    """
    check(predictions, questions)
    said = {question.id: text for question, text in zip(questions, predictions, strict=True)}
    right = {question.id: said[question.id] == question.answers[0] for question in questions}
    balanced = [question for question in questions if isinstance(question, SceneQuestion) and question.balanced]
    if not balanced:
        return {}
    hits = [right[question.id] for question in balanced]
    forms = [dataclasses.replace(q, kind="open" if q.kind == OPEN else "binary") for q in balanced]
    topics = [dataclasses.replace(q, kind=q.semantic) for q in balanced]
    found: dict[str, Figure] = {}
    for kinds in (forms, balanced, topics):
        found |= by_kind("accuracy", hits, kinds, intervals.share)
    return found | _consistency(right, balanced) | _distribution(said, balanced)


def _consistency(right: Mapping[str, bool], balanced: Sequence[SceneQuestion]) -> dict[str, Figure]:
    """Mean over rightly answered questions of the accuracy over what each entails besides itself."""
    others = {q.id: [key for key in q.entailed if key != q.id] for q in balanced}
    if any(key not in right for keys in others.values() for key in keys):
        return {}
    chosen = [question for question in balanced if right[question.id] and others[question.id]]
    if not chosen:
        return {}
    values = np.array([np.mean([right[key] for key in others[question.id]]) for question in chosen])
    return {"consistency": intervals.mean(values, groups=subjects(chosen))}


def _distribution(said: Mapping[str, str], balanced: Sequence[SceneQuestion]) -> dict[str, Figure]:
    """Mean over groups, weighted by their sizes, of the chi-square statistic between right and given answers / 100.

    Answers that are right for no question of a group do not count, as in the official program.
    """
    grouped = [question for question in balanced if question.group]
    if not grouped:
        return {}
    cells: dict[tuple[str, str], int] = {}  # the groups' right answers
    right = np.array([cells.setdefault((q.group, q.answers[0]), len(cells)) for q in grouped])  # [N]
    given = np.array([cells.get((q.group, said[q.id]), len(cells)) for q in grouped])  # [N]; the last is for others
    groups = np.unique([group for group, _ in cells], return_inverse=True)[1]  # [C], each cell's
    images = subjects(grouped)  # [N]
    count = int(images.max()) + 1

    def chi_square(index: np.ndarray) -> float:
        times = np.bincount(index, minlength=count)[images]  # how often each question counts
        expected = np.bincount(right, times, len(cells))
        observed = np.bincount(given, times, len(cells))[: len(cells)]
        excess = np.divide((observed - expected) ** 2, expected, out=np.zeros(len(cells)), where=expected > 0)
        sizes = np.bincount(groups, expected)
        return float(np.bincount(groups, excess) @ sizes / sizes.sum()) / 100

    value = chi_square(np.arange(count))
    low, high = intervals.bootstrap(chi_square, count, around=value)
    return {"distribution": Figure(value, (max(low, 0.0), high), None, len(grouped))}


def results(questions: Sequence[Question], answers: Mapping[str, Answer]) -> list[dict]:
    """The format of results of the server and of eval.py."""
    return [{"questionId": question.id, "prediction": answers[question.id]} for question in questions]


BENCHMARK = Benchmark(
    name="gqa",
    splits=SPLITS,
    split="testdev_balanced",
    few_shot_split="train_balanced",
    tree=(
        "testdev_balanced_questions.json (and testdev_all, val_balanced, val_all, train_balanced, submission_all), "
        "here, in questions/ or in questions1.2/",
        "images/n161313.jpg …",
    ),
    described="cs.stanford.edu/people/dorarad/gqa, page Download (questions 1.2, images)",
    reader=_read,
    prompt=vqa,
    metrics=metrics,
    submission=results,
)
