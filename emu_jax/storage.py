"""Files and folders that appear whole or not at all, and JSON objects that may be anything but."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emu_jax.errors import UserError


def partial_path(path: Path) -> Path:
    """Where `path` is written until it is complete."""
    return path.with_name(f"{path.name}.partial")


def remove(path: Path) -> None:
    """Removes a file, or a folder with everything in it, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yields another path at which to write a file or folder; renames it to `path` when the block succeeds.

    After an error `path` is as it was, and the partial file or folder is gone. An existing file at `path` is replaced;
    an existing folder must be empty.
    """
    partial = partial_path(path)
    remove(partial)  # left by a process that was killed
    try:
        yield partial
        os.replace(partial, path)
    finally:
        remove(partial)


def replace_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically, over an earlier one."""
    with write_atomically(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json_object(file: Path, expected: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
      expected: what the file should be, for errors.

    Raises:
      UserError: the file is missing, is not JSON, or holds another JSON value.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file; expected {expected}") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: not a JSON file ({error}); expected {expected}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: not a JSON object; expected {expected}")
    return value
