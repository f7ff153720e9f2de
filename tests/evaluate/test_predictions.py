"""Predictions on disk: what a kill leaves, and what is refused."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.errors import UserError
from emu_jax.evaluate import predictions

RUN = predictions.RunIdentity("coco", "test", 4, "encoder 1", False, True, "model", "questions")
IDS = ["a", "b", "c"]


def _write(folder, records, *, run=RUN, name="0-of-1.jsonl"):
    with predictions.Writer(folder / name, run) as writer:
        writer.write(records)
    return folder / name


def test_files_of_all_processes_are_one_set(tmp_path):
    _write(tmp_path, [{"id": "a", "prediction": "x"}], name="0-of-2.jsonl")
    _write(tmp_path, [{"id": "b", "prediction": [1.0, 2.0]}], name="1-of-2.jsonl")
    assert predictions.read(tmp_path, RUN, IDS) == {"a": "x", "b": [1.0, 2.0]}
    assert predictions.read(tmp_path / "none", RUN, IDS) == {}


def test_files_of_other_programs_are_not_predictions(tmp_path):
    _write(tmp_path, [{"id": "a", "prediction": "x"}])
    (tmp_path / "detections.jsonl").write_text('{"image": "00000/samples/0000.png", "objects": []}\n')
    assert predictions.read(tmp_path, RUN, IDS) == {"a": "x"}


def test_a_file_in_a_bucket_is_complete_once_it_is_closed(bucket):
    file = bucket / "0-of-1.jsonl"
    with predictions.Writer(file, RUN) as writer:
        assert file.exists()  # a missing permission is noticed before anything is predicted
        writer.write([{"id": "a", "prediction": "ä\u2028"}])
    _write(bucket, [{"id": "b", "prediction": "y"}])
    assert predictions.read(bucket, RUN, IDS) == {"a": "ä\u2028", "b": "y"}
    assert predictions.read(bucket / "none", RUN, IDS) == {}


@given(cut=st.integers(0, 400))
def test_wherever_a_kill_cuts_the_file_whole_lines_stay_and_writing_goes_on(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("cut")
    file = _write(folder, [{"id": "a", "prediction": "ä\n"}, {"id": "b", "prediction": "y"}])
    data = file.read_bytes()
    cut = min(cut, len(data))
    file.write_bytes(data[:cut])
    whole = data[:cut].count(b"\n")
    kept = {id: text for (id, text), _ in zip([("a", "ä\n"), ("b", "y")], range(whole - 1), strict=False)}
    assert predictions.read(folder, RUN, IDS) == kept
    _write(folder, [{"id": "c", "prediction": "z"}])
    assert predictions.read(folder, RUN, IDS) == kept | {"c": "z"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"benchmark": "vqav2"}, "predictions for another run: the benchmark was 'coco', is 'vqav2'"),
        ({"shots": 8}, "the number of few-shot examples was 4, is 8"),
        ({"model": "other"}, "the model was 'model', is 'other'"),
    ],
    ids=["benchmark", "shots", "model"],
)
def test_predictions_of_something_else_are_refused(tmp_path, change, message):
    _write(tmp_path, [{"id": "a", "prediction": "x"}])
    with pytest.raises(UserError, match=message):
        predictions.read(tmp_path, dataclasses.replace(RUN, **change), IDS)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"id": "a", "prediction": "x"}] * 2, ":3: a second prediction for a"),
        ([{"id": "z", "prediction": "x"}], ":2: a prediction for z, which is no question of coco test"),
        ([{"id": "a"}], ":2: expected {"),
    ],
    ids=["twice", "unknown", "no prediction"],
)
def test_lines_that_cannot_be_are_refused(tmp_path, records, message):
    _write(tmp_path, records)
    with pytest.raises(UserError, match=message):
        predictions.read(tmp_path, RUN, IDS)


def test_a_broken_line_is_named(tmp_path):
    file = _write(tmp_path, [{"id": "a", "prediction": "x"}])
    file.write_bytes(file.read_bytes() + b"{]\n")
    with pytest.raises(UserError, match=r"0-of-1.jsonl:3: not JSON"):
        predictions.read(tmp_path, RUN, IDS)


def test_names_of_runs():
    assert RUN.name == "coco-test-4shot"
    assert dataclasses.replace(RUN, shots=0, text_examples=True).name == "coco-test-0shot-text"
