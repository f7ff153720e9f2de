"""Drawn prompts and detections for GenEval, with ugly cases, and what the official programs say about them.

The constants at the end are what `evaluate_image` and `relative_position` of evaluation/evaluate_images.py return, and
what evaluation/summary_scores.py prints: djghosh13/geneval, commit af4902f24d3ca90ebbb446dd9891a59e0f82725f, with NumPy
2.4.6 and with the objects and colours of `cases()` in place of the detector's and CLIP's.
"""

import random

CLASSES = ("bench", "cow", "traffic light", "computer mouse", "person", "hair drier")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
SAMPLES = 4


def scenes() -> list[dict]:
    """Six lines of each tag, with clauses that the published file does not have among them."""
    rng = random.Random(0)
    found = []
    for number in range(6):
        first, second = rng.sample(CLASSES, 2)
        one, two = ({"class": name, "count": 1} for name in (first, second))
        count = rng.randint(2, 4)
        many = {"class": first, "count": count}
        relation = rng.choice(RELATIONS)
        colors = [{"color": color} for color in rng.sample(COLORS, 2)]
        found += [
            {"tag": "single_object", "include": [one]},
            {"tag": "two_object", "include": [one, two]},
            {"tag": "counting", "include": [many], "exclude": [{"class": first, "count": count + 1}]},
            {"tag": "colors", "include": [(many if number == 4 else one) | colors[0]]},
            {"tag": "position", "include": [one, two | {"position": [relation, 0]}]},
            {"tag": "color_attr", "include": [one | colors[0], two | colors[1]]},
        ]
    found[4]["include"][1]["class"] = found[4]["include"][0]["class"]  # an object relative to itself
    found[10]["include"][0]["count"] = found[28]["include"][1]["count"] = found[34]["include"][1]["count"] = 2
    found[16]["include"][0]["color"] = "red"
    found[22]["exclude"] = [{"class": CLASSES[0], "count": 17}, {"class": CLASSES[1], "count": 3}]
    found[0]["exclude"] = [{"class": found[0]["include"][0]["class"], "count": 17}]  # more than are looked at
    return [scene | {"prompt": f"prompt {number}"} for number, scene in enumerate(found)]


def cases() -> list[tuple[dict, list[dict]]]:
    """Lines, each `SAMPLES` times, with the objects that were found in a drawing; no two have the same score."""
    rng = random.Random(1)
    found = []
    for scene in scenes():
        for _ in range(SAMPLES):
            objects = [_object(rng, clause) for clause in scene["include"] for _ in range(clause["count"])]
            if scene["tag"] == "position":
                _arrange(rng, objects, scene["include"][0]["count"], scene["include"][1]["position"][0])
            if "exclude" in scene and rng.random() < 0.5:
                objects += [_object(rng, clause) for clause in scene["exclude"] for _ in range(clause["count"] + 3)]
            if rng.random() < 0.3:
                objects += [_object(rng, {"class": rng.choice(CLASSES)}) for _ in range(rng.choice([1, 2, 40]))]
            if rng.random() < 0.15:
                objects = objects[1:]
            rng.shuffle(objects)
            for item in objects:
                item["score"] = rng.uniform(0.92, 1) if rng.random() < 0.9 else rng.uniform(0, 1)
            if objects and rng.random() < 0.4:
                objects[0]["score"] = rng.choice([0.3, 0.9, 0.31, 0.91])  # 0.3 and 0.9 are not above themselves
            found.append((scene, objects))
    return found


def _object(rng: random.Random, clause: dict) -> dict:
    left, top = rng.uniform(0, 400), rng.uniform(0, 400)
    width, height = rng.choice([(0, 0), (1, 300), (rng.uniform(5, 99), rng.uniform(5, 99))])
    box = [left, top, left + width, top + height]
    if rng.random() < 0.05:
        box = [*box[2:], *box[:2]]  # upside down
    color = clause["color"] if "color" in clause and rng.random() < 0.8 else rng.choice(COLORS)
    return {"class": clause["class"], "box": box, "color": color}


def _arrange(rng: random.Random, objects: list[dict], targets: int, relation: str) -> None:
    """Moves the first objects, the targets: away in the direction or diagonally, just far enough, or onto others. Of
    several targets or others, the last one is on the wrong side at times."""
    x, y = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}[relation]
    far = rng.choice([0, 19, 20, 21, 38, 42, 60, 200, 200, 200])  # 20 is as far as they may overlap
    side = rng.choice([0, 0, 0, 60, 100, 300])
    if len(objects) > 2:
        far, side = 200, 0
    wrong = len(objects) > 2 and rng.random() < 0.5
    for number, item in enumerate(objects):
        left, top = (far * x + side * y, far * y + side * x) if number < targets else (rng.choice([0, 0, 1]), 0)
        if wrong and number == 1 and targets == 2:
            left, top = -far * x, -far * y
        if wrong and number == 2 and targets == 1:
            left, top = 2 * far * x, 2 * far * y
        item["box"] = [left + 200, top + 200, left + 300, top + 300]


def boxes() -> list[tuple[list[float], list[float]]]:
    """Pairs of boxes: apart by about as much as they may overlap, exactly diagonal, of no size, upside down, large."""
    rng = random.Random(2)
    found = []
    for _ in range(120):
        first, second = (_object(rng, {"class": ""})["box"] for _ in range(2))
        match rng.randrange(4):
            case 0:  # whole numbers
                first, second = ([round(value) for value in box] for box in (first, second))
            case 1:  # one moved by about a fifth of its size
                dx, dy = (rng.choice([-1, 0, 1]) * rng.uniform(0.15, 0.6) for _ in range(2))
                width, height = abs(second[2] - second[0]), abs(second[3] - second[1])
                first = [value + move for value, move in zip(second, 2 * [dx * width, dy * height], strict=True)]
            case 2:  # equal sizes, 3 : 4 or 1 : 1 apart
                x, y = rng.choice([(30, 40), (-40, 30), (80, 80), (-90, 90), (0, -20), (20.001, 0)])
                first, second = [x, y, 100 + x, 100 + y], [0, 0, 100, 100]
        found.append((first, second))
    return found


# "1" for an image that is correct.
CORRECT = (
    "011111011000111100000000101101110110100100000001000001011001001110000000"
    "111110010010100110000000111111110000100110111101110010110000111000011001"
)
# Hexadecimal digits: the sum of 1, 2, 4 and 8 for the relations that hold, in their order above.
RELATED = (
    "0084200014854a18980428061002a2002520094050019a04a0406220a220"
    "0006900042140200120aa010500190201680201a294050a2245600624191"
)
# As printed: right images of each tag, of which there are 24, and the rest in percent.
RIGHT = {"single_object": 16, "two_object": 17, "counting": 6, "colors": 15, "position": 6, "color_attr": 6}
IMAGES, PROMPTS, OVERALL = "45.83%", "77.78%", "0.45833"
