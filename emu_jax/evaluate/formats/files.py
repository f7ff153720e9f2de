"""A benchmark's folder: its annotations as checked entries, its images and videos as paths that exist.

    Files(root, …).document("val.json") ─ Entry ─ .entries("images") ─ Entry ─ .text("caption"), .whole("id")

Every error names the file, the position in it and what was expected there. File names in annotations may not lead out
of the folder. Each folder is listed once: a hundred thousand images need no system call each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, TypeVar

from emu_jax.errors import UserError
from emu_jax.storage import Path, failed_download

Key = TypeVar("Key", bound=Hashable)


class Entry:
    """A JSON object, or a row of a table, and its position in the file.

    Attributes:
      fields: its values by name.
      path: the file.
      place: position in the file, such as "annotations[12]"; "" for the whole file.
    """

    __slots__ = ("fields", "path", "place")

    def __init__(self, fields: Any, path: Path, place: str = ""):
        if not isinstance(fields, dict):
            raise UserError(f"{path}: {place or 'the file'} is {_short(fields)}; expected a JSON object")
        self.fields, self.path, self.place = fields, path, place

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def text(self, name: str) -> str:
        return self._check(name, self._get(name))

    def whole(self, name: str) -> int:
        value = self._get(name)
        if type(value) is not int:  # True is an int as well
            raise self._wrong(name, value, "a whole number")
        return value

    def flag(self, name: str) -> bool:
        value = self._get(name)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def entry(self, name: str) -> Entry:
        return Entry(self._get(name), self.path, self._place(name))

    def entries(self, name: str) -> Iterator[Entry]:
        place = self._place(name)
        return (Entry(item, self.path, f"{place}[{n}]") for n, item in enumerate(self._list(name)))

    def wrapped(self, name: str) -> Iterator[Entry]:
        """The objects of a list of lists that hold one object each."""
        for n, item in enumerate(self._list(name)):
            if not isinstance(item, list) or len(item) != 1:
                raise self._wrong(f"{name}[{n}]", item, "a list of one JSON object")
            yield Entry(item[0], self.path, f"{self._place(name)}[{n}][0]")

    def texts(self, name: str) -> tuple[str, ...]:
        return tuple(self._check(f"{name}[{n}]", item) for n, item in enumerate(self._list(name)))

    def wholes(self, name: str) -> list[int]:
        for n, item in enumerate(items := self._list(name)):
            if type(item) is not int:
                raise self._wrong(f"{name}[{n}]", item, "a whole number")
        return items

    def number(self, name: str) -> float:
        if not _is_finite(value := self._get(name)):
            raise self._wrong(name, value, "a number")
        return float(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        for n, item in enumerate(items := self._list(name)):
            if not _is_finite(item):
                raise self._wrong(f"{name}[{n}]", item, "a number")
        return tuple(map(float, items))

    def shares(self, name: str) -> tuple[float, ...]:
        for n, item in enumerate(items := self._list(name)):
            if type(item) not in (int, float) or not 0 <= item <= 1:
                raise self._wrong(f"{name}[{n}]", item, "a number from 0 to 1")
        return tuple(map(float, items))

    def pluck(self, name: str, field: str) -> tuple[str, ...]:
        """The texts `field` of a list of objects; equal texts are one object, because millions of answers say "yes"."""
        try:
            texts = tuple([sys.intern(item[field]) for item in self._list(name)])
            "".join(texts).encode()
            return texts
        except (TypeError, KeyError, UnicodeEncodeError):  # the slow path names the position
            return tuple(item.text(field) for item in self.entries(name))

    def wrong(self, name: str, expected: str) -> UserError:
        """The error that the value of a field is not what was expected."""
        return self._wrong(name, self.fields.get(name), expected)

    def _get(self, name: str) -> Any:
        try:
            return self.fields[name]
        except KeyError:
            raise UserError(f"{self.path}: {self.place or 'the file'} has no {_plain(name)}") from None

    def _list(self, name: str) -> list:
        value = self._get(name)
        if not isinstance(value, list):
            raise self._wrong(name, value, "a list")
        return value

    def _check(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self._wrong(name, value, "a text")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise self._wrong(name, value, "Unicode text") from None
        return value

    def _place(self, name: str) -> str:
        return f"{self.place}.{_plain(name)}" if self.place else _plain(name)

    def _wrong(self, name: str, value: Any, expected: str) -> UserError:
        return UserError(f"{self.path}: {self._place(name)} is {_short(value)}; expected {expected}")


def unique(entries: Iterable[Entry], key: Callable[[Entry], Key], name: str) -> dict[Key, Entry]:
    """Indexes entries by a key that must be unique; `name` is what the key is called in errors."""
    found: dict[Key, Entry] = {}
    for entry in entries:
        identity = key(entry)
        if (earlier := found.setdefault(identity, entry)) is not entry:
            raise UserError(
                f"{entry.path}: {entry.place} has the {name} {identity!r} again, after {earlier.place}; "
                "expected each once"
            )
    return found


def check_same(asked: Mapping[Key, Entry], answered: Mapping[Key, Entry], what: str, of: tuple[Path, Path]) -> None:
    """Raises unless questions and answers have the same keys; `of` are their two files."""
    if missing := [key for key in asked if key not in answered]:
        raise UserError(
            f"{of[1]}: has no {what} {missing[0]!r}{more(missing)}, which {of[0]} has; "
            "expected two complete files of one release and split"
        )
    check_asked(asked, answered, what, of)


def check_asked(asked: Container[Key], answered: Iterable[Key], what: str, of: tuple[Path, Path]) -> None:
    """Raises unless every answer has a question."""
    if strange := [key for key in answered if key not in asked]:
        raise UserError(
            f"{of[1]}: has {what} {strange[0]!r}{more(strange)}, which {of[0]} lacks; "
            "expected two complete files of one release and split"
        )


def more(items: Sequence) -> str:
    """The number of items besides the one that a message names."""
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""


class Files:
    """The files under a benchmark's folder.

    Attributes:
      root: the folder.
      expected: what the folder should hold, and where that is described; the end of errors about missing files.
    """

    def __init__(self, root: Path, expected: str):
        self.root, self.expected = root, expected
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; {expected}")
        self._listings: dict[str, frozenset[str]] = {}
        self._paths: dict[str, Path] = {}
        self._missing: dict[str, None] = {}

    # ------------------------------------------------------------ annotations

    def find(self, *names: str) -> Path:
        """The first existing file among names relative to the folder.

        Raises:
          UserError: none exists.
        """
        for name in names:
            if (path := self.root / name).is_file():
                return path
        raise UserError(f"{self.root}: no {names[0]}; {self.expected}")

    def document(self, *names: str, keyed: bool = False) -> Entry:
        """The JSON object of the first existing file; `keyed`: its names are ids, none of which may be repeated."""
        path = self.find(*names)
        return Entry(read_json(path, _once if keyed else None), path)

    def records(self, *names: str) -> list[Entry]:
        """The objects of the JSON array of the first existing file."""
        path = self.find(*names)
        items = read_json(path)
        if not isinstance(items, list):
            raise UserError(f"{path}: the file is {_short(items)}; expected a JSON array")
        return [Entry(item, path, f"[{n}]") for n, item in enumerate(items)]

    def lines(self, *names: str) -> list[Entry]:
        """The objects of the first existing file of JSON lines, at least one; empty lines are skipped."""
        path = self.find(*names)
        if not (entries := [Entry(item, path, f"line {number}") for number, item in _read_json_lines(path)]):
            raise _unpublished(path, "holds no line")
        return entries

    # ------------------------------------------------------------ images and videos

    def shown(self, *names: str) -> Path:
        """The first existing image or video; where none exists, `check_shown` will raise."""
        if (path := self._paths.get(names[0])) is not None:
            return path
        for name in names:
            self._check_inside(name)
        name = next((name for name in names if self._exists(name)), None)
        if name is None:
            self._missing[names[0]] = None
        path = self._paths[names[0]] = self.root / (name or names[0])
        return path

    def check_shown(self) -> None:
        """Raises unless `shown` found every image and video."""
        if self._missing:
            names = list(self._missing)
            raise UserError(f"{self.root}: no {_plain(names[0])}{more(names)}; {self.expected}")

    def _exists(self, name: str) -> bool:
        folder, _, file = name.rpartition("/")
        if folder not in self._listings:
            try:
                self._listings[folder] = frozenset(path.name for path in (self.root / folder).iterdir())
            except OSError:
                self._listings[folder] = frozenset()
        return file in self._listings[folder]

    def _check_inside(self, name: str) -> None:
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or "\0" in name or not inside.name:
            raise UserError(
                f"{self.root}: annotations name the file {ascii(name)[:200]}, which leads out of the folder"
            )


def read_json(path: Path, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON file; `pairs_hook` as json.load takes it.

    Raises:
      UserError: the file is no JSON; names the line and column.
    """
    return _parse(_read_text(path), path, pairs_hook)


