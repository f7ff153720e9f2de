"""DPG-Bench: 1,065 long prompts, with four drawings each that another program asks yes-or-no questions about.

`prompts/<item_id>.txt` has a prompt, and `dpg_bench.csv` a row a question, used are the columns
    item_id, proposition_id, dependency, tuple, question_natural_language
A question's category precedes "(" in its tuple, "entity - whole (bales)"; `dependency` has the numbers of the questions
that it depends on, separated by commas, or 0. (The columns are known from the official program; the file itself:
unverified.)

Drawings are `drawn/<item_id>/0.png … 3.png`. Beside `drawn`, `grids/<item_id>.png` has the four in two rows, as the
official `compute_dpg_bench.py` reads them: grids is its --image-root-path, and --resolution a drawing's side.

That program asks mPLUG. Its rules are here, too, for the answers of another model. `answers.jsonl` beside `drawn` has a
line a drawing, with answers by proposition_id: {"image": "partiprompts97/0.png", "answers": {"1": "yes", "2": "no"}}.

The rules, with their oddities:
  Only "yes" is yes. A question counts as no if one that it depends on counts as no.
  A drawing's score is the share of yes, a prompt's the mean of its drawings', the benchmark's the mean of the prompts'.
  The file's first question is skipped. A prompt whose score would then depend on it has none, and counts nowhere.
  Categories are scored by the answers about the last drawing alone, whatever their questions depend on.
Figures are in percent, as there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import PIL.Image

from emu_jax.data.images import load_image
from emu_jax.errors import UserError
from emu_jax.evaluate import intervals
from emu_jax.evaluate.benchmarks.benchmark import Benchmark, Scoring
from emu_jax.evaluate.formats.drawn_images import read_by_image
from emu_jax.evaluate.formats.files import Entry, Files
from emu_jax.evaluate.formats.tables import read_table
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics.drawings import check_unfiltered
from emu_jax.evaluate.prompts import Calls, Example, ModelCall, Part
from emu_jax.evaluate.question import Question
from emu_jax.storage import Path, write_atomically

SIDE = 2  # drawings in a row of the grid, and rows
SAMPLES = SIDE * SIDE
TABLE, ANSWERS = "dpg_bench.csv", "answers.jsonl"
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question about the drawings of a prompt.

    Attributes:
      parents: the numbers of the questions that it depends on.
      category: "entity - whole".
    """

    text: str
    parents: tuple[int, ...]
    category: str


Item = dict[int, Asked]  # a prompt's questions by their numbers, in the file's order


def read_items(files: Files) -> dict[str, Item]:
    """The prompts' questions by item_id, without the first of all; a later block of rows of an item replaces an earlier
    one, as in the official program."""
    items: dict[str, Item] = {}
    previous = ""
    for row in read_table(files.find(TABLE), COLUMNS):
        if not (item := row.text("item_id")):
            raise row.wrong("item_id", "the name of a file in prompts/, without .txt")
        if not items:
            items[item] = {}
            continue
        if item != previous:
            items[item] = {}
        previous = item
        category = row.text("tuple").partition("(")[0].strip()
        parents = tuple(_whole(row, "dependency", part) for part in row.text("dependency").split(","))
        number = _whole(row, "proposition_id", row.text("proposition_id"))
        items[item][number] = Asked(row.text("question_natural_language"), tuple(n for n in parents if n), category)
    return items


