"""Drawn questions and answers for DPG-Bench, with ugly cases, and what the official program says about them.

The constants at the end are what dpg_bench/compute_dpg_bench.py of TencentQQGYLab/ELLA, commit
3c228f1dc6c4d3cad0a47493816151a419f14db3, writes with --pic-num 4 in one process, with the answers of `answers()` in
place of mPLUG's.
"""

import csv
import random
from pathlib import Path

CATEGORIES = ("entity - whole (bale)", "attribute - color (bale, red)", "relation - spatial (a, b, on)", "global - (x)")
COLUMNS = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)
SAID = 14 * ("yes",) + ("no", "no", "no", "Yes", "yes.", "")


def rows() -> list[tuple]:
    """Rows of a table for 32 prompts; the first one's first question and others are depended on but not asked."""
    rng = random.Random(0)
    found = []
    for number in range(32):
        item = f"{rng.choice(['partiprompts', 'drawtext', ''])}{number}"
        last = rng.randint(2, 9)
        for question in range(1, last + 1):
            parents = rng.sample(range(1, question), min(question - 1, rng.randint(0, 2)))
            if number == 0 and question > 1:
                parents = [1]
            if number in (5, 6) and question == last:
                parents = [1, 77]  # the second is only looked for if the first counts as yes
            if number == 7:
                parents = [question % last + 1]  # a later one, and a circle
            found.append(_row(rng, item, question, parents))
        if number == 9:  # again, with fewer questions: these replace the others
            found += [_row(rng, "vrd1", 1, [])] + [_row(rng, item, question, []) for question in (3, 2)]
        if number == 11:
            found.append(_row(rng, item, 1, [2]))  # the second time that a number is given
    return found


def _row(rng: random.Random, item: str, question: int, parents: list[int]) -> tuple:
    dependency = rng.choice([",", ", "]).join(map(str, parents)) or "0"
    text = f'Is there, in "{item}", number {question}?'
    return (item, "A prompt, at length", "", question, dependency, "", "", rng.choice(CATEGORIES), text)


def write_table(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS.split(","), *rows()])


def answers() -> dict[str, list[dict[str, str]]]:
    """By item, what is said about each of four drawings, by the question's number."""
    rng = random.Random(1)
    items: dict[str, set[int]] = {}
    for row in rows():
        items.setdefault(row[0], set()).add(row[3])
    found = {
        item: [{str(number): rng.choice(SAID) for number in sorted(numbers)} for _ in range(4)]
        for item, numbers in items.items()
    }
    for said in found["6"]:
        said["1"] = "no"
    return found


# "Failed filename": these count nowhere.
FAILED = ("drawtext0", "partiprompts5")
# Each other prompt's mean, in the table's order.
MEANS = """
    0.25 0.2857142857142857 0.44999999999999996 0.4444444444444444 0.1875 0.41666666666666663 0.8 0.5 1.0
    0.41666666666666663 0.625 0.16666666666666666 0.5555555555555556 0.5833333333333334 0.5 0.6000000000000001
    0.5416666666666666 0.6875 0.6666666666666667 0.625 0.41666666666666663 0.5625 0.6111111111111112 0.3333333333333333
    0.6666666666666666 0.625 0.3333333333333333 0.75 0.41666666666666663 0.375 0.4722222222222222
"""
FIGURES = {
    "DPG-Bench": 51.177035330261134,
    "DPG-Bench (attribute)": 47.61904761904761,
    "DPG-Bench (attribute - color)": 47.61904761904761,
    "DPG-Bench (entity)": 70.0,
    "DPG-Bench (entity - whole)": 70.0,
    "DPG-Bench (global)": 65.71428571428571,
    "DPG-Bench (global -)": 65.71428571428571,
    "DPG-Bench (relation)": 77.5,
    "DPG-Bench (relation - spatial)": 77.5,
}
