"""The readers of `emu-jax prepare`: one module each, named as on the command line, whose `READER` is the class.

To add one, put a module here, or register a class of another package under the entry-point group `emu_jax.sources`:

    [project.entry-points."emu_jax.sources"]
    mine = "my_package.my_module:MyReader"
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Sequence
from typing import Any

from emu_jax.data.raw.reader import Reader
from emu_jax.errors import UserError, nearest

GROUP = "emu_jax.sources"
MEMBERS = ("about", "kind", "shards", "read")
READERS = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))  # names only: nothing is imported


def make_reader(name: str, settings: Sequence[str] = ()) -> Reader:
    """Makes a reader from its name and settings.

    >>> make_reader("storyboards", ["subtitles=said"])
    Storyboards(subtitles='said', labels='', language='en')
    >>> make_reader("pair")
    Traceback (most recent call last):
    emu_jax.errors.UserError: source 'pair' is unknown; did you mean pairs?

    Args:
      settings: `field=value` each; several values of a field are separated by commas.

    Raises:
      UserError: the reader, field or value is unknown.
    """
    reader = find_reader(name)
    fields = {field.name: field for field in dataclasses.fields(reader)}
    values = {}
    for text in settings:
        field, separator, value = text.partition("=")
        if not separator or field not in fields:
            raise UserError(
                f"setting {text!r} of source {name} ({reader.about}): expected field=value, with one of the fields "
                f"{', '.join(fields)}"
            )
        values[field] = _parse(value, fields[field].default, f"setting {text!r} of source {name}")
    return reader(**values)


def find_reader(name: str) -> type[Reader]:
    """The class of the reader `name`: one of this package, otherwise one that another package registers.

    Raises:
      UserError: there is none, or it cannot be imported.
    """
    if name in READERS:
        try:
            return importlib.import_module(f"{__name__}.{name}").READER
        except ImportError as error:
            raise UserError(f"source {name}: {error}; run `pip install 'emu-jax[prepare]'`") from error
    registered = importlib.metadata.entry_points(group=GROUP)
    if name not in registered.names:
        raise UserError(f"source {name!r} is unknown; did you mean {nearest(name, [*READERS, *registered.names])}?")
    entry = registered[name]
    try:
        reader: Any = entry.load()
    except (ImportError, AttributeError) as error:
        raise UserError(f"source {name}: {entry.value} cannot be imported ({error}); mend its package") from error
    if not all(hasattr(reader, name) for name in ("__dataclass_fields__", *MEMBERS)):
        raise UserError(
            f"source {name}: {entry.value} is not a reader; expected a dataclass with {', '.join(MEMBERS)} "
            "(emu_jax/data/raw/reader.py)"
        )
    return reader


def _parse(value: str, default: Any, where: str) -> Any:
    """A value of the default's type."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(default, tuple):
            return tuple(value.split(",")) if value else ()
        return type(default)(value)
    except (KeyError, ValueError) as error:
        raise UserError(f"{where}: expected a {type(default).__name__}, such as {default!r}") from error
