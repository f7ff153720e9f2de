"""The store of checkpoints: their folders, their metadata, and a digest of every leaf.

    workdir/checkpoints/<step>/ params/ statistics/ optimizer/ meta
                                                               ├ meta: holds, config, tokenizer, iterator, shapes, …
                                                               └ sha256: digest of `meta`
            corrupt/<step>/   set aside by a run that resumed from an older one (`train/checkpoint.py`)

Converted weights (`streamed.py`) are such a folder without an optimizer, and with `lora/` where adapters are kept apart
from their kernels. A packed checkpoint (`packed.py`) is one file. Arrays are read by `load.py`; training saves and
resumes them in `train/checkpoint.py`.

A run with `config.optimizer.ema_decay` keeps the exponential moving average (EMA) of its trainable parameters in
`statistics/ema`. Loading takes the EMA in place of those parameters unless it asks for raw ones (`WEIGHTS`); frozen
parameters have no EMA and come from `params`.

Orbax itself does not notice flipped bits in array data; the digests (`digests.py`) do. Loading weights from a corrupt
checkpoint is an error that names the checkpoint before it: nobody gets older weights than those that were asked for.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from emu_jax.buckets import is_transient
from emu_jax.checkpoints import packed
from emu_jax.checkpoints.digests import digests, named_leaves
from emu_jax.config import from_json
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError
from emu_jax.storage import Path, absolute, is_bucket

FOLDER = "checkpoints"
META = "meta/metadata"
COMMIT_FILE = "commit_success.txt"  # Orbax', in buckets
# Which weights are read: the EMA if the checkpoint keeps one; the last step's parameters; the EMA, or an error.
WEIGHTS = ("auto", "raw", "ema")
EMA_PREFIX = "statistics/ema/"


# ------------------------------------------------------------------------------------------------------- digests


def check_digests(folder: Path, meta: Mapping[str, Any], items: Mapping[str, Any]) -> None:
    """Raises UserError unless every leaf has the digest that it was saved with."""
    for name, value in digests(items).items():
        if value != meta["digests"][name]:
            raise CorruptCheckpoint(folder, f"{name} has digest {value:08x}, expected {meta['digests'][name]:08x}")


class CorruptCheckpoint(UserError):
    """A checkpoint is damaged; names the one before it, if there is one. A run resumes from that by itself."""

    def __init__(self, folder: Path, what: str):
        older = [step for step in steps_in(folder.parent) if folder.name.isdigit() and step < int(folder.name)]
        mend = f"the checkpoint before it is {folder.parent / str(older[-1])}" if older else "make or copy it again"
        super().__init__(f"{folder}: the checkpoint is corrupt: {what}; {mend}")
        self.what = what


_OS_ERROR = re.compile(r"\[os_error_code='(\d+)'\]")


def disk_error(folder: Path, error: BaseException) -> OSError | None:
    """The OSError that TensorStore tells by the text of another error; None if it tells of none.

    >>> import pathlib
    >>> disk_error(pathlib.Path("runs"), ValueError("RESOURCE_EXHAUSTED: … [os_error_code='28']"))
    OSError(28, 'No space left on device')
    """
    found = _OS_ERROR.search(str(error))
    return OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) if found else None


def unreadable(folder: Path, error: BaseException) -> BaseException:
    """The error to show for a failed read; Orbax wraps the cause in descriptions of its own objects."""
    if is_transient(error):
        return error
    while error.__cause__ is not None:
        error = error.__cause__
    error = disk_error(folder, error) or error
    missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError | OSError) and not missing:
        return error  # a full device, or a disk that fails: the files may well be intact
    return CorruptCheckpoint(folder, (str(error).splitlines() or [type(error).__name__])[0][:200])


# ------------------------------------------------------------------------------------------------------ metadata


def pack_tokenizer(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A tokenizer in the form that metadata keeps."""
    if tokenizer is None:
        return {"fingerprint": "none"}
    proto = base64.b64encode(tokenizer.proto).decode()
    return {"proto": proto, "instruct": tokenizer.instruct, "fingerprint": tokenizer.fingerprint}


def unpack_tokenizer(saved: Mapping[str, Any], path: Path) -> Tokenizer | None:
    """The inverse of `pack_tokenizer`."""
    if "proto" not in saved:
        return None
    return Tokenizer(base64.b64decode(saved["proto"]), instruct=saved["instruct"], where=str(path))


