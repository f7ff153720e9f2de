"""Atomic writes leave the old file or the new one, and JSON that cannot be used is named."""

import pytest

from emu_jax.errors import UserError
from emu_jax.storage import read_json_object, replace_text, write_atomically


def test_an_error_leaves_the_old_file(tmp_path):
    replace_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError), write_atomically(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"
    replace_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"


def test_a_folder_appears_complete(tmp_path):
    left = tmp_path / "a.partial" / "left by a killed process"
    left.mkdir(parents=True)
    with write_atomically(tmp_path / "a") as partial:
        partial.mkdir()
        (partial / "file").write_text("")
        assert not (tmp_path / "a").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file; expected a list of x"),
        ("{", r"not a JSON file \(.*\)"),
        ("[]", "not a JSON object"),
    ],
)
def test_json_that_cannot_be_used(tmp_path, text, message):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=rf"a\.json: {message}"):
        read_json_object(tmp_path / "a.json", "a list of x")
