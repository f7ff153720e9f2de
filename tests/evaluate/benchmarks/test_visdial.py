"""Visual Dialog: rounds, histories, candidates and the one round with relevance."""

import pytest

from emu_jax.evaluate.question import Question
from tests.evaluate.benchmarks.editing import edit, read, refused
from tests.evaluate.samples import write_sample

FILE, DENSE = "visdial_1.0_val.json", "visdial_1.0_val_dense_annotations.json"
PAIR = "expected two complete files of one release and split"


@pytest.fixture
def visdial(tmp_path):
    write_sample("visdial", tmp_path)
    return tmp_path


def test_rounds(visdial):
    found = read("visdial", visdial)
    image = visdial / "VisualDialog_val2018" / "VisualDialog_val2018_000000284024.jpg"
    candidates = ("dark", "yes", "no", "1", "2", "can't tell", "light", "medium-light", "medium", "medium-dark")
    common = {
        "images": (image,),
        "caption": "A person in lotus position with medium skin tone.",
        "candidates": candidates,
    }
    first = ("what skin tone does the person have", "medium")
    second = ("is it a photo", "no")
    third = ("how many people are there", "1")
    assert [found[f"284024/{number}"] for number in (1, 2, 3)] == [
        Question(id="284024/1", text=first[0], answers=first[1:], **common),
        Question(
            id="284024/2",
            text=second[0],
            answers=second[1:],
            history=(first,),
            relevance=(0.0, 0.0, 1.0, 0.4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
            **common,
        ),
        Question(id="284024/3", text=third[0], answers=third[1:], history=(first, second), **common),
    ]


def test_one_round_of_a_dialogue_is_judged(visdial):
    judged = [key for key, question in read("visdial", visdial).items() if question.relevance]
    assert judged == ["185565/1", "284024/2", "574189/3", "478132/1"]


def test_test_asks_the_last_round_alone(visdial):
    found = read("visdial", visdial, "test")
    assert {key: len(question.history) for key, question in found.items()} == {
        "185565/1": 0,
        "284024/2": 1,
        "574189/3": 2,
        "478132/1": 0,
    }
    assert all(len(q.candidates) == 10 and q.answers == () and q.relevance == () for q in found.values())
    assert found["574189/3"].images == (visdial / "VisualDialog_test2018" / "VisualDialog_test2018_000000574189.jpg",)


def test_examples_are_of_both_folders_of_coco_and_keep_no_candidates(visdial):
    found = read("visdial", visdial, "train")
    assert found["25/2"] == Question(
        id="25/2",
        images=(visdial / "val2014" / "COCO_val2014_000000000025.jpg",),
        text="is it a photo",
        answers=("no",),
        history=found["25/3"].history[:1],
        caption=found["25/1"].caption,
    )
    assert found["9/1"].images == (visdial / "train2014" / "COCO_train2014_000000000009.jpg",)


def _round(number):
    return lambda d: d["data"]["dialogs"][0]["dialog"][number]


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        (
            FILE,
            lambda d: d["data"]["dialogs"].append(d["data"]["dialogs"][2]),
            "data.dialogs[4] has the image_id 574189 again, after data.dialogs[2]; expected each once",
        ),
        (
            FILE,
            lambda d: _round(1)(d).update(question=3),
            "data.dialogs[0].dialog[1].question is 3; expected a number from 0 to 2",
        ),
        (
            FILE,
            lambda d: _round(1)(d).update(answer=-1),
            "data.dialogs[0].dialog[1].answer is -1; expected a number from 0 to 9",
        ),
        (FILE, lambda d: _round(1)(d).pop("answer"), "data.dialogs[0].dialog[1] has no answer"),
        (FILE, lambda d: _round(1)(d).pop("answer_options"), "data.dialogs[0].dialog[1] has no answer_options"),
        (
            FILE,
            lambda d: _round(1)(d).update(answer_options=[0, 10]),
            "data.dialogs[0].dialog[1].answer_options is a list of 2; expected numbers of answers, 0 to 9",
        ),
        (
            FILE,
            lambda d: _round(1)(d).update(gt_index=0),
            "data.dialogs[0].dialog[1].gt_index is 0; expected the index of the answer, 'no', among the options",
        ),
        (
            DENSE,
            lambda d: d.pop(1),
            f"has no image_id 284024, which {FILE} has; {PAIR}",
        ),
        (
            DENSE,
            lambda d: d[1].update(image_id=7),
            f"has no image_id 284024, which {FILE} has; {PAIR}",
        ),
        (
            DENSE,
            lambda d: d.append({**d[1], "image_id": 7}),
            f"has image_id 7, which {FILE} lacks; {PAIR}",
        ),
        (DENSE, lambda d: d[1].update(round_id=4), "[1].round_id is 4; expected a round of the dialogue, 1 to 3"),
        (
            DENSE,
            lambda d: d[1]["gt_relevance"].__setitem__(3, float("nan")),
            "[1].gt_relevance[3] is nan; expected a number from 0 to 1",
        ),
        (
            DENSE,
            lambda d: d[1]["gt_relevance"].pop(),
            "[1].gt_relevance is a list of 9; expected a number for each of the round's 10 options",
        ),
    ],
)
def test_wrong_files(visdial, file, change, expected):
    edit(visdial / file, change)
    assert refused("visdial", visdial) == f"{file}: {expected}"
