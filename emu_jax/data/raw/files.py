"""Raw data on disk: the shards under a path, images named by untrusted text, and JSON read in bounded memory.

    path ─ find_shards ─ "folder//part/00012.tar" ─ shard_name ─ "part/00012.tar", with which keys begin

A shard is a path that can be opened as it is; what follows its `//` is the same on every machine.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from emu_jax.data.raw.dataset_folders import data_names
from emu_jax.data.raw.reader import Reject
from emu_jax.errors import UserError
from emu_jax.storage import MAX_LINE_BYTES, Line, as_path, check_local, is_bucket
from emu_jax.storage import Path as AnyPath

MAX_IMAGE_BYTES = 256 << 20
MAX_RECORD_CHARACTERS = 64 << 20
LOCAL = "raw data in this format, with files beside each other,"
CHUNK = 1 << 18  # characters of JSON read at a time
SPACE = re.compile(r"[ \t\r\n]*")


class Skip(Exception):
    """A document or an image cannot be used; becomes a Reject where its key is known."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail

    def reject(self, key: str, whole: bool = True) -> Reject:
        return Reject(key, self.reason, self.detail, whole)


# ---------------------------------------------------------------- shards


def find_shards(path: str, patterns: Sequence[str], what: str, *, alone: bool = False) -> list[str]:
    """The files at `path`, sorted: a file, a glob, or a folder that is searched recursively for `patterns`.

    Args:
      what: what the files should be, for errors.
      alone: whether a shard holds all that its documents need; otherwise `path` may not be in a bucket.

    Raises:
      UserError: there are none.
    """
    if alone and is_bucket(as_path(path)):
        return _find_in_bucket(path, patterns, what)
    here = check_local(path, LOCAL)
    if here.is_file():
        return [f"{here.parent}//{here.name}"]
    if here.is_dir():
        root = here
        matching = (str(n) for n in walk(here) if any(fnmatch.fnmatchcase(n.name, pattern) for pattern in patterns))
        found = set(map(Path, data_names(here, matching)))
    elif glob.has_magic(path):
        root = next(folder for folder in here.parents if not glob.has_magic(str(folder)))
        found = set(_glob(root, here))
    else:
        raise UserError(f"{path}: no such file or folder; expected {what}")
    names = [name for name in found if not any(part.startswith(".") for part in name.parts)]
    if lost := sorted(name for name in names if not (root / name).exists()):
        raise UserError(f"{root / lost[0]}: a link to a file that is not there; copy the file, or remove the link")
    shards = sorted(f"{root}//{name}" for name in names)
    if not shards:
        raise UserError(f"{path}: holds no {' or '.join(patterns)}; expected {what}")
    return shards


def walk(root: Path) -> Iterator[Path]:
    """The files under a folder, relative to it, in a fixed order; names that begin with a dot are left out.

    A link to a folder is read like the folder. Only a link to one of the folders around it, which would never end, is
    left out. A link to nothing is yielded, so that the caller can say so.

    Raises:
      UserError: a folder cannot be listed.
    """
    left = [(Path(), frozenset([_identity(root)]))]
    while left:
        folder, around = left.pop()
        inner = []
        for name in _listed(root / folder):
            path = root / folder / name
            if not os.path.isdir(path):
                yield folder / name
            elif (identity := _identity(path)) not in around:
                inner.append((folder / name, around | {identity}))
        left += reversed(inner)


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be listed ({error.strerror}); expected a folder that you may read"
        ) from error


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _glob(root: Path, pattern: Path) -> Iterator[Path]:
    """The files that match a pattern, relative to `root`, the part of it without wildcards; `**` is any folders."""
    parts = pattern.relative_to(root).parts
    if "**" in parts:  # not by glob, which follows two links to folders around them without end
        yield from (name for name in walk(root) if _matches(name.parts, parts))
        return
    for path in map(Path, glob.glob(str(pattern))):
        if not path.is_dir() and not _is_looped(root, path):
            yield path.relative_to(root)


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not names
    if pattern[0] == "**":
        return _matches(names, pattern[1:]) or (bool(names) and _matches(names[1:], pattern))
    return bool(names) and fnmatch.fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _is_looped(root: Path, path: Path) -> bool:
    """Whether a link leads from `path` back to a folder around it."""
    around = [_identity(folder) for folder in (path.parent, *path.parent.parents) if folder.is_relative_to(root)]
    return len(set(around)) < len(around)


