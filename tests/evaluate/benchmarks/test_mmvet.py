"""MM-Vet."""

import pytest

from emu_jax.evaluate.question import Question
from tests.evaluate.benchmarks.editing import edit, read, refused
from tests.evaluate.samples import write_sample


def test_questions(tmp_path):
    write_sample("mmvet", tmp_path)
    found = read("mmvet", tmp_path)
    assert list(found) == ["v1_0", "v1_1", "v1_2", "v1_3"]
    assert found["v1_2"] == Question(
        id="v1_2",
        images=(tmp_path / "images" / "v1_2.png",),
        text="Describe the person.",
        answers=("person walking<AND>light skin tone",),
        kind="gen, rec",
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d["v1_1"].pop("answer"), "v1_1 has no answer"),
        (lambda d: d["v1_1"].update(capability=[]), "v1_1.capability is a list of 0; expected at least one capability"),
        (lambda d: d["v1_1"].update(capability=["rec", 1]), "v1_1.capability[1] is 1; expected a text"),
        (lambda d: d.update(v1_1="no"), "v1_1 is 'no'; expected a JSON object"),
    ],
)
def test_wrong_files(tmp_path, change, expected):
    write_sample("mmvet", tmp_path)
    edit(tmp_path / "mm-vet.json", change)
    assert refused("mmvet", tmp_path) == f"mm-vet.json: {expected}"


def test_an_id_that_stands_twice(tmp_path):
    write_sample("mmvet", tmp_path)
    path = tmp_path / "mm-vet.json"
    path.write_text(path.read_text().replace('"v1_3"', '"v1_2"'))
    assert refused("mmvet", tmp_path).startswith("mm-vet.json: an object has the name 'v1_2' twice; expected the file")
