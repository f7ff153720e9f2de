"""A few items of the multiple-choice benchmarks in their published layouts, which `samples.py` lists."""

from __future__ import annotations

import base64
import csv
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tests.evaluate.people import HELD_OUT, TRAIN, Person, encoded, people, write_json

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


def tone_options(person: Person) -> tuple[list[str], str]:
    """Four skin tones, and the letter of the person's."""
    others = [tone for tone in TONES if tone != person.tone][:3]
    options = sorted([person.tone, *others])
    return options, "ABCD"[options.index(person.tone)]


def mmbench_rows(answered: bool) -> list[dict[str, Any]]:
    """Two questions a person with all their rotations, which refer to the image of the first."""
    rows = []
    for number, person in enumerate(people(HELD_OUT)):
        options, letter = tone_options(person)
        asked = [("What skin tone does the person have?", "", options, letter, "attribute_recognition")]
        asked.append(("Is this a photo?", "The image is an emoji.", ["yes", "no"], "B", "image_style"))
        for place, (text, hint, choices, answer, category) in enumerate(asked):
            index, ability = 100 * number + place, "finegrained_perception (instance-level)"
            for rotation in range(len(choices)):
                image = base64.b64encode(encoded(person.pixels)).decode() if not (place or rotation) else 100 * number
                shown = choices[-rotation:] + choices[:-rotation] if rotation else choices
                known = {"answer": "ABCD"[("ABCD".index(answer) + rotation) % len(choices)]} if answered else {}
                kind = {"category": category, "l2-category": "coarse_perception" if place else ability}
                row = {"index": index + 1_000_000 * rotation, "image": image, "question": text, "hint": hint}
                rows.append(row | dict(zip("ABCD", [*shown, "", ""], strict=False)) | known | kind | {"split": "dev"})
    return sorted(rows, key=lambda row: row["index"])


def write_rows(path: Path, rows: list[dict[str, Any]], separator: str = "\t") -> None:
    """A table with a header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        table.writeheader()
        table.writerows(rows)


def write_mmbench(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for split in ("DEV", "TEST"):
        for language in ("EN", "CN"):
            for version in ("", "_V11"):
                write_rows(root / f"MMBench_{split}_{language}{version}.tsv", mmbench_rows(split == "DEV"))


def mmmu_row(id: str, person: Person, number: int, answered: bool = True) -> dict[str, Any]:
    """One of three forms of question, which have all columns of the dataset."""
    image = {"bytes": encoded(person.pixels), "path": f"{id}_1.png"}
    options, letter = tone_options(person)
    row: dict[str, Any] = {"id": id, "options": "[]", "explanation": "", "image_1": image}
    row |= {f"image_{k}": None for k in range(2, 8)} | {"img_type": "['Photographs']"}
    if number % 3 == 0:
        row |= {"question": "<image 1> Which skin tone is it?", "options": repr(options), "answer": letter}
    elif number % 3 == 1:
        text = "Which of the two is the person: <image 1> or <image 2>?"
        row |= {"question": text, "answer": repr([person.role, "person"]), "image_2": dict(image, path=f"{id}_2.png")}
    else:
        row |= {"question": "Which image shows it?", "options": "['<image 1>', '<image 2>', 'none']", "answer": "A"}
        row |= {"image_2": {"bytes": encoded(person.pixels[::-1]), "path": f"{id}_2.png"}}
    kind = "open" if row["options"] == "[]" else "multiple-choice"
    row |= {"topic_difficulty": "Easy", "question_type": kind, "subfield": "Emoji"}
    return row if answered else row | {"answer": "?"}


def write_mmmu(root: Path) -> None:
    for split, of in (("validation", HELD_OUT), ("dev", TRAIN), ("test", HELD_OUT)):
        for place, subject in enumerate(("Accounting", "Art_Theory", "Chemistry")):
            rows = [
                mmmu_row(f"{split}_{subject}_{number}", person, number + place, split != "test")
                for number, person in enumerate(people(of)[place::3], 1)
            ]
            (root / subject).mkdir(parents=True, exist_ok=True)
            write_parquet(root / subject / f"{split}-00000-of-00001.parquet", rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows in the types of the dataset on Hugging Face."""
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    names = rows[0] if rows else ()
    types = [(name, image if re.fullmatch("image_[1-7]", name) else pyarrow.string()) for name in names]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(types)), path)


def write_seedbench(root: Path) -> None:
    names = ["Scene Understanding", "Instance Identity", "Instance Attributes", "Instance Location"]
    names += [
        "Instances Counting",
        "Spatial Relation",
        "Instance Interaction",
        "Visual Reasoning",
        "Text Understanding",
    ]
    names += ["Action Recognition", "Action Prediction", "Procedure Understanding"]
    questions = []
    for number, person in enumerate(people(HELD_OUT)):
        image = f"145442{number}_2591111986"
        (root / "SEED-Bench-image").mkdir(parents=True, exist_ok=True)
        (root / "SEED-Bench-image" / image).write_bytes(encoded(person.pixels))
        options, letter = tone_options(person)
        asked = [(3, "What skin tone does the person have?", options, letter)]
        asked.append((5, "How many people are in the image?", ["One", "Two", "Three", "Four"], "A"))
        for kind, text, choices, answer in asked:
            known = dict(zip(("choice_a", "choice_b", "choice_c", "choice_d"), choices, strict=True))
            item = {"answer": answer, **known, "data_id": image, "data_type": "image", "question": text}
            questions.append(item | {"question_id": f"10{len(questions)}", "question_type_id": kind})
    video = {"data_id": "P03/P03_24.MP4", "data_type": "video", "question_id": "v1962", "question_type_id": 11}
    questions.append(questions[0] | video | {"segment": [648.0, 658.0]})
    document = {"questions": questions, "question_type": {name: number for number, name in enumerate(names, 1)}}
    write_json(root / "SEED-Bench.json", document)
