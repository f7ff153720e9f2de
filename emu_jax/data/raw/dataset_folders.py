"""Folders that Hugging Face's `datasets` saves or caches, and those of its hub: which of their files are the data.

saved/    data-00000-of-00002.arrow … state.json dataset_info.json       Dataset.save_to_disk
dict/     train/ test/ dataset_dict.json                                 DatasetDict.save_to_disk
data/     train-00000-of-00002.parquet test-00000-of-00001.parquet                  the hub's
cached/   imdb-train-00000-of-00002.arrow … cache-4f….arrow dataset_info.json       load_dataset, and map
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable
from pathlib import PurePosixPath
from typing import Any

from emu_jax.errors import UserError
from emu_jax.storage import Path, read_json_object

STATE, INFO, DICT = "state.json", "dataset_info.json", "dataset_dict.json"
RESULTS = ("cache-*.arrow", "tmp*")  # of `map` and `filter`, in the folder of what they were made from
PART = re.compile(r"-\d+-of-\d+$")
HUB = re.compile(r"(?:.*[-_.])?(train|validation|valid|val|dev|test)-\d+-of-\d+(?:-[0-9a-f]+)?\.parquet")


def data_names(root: Path, names: Iterable[str]) -> list[str]:
    """Those of the files `names`, relative to `root`, that are data; all of them where no Arrow file is among them.

    Raises:
      UserError: a folder misses a file, selects rows by indices, or holds several splits.
    """
    folders: dict[str, set[str]] = {}
    for name in names:
        folders.setdefault(str(PurePosixPath(name).parent), set()).add(PurePosixPath(name).name)
    kept = {folder: _data(root / folder, files) for folder, files in sorted(folders.items())}
    _check_dicts(root, [folder for folder, files in kept.items() if any(map(_is_arrow, files))])
    return sorted(str(PurePosixPath(folder) / file) for folder, files in kept.items() for file in files)


def _is_arrow(file: str) -> bool:
    return file.endswith(".arrow")


def _data(folder: Path, files: Collection[str]) -> list[str]:
    """The data among the files of a folder."""
    if not any(map(_is_arrow, files)):
        _check_hub(folder, files)
        return [file for file in files if file != DICT]
    files = [file for file in files if file not in (STATE, INFO, DICT)]
    state = _read(folder / STATE)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(
            f"{folder / STATE}: the folder is a selection of rows by indices, as datasets 1 saved it; load it and save "
            "it again with a newer one"
        )
    stated = state.get("_data_files")
    named = (
        {str(file.get("filename")) for file in stated if isinstance(file, dict)} if isinstance(stated, list) else set()
    )
    if lost := sorted(named - set(files)):
        raise UserError(f"{folder / STATE}: it names {lost[0]}, which is not there; copy the folder again")
    if named:
        return [file for file in files if not _is_arrow(file) or file in named]
    files = [file for file in files if not any(fnmatch.fnmatchcase(file, pattern) for pattern in RESULTS)]
    _check_cached(folder, files)
    return files


def _check_hub(folder: Path, files: Iterable[str]) -> None:
    """Raises if Parquet files are of several splits, which would be mixed."""
    splits = {named[1]: named for named in map(HUB.fullmatch, files) if named}
    if len(splits) > 1:
        first = splits[min(splits)]
        raise UserError(
            f"{folder}: holds the splits {', '.join(sorted(splits))}; name the files of one, as --in "
            f"'{folder}/{first[0][: first.end(1)]}-*.parquet'"
        )


def _check_cached(folder: Path, names: Iterable[str]) -> None:
    """Raises if a cached folder's files are of several splits, which would be mixed."""
    splits = _read(folder / INFO).get("splits")
    stems = {PART.sub("", PurePosixPath(name).stem) for name in names if _is_arrow(name)}
    found = {
        split: stem
        for split in (splits if isinstance(splits, dict) else ())
        for stem in stems
        if stem.endswith(f"-{split}")
    }
    if len(found) > 1:
        first = f"{folder}/{min(found.values())}*.arrow"
        raise UserError(
            f"{folder}: holds the splits {', '.join(sorted(found))}; name the files of one, as --in '{first}'"
        )


def _check_dicts(root: Path, folders: Iterable[str]) -> None:
    """Raises if several of the folders are splits of a `DatasetDict`."""
    splits: dict[PurePosixPath, set[str]] = {}
    for folder in map(PurePosixPath, folders):
        if folder.name:
            splits.setdefault(folder.parent, set()).add(folder.name)
    for parent, found in sorted(splits.items()):
        place = root / str(parent)
        if len(found) > 1 and (place / DICT).is_file():
            listed = ", ".join(sorted(found))
            raise UserError(f"{place}: holds the splits {listed}; name one, as --in {place / min(found)}")


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no file."""
    return read_json_object(file, "a file of Hugging Face's datasets; copy the folder again") if file.is_file() else {}
