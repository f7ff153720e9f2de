"""What another program saw in drawn images: a JSONL file with an object an image, whose `image` is the file's name.

    OUT/geneval-test-0shot/drawn/00000/samples/0000.png
    OUT/geneval-test-0shot/detections.jsonl    {"image": "00000/samples/0000.png", …}

The user's detector or VQA model writes the file beside the folder of drawn images.
"""

from __future__ import annotations

from collections.abc import Sequence

from emu_jax.errors import UserError
from emu_jax.evaluate.formats.files import Entry, more, unique
from emu_jax.storage import Path, json_lines


def read_by_image(path: Path, names: Sequence[str]) -> dict[str, Entry]:
    """The file's objects by the names of their images, which are exactly `names`.

    Raises:
      UserError: an image is missing, is there twice or was not drawn, or the file cannot be read.
    """
    found = unique(_lines(path), lambda entry: entry.text("image"), "image")
    if missing := [name for name in names if name not in found]:
        raise UserError(
            f"{path}: has no image {missing[0]!r}{more(missing)}; expected a line for each of the {len(names)} drawn "
            "images, without what was found if that is nothing"
        )
    drawn = set(names)
    for name, entry in found.items():
        if name not in drawn:
            raise entry.wrong("image", f"the name of a drawn image, such as {names[0]!r}")
    return found


def _lines(path: Path) -> list[Entry]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); expected a JSON object a line") from error
    return [Entry(value, path, f"line {number}") for number, value in json_lines(path, data)]