def _find_in_bucket(path: str, patterns: Sequence[str], what: str) -> list[str]:
    if glob.has_magic(path):
        raise UserError(f"{path}: globs are not searched in buckets; name a folder or a file")
    from emu_jax import buckets  # on demand: its packages are an extra

    here = as_path(path)
    if here.is_file():
        return [f"{here.parent}//{here.name}"]
    start = len(str(here).partition("://")[2]) + 1
    names = sorted(file[start:] for file in buckets.filesystem(here).find(str(here)))
    found = [name for name in names if any(PurePosixPath(name).match(pattern) for pattern in patterns)]
    found = data_names(here, (name for name in found if not any(part.startswith(".") for part in name.split("/"))))
    shards = [f"{here}//{name}" for name in found]
    if not shards:
        raise UserError(f"{path}: holds no {' or '.join(patterns)}; expected {what}")
    return shards


def shard_name(shard: str) -> str:
    """The part of a shard's path that does not depend on the folder of the data."""
    head, mark, name = shard.rpartition("//")
    return name if mark and head else Path(shard).name


def shard_path(shard: str) -> AnyPath:
    """The file of a shard, which has two slashes where its name begins; in a bucket they would be another file's."""
    head, mark, name = shard.rpartition("//")
    return as_path(f"{head}/{name}" if mark and head else shard)


@contextlib.contextmanager
def opened(shard: str) -> Iterator[io.BufferedReader]:
    """A shard's bytes; one in a bucket is first copied to a local temporary file."""
    path = shard_path(shard)
    if isinstance(path, Path):
        with path.open("rb") as file:
            yield file
        return
    from emu_jax import buckets

    with tempfile.NamedTemporaryFile(prefix="emu-jax-") as copy:
        buckets.filesystem(path).get_file(str(path), copy.name)
        with open(copy.name, "rb") as file:
            yield file


# ---------------------------------------------------------------- text and images


def clean_text(text: str, max_characters: int) -> str:
    """Removes surrounding white space and NULs.

    Raises:
      Skip: the text is not Unicode (lone surrogates), or too long.
    """
    text = text.replace("\0", "").strip()
    if len(text) > max_characters:
        raise Skip("text_too_long", f"{len(text)} characters; at most {max_characters} are allowed")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        found = (
            f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}, half of a surrogate pair,"
        )
        raise Skip("unreadable_text", f"not Unicode text: {found} at character {error.start}") from error
    return text


def check_folder(setting: str, shards: Sequence[str], images: str) -> None:
    """Raises unless the folder of images or videos exists: without it, every document would be a reject."""
    for shard in shards:
        folder = Path(shard).parent / images
        if not folder.is_dir():
            raise UserError(
                f"{setting}={images!r}: no folder {folder}; expected a folder of the files that "
                f"{shard} names, relative to it"
            )


def relative_name(name: object, what: str) -> PurePosixPath:
    """A file name from the data, which is not trusted to stay in its folder.

    Raises:
      Skip: `missing_<what>` if it is not a name, `unsafe_path` if it leads out of the folder.
    """
    if not isinstance(name, str) or not name.strip():
        raise Skip(f"missing_{what}", f"not a file name: {ascii(name)[:80]}")
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts or "\0" in name:
        raise Skip("unsafe_path", f"{ascii(name)[:200]} leads out of the folder of {what}s")
    return inside