def _whole(row: Entry, name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise row.wrong(name, "the number of a question" + ", or several" * (name == "dependency")) from None


def _read(files: Files, split: str) -> list[Question]:
    paths = {item: files.shown(f"prompts/{item}.txt") for item in read_items(files)}
    files.check_shown()
    return [
        Question(id=f"{item}/{sample}", text=text)
        for item, path in paths.items()
        for text in [_text(path)]
        for sample in range(SAMPLES)
    ]


def _text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected a prompt") from error
    if not text:
        raise UserError(f"{path}: holds no text; expected a prompt")
    return text


def prompt(question: Question, images: Sequence[Part], examples: Sequence[Example], chat: bool) -> Calls:
    """The prompt as it is -> the file name of an image."""
    return (yield ModelCall((question.text,), draws=True))


# ---------------------------------------------------------------- scores


def metrics(predictions: Sequence[str], questions: Sequence[Question], scoring: Scoring) -> dict[str, Figure]:
    """Writes the grids; figures where there are answers. A prompt without all its drawings (--limit) has neither.

    Raises:
      UserError: the model has a safety checker, or the answers are not as described above.
    """
    check_unfiltered(scoring.emu, scoring.drawn)
    drawn: dict[str, list[str]] = {}
    for question, name in zip(questions, predictions, strict=True):
        drawn.setdefault(question.id.rpartition("/")[0], []).append(name)
    whole = {item: names for item, names in drawn.items() if len(names) == SAMPLES}
    for item, names in whole.items():
        _write_grid(scoring.drawn.parent / "grids" / f"{item}.png", [scoring.drawn / name for name in names])
    path = scoring.drawn.parent / ANSWERS
    if not path.is_file() or not whole:
        return {}
    entries = read_by_image(path, predictions)
    items = read_items(BENCHMARK.files(scoring.root))
    answers = {item: [_answers(entries[name], items[item]) for name in names] for item, names in whole.items()}
    return figures({item: items[item] for item in whole}, answers)


def _write_grid(path: Path, drawings: Sequence[Path]) -> None:
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = [load_image(drawing) for drawing in drawings]
    rows = [np.concatenate(pixels[start : start + SIDE], axis=1) for start in range(0, SAMPLES, SIDE)]
    with write_atomically(path) as partial:
        PIL.Image.fromarray(np.concatenate(rows)).save(partial, "PNG")


def _answers(entry: Entry, item: Item) -> dict[int, str]:
    given = entry.entry("answers")
    return {number: given.text(str(number)) for number in item}


def drawing_score(item: Item, answers: Mapping[int, str]) -> float | None:
    """The share of yes of one drawing; None where it depends on a question that is not there."""
    if not item:
        return None
    counts = {number: answers[number] == "yes" for number in item}
    for number, asked in item.items():
        for parent in asked.parents:
            if parent not in counts:
                return None
            if not counts[parent]:
                counts[number] = False
                break
    return sum(counts.values()) / len(counts)


def figures(items: Mapping[str, Item], answers: Mapping[str, Sequence[Mapping[int, str]]]) -> dict[str, Figure]:
    """The score, and those of both levels of categories, in percent; intervals draw whole prompts.

    Args:
      answers: by item_id, the answers about each drawing.

    Raises:
      UserError: no prompt has a score.
    """
    scores: list[float] = []
    categories: dict[str, list[tuple[bool, int]]] = {}  # a yes, and the number of its prompt
    for name, item in items.items():
        found = [score for given in answers[name] if (score := drawing_score(item, given)) is not None]
        if len(found) < len(answers[name]):
            continue
        for number, asked in item.items():
            right = answers[name][-1][number] == "yes"
            for category in dict.fromkeys((asked.category.partition("-")[0].strip(), asked.category)):
                categories.setdefault(category, []).append((right, len(scores)))
        scores.append(sum(found) / len(found))
    if not scores:
        raise UserError(f"{TABLE}: no prompt of these can be scored; expected questions, beside the file's first one")
    figures = {"DPG-Bench": intervals.mean(scores)}
    for category, hits in sorted(categories.items()):
        right, groups = np.array(hits).T
        figures[f"DPG-Bench ({category})"] = intervals.share(right, groups=groups)
    return {name: _percent(figure) for name, figure in figures.items()}


def _percent(figure: Figure) -> Figure:
    low, high = figure.interval
    return dataclasses.replace(figure, value=100 * figure.value, interval=(100 * low, 100 * high), paper_scale=1.0)


BENCHMARK = Benchmark(
    name="dpg",
    splits=("test",),
    split="test",
    tree=(TABLE, "prompts/partiprompts97.txt …"),
    described="TencentQQGYLab/ELLA on GitHub, folder dpg_bench",
    reader=_read,
    prompt=prompt,
    predicts="image",
    metrics=metrics,
)
