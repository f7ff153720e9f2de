"""Drawings in files: where they are stored, whole, and under names that stay in their folder."""

import pytest

from emu_jax import Emu
from emu_jax.errors import UserError
from emu_jax.evaluate import predictions
from emu_jax.evaluate.benchmarks.coco_drawing import prompt
from emu_jax.evaluate.predict import DrawingOutput, predict
from emu_jax.evaluate.question import Question

RUN = predictions.RunIdentity("mine", "test", 0, "", False, False, "model", "questions", "steps=1")


def _predict(model, folder, ids):
    drawing = DrawingOutput(folder / "drawn", {"sampler": "ddim", "steps": 1})
    questions = [Question(id, text="a red hat") for id in ids]
    return predict(model, questions, prompt, folder, RUN, batch=2, drawing=drawing)


@pytest.mark.long
def test_slashes_in_ids_make_folders(drawing, tmp_path):
    model = Emu.load(drawing)
    ids = ["7/0", "7/1", "8/samples/0000", "9"]
    found = _predict(model, tmp_path, ids)
    assert found == {id: f"{id}.png" for id in ids}
    files = [path for path in (tmp_path / "drawn").rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(tmp_path / "drawn")) for path in files) == [f"{id}.png" for id in ids]
    assert len({path.read_bytes() for path in files}) == 4  # of one prompt, by seeds of the ids


@pytest.mark.long
@pytest.mark.parametrize("id", ["../9", "7/../../9", "/9", "7//9", "7/.", "", "7\\x00"])
def test_no_drawing_leaves_its_folder(drawing, tmp_path, id):
    id = id.replace("\\x00", "\0")
    with pytest.raises(UserError) as caught:
        _predict(Emu.load(drawing), tmp_path / "out", [id])
    assert str(caught.value).startswith(f"question {id!a}: its drawing would be stored out of its folder; expected")
    assert not list(tmp_path.rglob("*.png"))