def read_image(folder: Path, name: object) -> bytes:
    """The bytes of the file `name` under `folder`; `name` is not trusted.

    Raises:
      Skip: the file is missing, empty, too large or outside the folder.
    """
    inside = relative_name(name, "image")
    try:
        path = folder / inside
        if not path.is_file():
            raise Skip("missing_image", f"no file {ascii(name)[:200]} in the folder of images")
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise Skip("image_too_large", f"{name} has {path.stat().st_size} bytes; at most {MAX_IMAGE_BYTES}")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise Skip("missing_image", f"{ascii(name)[:200]} cannot be read ({type(error).__name__})") from error
    if not data:
        raise Skip("missing_image", f"{name} is an empty file")
    return data


# ---------------------------------------------------------------- JSON


def parse_json(text: str | bytes) -> Any:
    """Parses one JSON value.

    Raises:
      Skip: `cut_shard` if the text only ends too soon, otherwise `unreadable_json`.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig", errors="surrogateescape")  # text that is not UTF-8 fails where it is used
        return json.loads(text)
    except RecursionError as error:
        raise Skip("unreadable_json", "nested too deeply") from error
    except ValueError as error:
        raise Skip("cut_shard" if _breaks_off(error, len(text)) else "unreadable_json", str(error)) from error


def parse_line(line: Line) -> Any:
    """The JSON value of a line.

    Raises:
      Skip: `cut_shard` if the file ends within the line, otherwise `unreadable_json`.
    """
    if line.too_long:
        raise Skip("unreadable_json", f"a line of more than {MAX_LINE_BYTES} bytes")
    try:
        return parse_json(line.data)
    except Skip as skip:
        cut = skip.reason == "cut_shard" and not line.ended
        raise Skip("cut_shard" if cut else "unreadable_json", skip.detail) from skip


def _breaks_off(error: ValueError, length: int) -> bool:
    """Whether the parser reached the end of the text, rather than an error in it."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.pos >= length - len("-Infinity") or error.msg.startswith("Unterminated string")


def json_array(stream: TextIO) -> Iterator[Any]:
    """The values of a file that is one JSON array; memory is bounded by the largest value.

    Raises:
      Skip: as `parse_json`, after all values before the error were yielded.
    """
    decoder = json.JSONDecoder()
    text, position, ended = "", 0, False

    def fill() -> None:
        nonlocal text, position, ended
        chunk = stream.read(max(CHUNK, len(text) - position))  # doubled, so that a large value is parsed few times
        text, position, ended = text[position:] + chunk, 0, not chunk

    def peek() -> str:
        nonlocal position
        while True:
            space = SPACE.match(text, position)
            position = space.end() if space else position
            if position < len(text):
                return text[position]
            if ended:
                raise Skip("cut_shard", "the array is not closed")
            fill()

    fill()
    text = text.removeprefix("\ufeff")
    if peek() != "[":
        raise Skip("unreadable_json", f"expected an array of records, starts with {text[position]!a}")
    position += 1
    if peek() == "]":
        return
    while True:
        peek()
        try:
            value, end = decoder.raw_decode(text, position)
            whole = end + len("e+0") <= len(text) or ended  # a number at the end may continue
        except RecursionError as error:
            raise Skip("unreadable_json", "nested too deeply") from error
        except ValueError as error:
            whole = False
            if ended or len(text) - position > MAX_RECORD_CHARACTERS:
                reason = "cut_shard" if ended and _breaks_off(error, len(text)) else "unreadable_json"
                raise Skip(reason, str(error)) from error
        if not whole:
            fill()
            continue
        yield value
        position = end
        mark = peek()
        position += 1
        if mark == "]":
            return
        if mark != ",":
            number = ended and mark in ".eE" and len(text) - position < len("+0")  # a number that was cut
            raise Skip("cut_shard" if number else "unreadable_json", f"expected , or ] between records, found {mark!a}")