def _read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Each line's number, from 1, and its value."""
    for number, line in enumerate(_read_text(path).split("\n"), 1):  # texts may hold other ends of lines
        if line.strip():
            yield number, _parse(line, path, first=number)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        why = f"not UTF-8 at byte {error.start}"
    except OSError as error:
        why = f"cannot be read ({error.strerror or error})"
    raise _unpublished(path, why)


def _parse(
    text: str, path: Path, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None, first: int = 1
) -> Any:
    """The JSON value of a text whose first line is the file's line `first`."""
    try:
        return json.loads(text, object_pairs_hook=pairs_hook)
    except json.JSONDecodeError as error:
        head = text[:1024].encode()
        if first == 1 and (why := failed_download(head, len(head))):  # which says what to do
            raise UserError(f"{path}: {why}") from error
        why = f"not JSON at line {error.lineno + first - 1}, column {error.colno} ({error.msg})"
    except ValueError as error:  # a number of thousands of digits
        why = f"not JSON ({error})"
    except RecursionError:
        why = "not JSON (nested too deeply)"
    except _Twice as error:
        why = f"an object has the name {ascii(error.name)[:80]} twice"
    raise _unpublished(path, why)


def _unpublished(path: Path, why: str) -> UserError:
    return UserError(f"{path}: {why}; expected the file as it is published, so fetch it again")


class _Twice(Exception):
    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):  # the last of two would have replaced the first
        names = [name for name, _ in pairs]
        raise _Twice(next(name for number, name in enumerate(names) if name in names[:number]))
    return fields


def _is_finite(value: Any) -> bool:
    """Whether a JSON value is a number that a float holds; True, NaN and 10**400 are none."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _plain(text: str) -> str:
    """A name from a file, escaped where it would break an error's one line."""
    return text if text.isprintable() else ascii(text)[1:-1]


def _short(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a JSON object" if isinstance(value, dict) else f"a list of {len(value)}"
    text = ascii(value)
    return text if len(text) <= 60 else text[:60] + "…"
