"""What another program saw in drawn images: a line each, and every fault in one line."""

import pytest

from emu_jax.errors import UserError
from emu_jax.evaluate.formats.drawn_images import read_by_image


def test_a_line_each(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"image": "1.png"}\n\n{"image": "2/\xe2\x80\xa8.png"}')  # U+2028 ends no line
    found = read_by_image(path, ["1.png", "2/\u2028.png"])
    assert {name: entry.place for name, entry in found.items()} == {"1.png": "line 1", "2/\u2028.png": "line 3"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"image": "1.png"}\n[2]\n', "a.jsonl: line 2 is a list of 1; expected a JSON object"),
        ('{"image": "1.png"}\n{"a"\n', "a.jsonl:2: not JSON"),
        ("", "a.jsonl: has no image '1.png'; expected a line for each of the 1 drawn images"),
        (None, "a.jsonl: cannot be read (No such file or directory); expected a JSON object a line"),
    ],
)
def test_faults(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError) as error:
        read_by_image(tmp_path / "a.jsonl", ["1.png"])
    assert expected in str(error.value)