def seal_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata in the form that is stored: with a digest of their own."""
    plain = json.loads(json.dumps(dict(meta)))  # as it will be read: keys are strings, tuples are lists
    return {"meta": plain, "sha256": _sha256(plain)}


def _sha256(meta: Any) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def read_meta(folder: Path) -> dict[str, Any]:
    """A checkpoint's metadata.

    Raises:
      UserError: the folder is no checkpoint, is damaged (CorruptCheckpoint), or is of an earlier version.
    """
    what = packed.FILE if packed.is_packed(folder) else META
    try:
        sealed = packed.read_meta(folder) if packed.is_packed(folder) else json.loads((folder / META).read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        if folder.parent.name == FOLDER:
            raise CorruptCheckpoint(folder, f"it has no {META}") from error
        raise UserError(f"{folder}: not a checkpoint of emu_jax; expected {META} in it") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise CorruptCheckpoint(folder, f"{what} is not JSON") from error
    if isinstance(sealed, dict) and "leaves" in sealed:
        raise UserError(
            f"{folder}: a checkpoint of an earlier version, whose metadata have no digest; train or convert again into "
            "a new folder"
        )
    if not isinstance(sealed, dict) or "meta" not in sealed or sealed.get("sha256") != _sha256(sealed["meta"]):
        raise CorruptCheckpoint(folder, f"{what} does not have its SHA-256")
    return sealed["meta"]


def check_leaves(folder: Path, leaves: Mapping[str, list], items: Mapping[str, Any]) -> None:
    """Raises UserError unless the checkpoint's leaves of `items` have the same names, shapes and dtypes."""
    expected = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in named_leaves(items).items()}
    found = {name: leaf for name, leaf in leaves.items() if name.split("/")[0] in items}
    for name in expected | found:
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{folder}: {name} is {_describe(found.get(name))} in the checkpoint, "
                f"{_describe(expected.get(name))} by this config; use the config it was trained with, "
                "or a new work directory"
            )


def _describe(leaf: list | None) -> str:
    return f"{leaf[1]}{leaf[0]}" if leaf else "absent"


# --------------------------------------------------------------------------------------------------- checkpoints


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says about itself; reads no arrays.

    Attributes:
      path: the work directory or checkpoint that was asked for. folder: the checkpoint.
      meta: its metadata.
      ema: parameter -> the leaf that holds its EMA, for those to be read so; empty for raw weights.
    """

    path: Path
    folder: Path
    meta: dict[str, Any]
    ema: dict[str, str]

    @property
    def holds(self) -> str:
        """What its parameters are: "emu", "llama", "vision", "unet", "vae", or what a user's task says."""
        return self.meta["holds"]

    @functools.cached_property
    def config(self) -> ConfigDict:
        """The config of the run; converted weights have only the groups that describe them."""
        return from_json(json.dumps(self.meta["config"]))

    @property
    def leaves(self) -> dict[str, list]:
        """Leaf -> [shape, dtype], without the EMA's leaves."""
        return {name: leaf for name, leaf in self.meta["leaves"].items() if not name.startswith(EMA_PREFIX)}

    def stored_dtype(self, leaf: str) -> str:
        """The dtype that a leaf has on disk; a packed checkpoint's leaves are loaded in another one."""
        return self.meta.get("stored", {}).get(leaf) or self.meta["leaves"][leaf][1]

    @property
    def source(self) -> dict[str, Any]:
        """What is known about the foreign files that the weights were converted from."""
        return self.meta.get("source") or {}

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, if one is stored."""
        return unpack_tokenizer(self.meta["tokenizer"], self.path)


def open_checkpoint(path: Path, weights: str = "auto") -> Checkpoint:
    """The checkpoint at a path, or the newest one of a work directory.

    Args:
      weights: one of `WEIGHTS`.

    Raises:
      UserError: there is no checkpoint, or it keeps no EMA and `weights` is "ema".
    """
    check_weights(weights)
    folder = newest_folder(absolute(path))
    meta = read_meta(folder)
    ema = {f"params/{name.removeprefix(EMA_PREFIX)}": name for name in meta["leaves"] if name.startswith(EMA_PREFIX)}
    if weights == "ema" and not ema:
        raise UserError(
            f"{path}: keeps no EMA (it was made without config.optimizer.ema_decay), and weights=ema asks for it; take "
            "raw ones"
        )
    return Checkpoint(path, folder, meta, {} if weights == "raw" else ema)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a work directory or a checkpoint of ours."""
    return (path / FOLDER).is_dir() or (path / "meta").is_dir() or packed.is_packed(path)


def newest_folder(path: Path) -> Path:
    """A work directory's newest checkpoint, or `path` itself if it is a checkpoint."""
    if (path / "meta").is_dir() or packed.is_packed(path):
        return path
    steps = steps_in(path / FOLDER)
    if not steps:
        raise UserError(f"{path}: no checkpoint; expected {FOLDER}/<step> as `emu-jax train` writes")
    return path / FOLDER / str(steps[-1])


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, ascending."""
    found = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return sorted(int(path.name) for path in found if is_committed(path))


def is_committed(folder: Path) -> bool:
    """Whether a checkpoint's save has ended: Orbax renames its folder then, and in a bucket writes a file into it."""
    return not is_bucket(folder) or (folder / COMMIT_FILE).exists()


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a work directory or checkpoint.

    Raises:
      UserError: it holds none.
    """
    tokenizer = open_checkpoint(path).tokenizer
    if tokenizer is None:
        raise UserError(f"{path}: holds no tokenizer; expected a run on text, or weights converted with a tokenizer")
    return tokenizer


def check_weights(weights: str) -> None:
    """Raises UserError unless `weights` is one of `WEIGHTS`."""
    if weights not in WEIGHTS:
        raise UserError(f"weights={weights!r} is unknown; choose one of {', '.join(WEIGHTS)}")


def weights_of_parts(weights: str) -> str:
    """Which weights to read of the checkpoints beside a model's own, such as its decoder's, which may keep no EMA.

    >>> weights_of_parts("ema"), weights_of_parts("raw")
    ('auto', 'raw')
    """
    return "raw" if weights == "raw" else "auto"
