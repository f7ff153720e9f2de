"""MSVD-QA, MSRVTT-QA and NExT-QA."""

import csv
import json

import av
import numpy as np
import pytest

from emu_jax.evaluate.benchmarks.nextqa import EXTRA
from emu_jax.evaluate.question import Question
from emu_jax.generate.messages import Video, read_video
from tests.evaluate.benchmarks.editing import edit, read, refused
from tests.evaluate.samples import write_sample


@pytest.fixture
def msvd(tmp_path):
    write_sample("msvdqa", tmp_path)
    return tmp_path


@pytest.fixture
def nextqa(tmp_path):
    write_sample("nextqa", tmp_path)
    return tmp_path


def test_msvd(msvd):
    found = read("msvdqa", msvd)
    video = msvd / "YouTubeClips" / "-7KMZQEsJW4_205_208.avi"
    assert [found[key] for key in ("36003", "36004", "36005")] == [
        Question(
            id="36003", video=video, text="what skin tone does the person have?", answers=("medium",), kind="what"
        ),
        Question(
            id="36004",
            video=video,
            text="who is moving, a person in lotus position or a cat?",
            answers=("person in lotus position",),
            kind="who",
        ),
        Question(id="36005", video=video, text="is the person moving?", answers=("yes",)),
    ]


def test_a_question_shows_the_reference_s_eight_frames(msvd):
    """Also where training samples its frames."""
    video = read("msvdqa", msvd)["36003"].video
    with av.open(video) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(every) == 16
    expected = [every[index] for index in (0, 2, 4, 6, 8, 9, 11, 13)]  # round(15 / 8 * i), to even
    np.testing.assert_array_equal(read_video(Video(video)), expected)


def test_msvd_as_the_authors_code_has_it(msvd):
    (msvd / "video").mkdir()
    for line in (msvd / "youtube_mapping.txt").read_text().splitlines():
        clip, name = line.split()
        (msvd / "YouTubeClips" / f"{clip}.avi").rename(msvd / "video" / f"{name}.avi")
    (msvd / "youtube_mapping.txt").unlink()
    assert read("msvdqa", msvd)["36000"].video == msvd / "video" / "vid1.avi"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("-5Cv_1_2", "line 14 is '-5Cv_1_2'; expected a clip and its number: …_5_15 vid1"),
        ("-5Cv_1_2 vid3", "line 14 has 'vid3' again; expected each number once"),
    ],
)
def test_wrong_mapping(msvd, line, expected):
    with (msvd / "youtube_mapping.txt").open("a") as file:
        file.write(line)
    assert refused("msvdqa", msvd) == f"youtube_mapping.txt: {expected}"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d[1].update(id=36000), "[1] has the id 36000 again, after [0]; expected each once"),
        (lambda d: d[1].pop("answer"), "[1] has no answer"),
        (lambda d: d[1].update(video_id="vid1"), "[1].video_id is 'vid1'; expected a whole number"),
        (
            lambda d: d[1].update(video_id=99),
            "[1].video_id is 99; expected the number of a video in youtube_mapping.txt",
        ),
    ],
)
def test_wrong_msvd(msvd, change, expected):
    edit(msvd / "test_qa.json", change)
    assert refused("msvdqa", msvd) == f"test_qa.json: {expected}"


def test_msrvtt(tmp_path):
    write_sample("msrvttqa", tmp_path)
    found = read("msrvttqa", tmp_path)
    assert found["158590"] == Question(
        id="158590",
        video=tmp_path / "TestVideo" / "video7013.mp4",
        text="what skin tone does the person have?",
        answers=("dark",),
        kind="what",
    )
    assert read("msrvttqa", tmp_path, "train")["0"].video == tmp_path / "TrainValVideo" / "video0.mp4"


# ---------------------------------------------------------------- NExT-QA


def test_nextqa(nextqa):
    found = read("nextqa", nextqa)
    assert list(found)[:4] == ["4924794333/0", "4924794333/1", "4924794333/2", "4924794334/0"]
    assert found["4924794333/1"] == Question(
        id="4924794333/1",
        video=nextqa / "NExTVideo" / "1000" / "4924794333.mp4",
        text="who moves in the video",
        answers=("man in steamy room", "a person"),
        kind="DO",
    )
    assert found["4924794334/2"].answers == ("moves",) and found["4924794334/2"].kind == "CH"
    assert {len(question.answers) for question in read("nextqa", nextqa, "val").values()} == {1}


def _rewrite(path, change):
    """Changes a CSV's rows, a list of lists that begins with the header."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    change(rows)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_second_references_in_a_column(nextqa):
    (nextqa / "add_reference_answer_test.json").unlink()

    def change(rows):
        for row, cell in zip(rows, [EXTRA, "beige", *[""] * 11], strict=True):
            row.append(cell)

    _rewrite(nextqa / "test.csv", change)
    assert [question.answers for question in read("nextqa", nextqa).values()][:2] == [
        ("medium-light", "beige"),
        ("man in steamy room",),
    ]


def test_the_numbers_that_train_gives_twice(nextqa):
    def change(rows):
        rows[3][6] = "0"

    _rewrite(nextqa / "train.csv", change)
    found = read("nextqa", nextqa, "train")
    assert found["3606518674/0"].text == "what is the person s skin tone"
    assert found["3606518674/0/again"].text == "how does the person get to the right"
    _rewrite(nextqa / "train.csv", lambda rows: rows.append(rows[1]))
    assert refused("nextqa", nextqa, "train") == (
        "train.csv: line 29 has the video and qid '3606518674/0' again, after line 2; expected each once"
    )
    _rewrite(nextqa / "test.csv", change)
    assert refused("nextqa", nextqa) == (
        "test.csv: line 4 has the video and qid '4924794333/0' again, after line 2; expected each once"
    )


def _set(row, column, value):
    return lambda rows: rows[row].__setitem__(column, value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_set(0, 5, "reply"), "no column answer; expected video, question, answer, qid, type"),
        (_set(2, 5, ""), "line 3.answer is ''; expected an answer"),
        (_set(2, 7, "XX"), "line 3.type is 'XX'; expected one of CW, CH, TN, TP, TC, DB, DC, DL, DO"),
        (_set(2, 0, "77"), "line 3.video is '77'; expected a video that map_vid_vidorID.json knows"),
        (
            lambda rows: rows[2].pop(),
            "line 3 does not have the 8 cells of the header; expected the file as it is published",
        ),
        (
            lambda rows: rows[2].append("x"),
            "line 3 does not have the 8 cells of the header; expected the file as it is",
        ),
        (
            lambda rows: rows.__delitem__(slice(1, None)),
            "no rows; expected a CSV of video, question, answer, qid, type",
        ),
    ],
)
def test_wrong_tables(nextqa, change, expected):
    _rewrite(nextqa / "val.csv", change)
    assert refused("nextqa", nextqa, "val").startswith(f"val.csv: {expected}")


def test_a_table_that_is_no_text(nextqa):
    (nextqa / "val.csv").write_bytes(b"video,question\n\xff\xfe")
    assert refused("nextqa", nextqa, "val").startswith("val.csv: cannot be read ('utf-8' codec can't decode byte 0xff")


def test_a_second_reference_without_a_question(nextqa):
    second = {"4924794333": {"0": "a", "9": "b"}, "5": {"1": "c"}}
    (nextqa / "add_reference_answer_test.json").write_text(json.dumps(second))
    assert refused("nextqa", nextqa) == (
        "add_reference_answer_test.json: has video and qid '4924794333/9' (and 1 more), which test.csv lacks; "
        "expected two complete files of one release and split"
    )
