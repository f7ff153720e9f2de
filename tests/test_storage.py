"""Atomic writes leave the old file or the new one, and JSON that cannot be used is named."""

from pathlib import Path

import pytest

from emu_jax.errors import UserError
from emu_jax.storage import json_lines, read_json_object, replace_text, write_atomically


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
        ("{", r"not JSON \(.*\); expected a list of x"),
        ("[" * 100_000, r"not JSON \(nested too deeply\); expected"),
        ("9" * 5000, r"not JSON \(Exceeds the limit .*\); expected"),
        ("[]", "not a JSON object"),
    ],
)
def test_json_that_cannot_be_used(tmp_path, text, message):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=rf"a\.json: {message}"):
        read_json_object(tmp_path / "a.json", "a list of x")


def test_lines_of_json_end_by_a_newline_alone():
    """`str.splitlines` also ends them by U+2028 and U+0085, which a text may hold; files may come from Windows."""
    data = '\ufeff{"a": "x\u2028y\x85z"}\r\n\n{"b": "\\ud83d\\ude00"}'.encode()
    assert [*json_lines(Path("a.jsonl"), data)] == [(1, {"a": "x\u2028y\x85z"}), (3, {"b": "\U0001f600"})]
    with pytest.raises(UserError, match=r"^a\.jsonl:2: a text holds \\udc00, which is half"):
        [*json_lines(Path("a.jsonl"), b'1\n["\\udc00"]')]
