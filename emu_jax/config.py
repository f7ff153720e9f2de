"""Experiment configs: `configs/quickstart.py:variant` and `--config.a.b=c` overrides -> a validated ConfigDict.

A config file defines `get_config(variant: str = …) -> ConfigDict`. Values of overrides are parsed as Python literals
(plain words as strings) and must have the field's type. An override sets an existing field; in the groups of
`OPEN_GROUPS` it may also add an entry, or a field of an entry, and in those of `OPEN_FIELDS` a field. Of several
overrides of a field the last one counts.

An installed wheel contains the project's `configs` (setup.py). They are used where the user has no such file, and a
user's own config can also import them (`from configs import quickstart`).
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from emu_jax.errors import UserError, nearest
from emu_jax.storage import check_local

# Groups whose entries the user names. The entries' fields are checked by the reader of the group, not here.
OPEN_GROUPS = (("data", "mixture"),)
# Groups whose fields depend on one of them, as a visual head's on its name. The reader of the group checks them.
OPEN_FIELDS = (("model", "visual_head"),)
EXACT = 1 << 53  # up to it, a float holds every whole number
LARGEST = (1 << 63) - 1  # of whole numbers
# The folder that holds our `configs`: the package's own in a wheel, the root of a checkout otherwise.
SHIPPED = Path(__file__).with_name("shipped")
if not SHIPPED.is_dir():
    SHIPPED = Path(__file__).parents[1]


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads `path/to/file.py[:variant]` and applies overrides like `--config.train.steps=10`.

    >>> load_config("configs/quickstart.py", ["--config.train.steps=10"]).train.steps
    10

    Raises:
      UserError: the file is missing, in a bucket or no config; the variant or a field is unknown; or a value has the
        wrong type.
    """
    check_local(spec, "a config, which is Python code,")
    path, _, variant = spec.partition(":")
    file = config_file(path)
    # Config files import one another as `configs.models`, from any current directory.
    folders = file.resolve().parents
    root = str(next((folder for folder in folders if folder.name == "configs"), folders[0]).parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    if str(SHIPPED) not in sys.path:
        sys.path.append(str(SHIPPED))
    module_spec = importlib.util.spec_from_file_location(f"emu_jax_config_{file.stem}", file)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config {path}: not a Python file; expected a config such as configs/quickstart.py")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config {path}: the file defines no get_config(variant) function")
        config = _call(module.get_config, path, variant)
    except UserError:
        raise
    except Exception as error:  # a config is the user's program, and may raise anything
        raise UserError(f"--config {path}: {_where_in(file, error)}; mend the file") from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config {path}: get_config returned {type(config).__name__}; expected an ml_collections.ConfigDict"
        )
    for text in overrides:
        override(config, text)
    return config


def _call(get_config: Callable[..., Any], path: str, variant: str) -> Any:
    """The config of a file's function, which may take no variant or ask for one."""
    given = (variant,) if variant else ()
    try:
        inspect.signature(get_config).bind(*given)
    except TypeError as error:
        if variant:
            raise UserError(f"--config {path}:{variant}: the file has no variants; write --config {path}") from error
        raise UserError(f"--config {path}: names no variant; write --config {path}:VARIANT") from error
    return get_config(*given)


def _where_in(file: Path, error: Exception) -> str:
    """An error of a config's own code, in one line with the last line of the file that it came through."""
    if isinstance(error, SyntaxError) and _is_file(error.filename, file):
        return f"line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"line {frame.lineno}: " for frame in frames if _is_file(frame.filename, file)]
    what = " ".join(str(error).split()) or "no message"
    return f"{lines[-1] if lines else ''}{type(error).__name__}: {what}"


def _is_file(name: str | None, file: Path) -> bool:
    return name is not None and Path(name).resolve() == file.resolve()


def config_file(path: str) -> Path:
    """A config's file: the user's own, or else the one of that path that comes with the package.

    Raises:
      UserError: there is neither.
    """
    file = Path(path)
    if not file.is_file() and file.parts[:1] == ("configs",):
        file = SHIPPED / path
    if not file.is_file():
        raise UserError(f"--config {path}: no such file; expected a config such as configs/quickstart.py")
    return file


def choose(variants: Mapping[str, Callable[[], ConfigDict]], variant: str, file: str) -> ConfigDict:
    """The config of one variant: files with several variants end in `return choose(VARIANTS, variant, __file__)`."""
    if variant not in variants:
        raise UserError(f"--config {Path(file).name}:{variant}: no such variant; choose one of {', '.join(variants)}")
    return variants[variant]()


def override(config: ConfigDict, text: str) -> None:
    """Sets one field, in place, from `--config.<field>=<value>`.

    >>> config = ConfigDict({"data": {"source": "fluent_emoji", "shards": 1, "mixture": {}}, "rate": 1.0})
    >>> override(config, "--config.data.shards=16")
    >>> override(config, "--config.rate=1e-4")
    >>> config.data.shards, config.rate
    (16, 0.0001)
    >>> override(config, "--config.data.shard=4")
    Traceback (most recent call last):
    emu_jax.errors.UserError: --config.data.shard: config.data has no field 'shard'; did you mean shards?

    In `OPEN_GROUPS`, entries may be new:

    >>> override(config, "--config.data.mixture.mine.source=data/mine")
    >>> override(config, "--config.data.mixture.mine.weight=16")
    >>> config.data.mixture.to_dict()
    {'mine': {'source': 'data/mine', 'weight': 16}}

    In `OPEN_FIELDS`, fields may be new:

    >>> config = ConfigDict({"model": {"visual_head": {"name": "l2"}}})
    >>> override(config, "--config.model.visual_head.name=flow")
    >>> override(config, "--config.model.visual_head.steps=50")
    >>> config.model.visual_head.to_dict()
    {'name': 'flow', 'steps': 50}
    """
    flag, separator, text = text.partition("=")
    flag = _printable(flag)
    path = flag.removeprefix("--config.").split(".")
    if not flag.startswith("--config.") or not all(path):
        raise UserError(f"{flag}: expected --config.<field>=<value>")
    if not separator:
        raise UserError(f"{flag}: expected --config.<field>=<value>; write {flag}=VALUE")
    open_from = next((len(group) for group in OPEN_GROUPS if tuple(path[: len(group)]) == group), len(path))
    if tuple(path[:-1]) in OPEN_FIELDS:
        open_from = len(path) - 1
    node: Any = config
    for depth, part in enumerate(path):
        where = ".".join(["config", *path[:depth]])
        if isinstance(node, ConfigDict) and part not in node and depth >= open_from:
            if len(path) == open_from + 1 and tuple(path[:-1]) not in OPEN_FIELDS:
                raise UserError(
                    f"{flag}: {where} has no {part!r} to set; create it by setting one of its fields, as in "
                    f"--config.{'.'.join(path[:open_from])}.mine.<field>=<value>"
                )
            value = _check_scalars(f"{flag}={_printable(text)}", _literal(text))
            for name in reversed(path[depth + 1 :]):
                value = ConfigDict({name: value})
            with node.unlocked():
                node[part] = value
            return
        if not isinstance(node, ConfigDict) or part not in node:
            known = list(node) if isinstance(node, ConfigDict) else []
            raise UserError(f"{flag}: {where} has no field {part!r}; did you mean {nearest(part, known)}?")
        if depth < len(path) - 1:
            node = node[part]
    name = path[-1]
    if isinstance(node[name], ConfigDict):
        fields = ", ".join(node[name]) or "none yet"
        raise UserError(
            f"{flag} is a group of fields ({fields}); set one of them, as in {_example(flag, node[name])}=…"
        )
    value = _parse(flag, text, node[name], is_open=len(path) > open_from)
    with node.unlocked(), node.ignore_type():  # `_parse` has checked the type
        node[name] = value


def _example(flag: str, group: ConfigDict) -> str:
    """The name of a field that can be set in a group."""
    name = next(iter(group), "mine")
    return _example(f"{flag}.{name}", group[name]) if isinstance(group.get(name), ConfigDict) else f"{flag}.{name}"


def _literal(text: str) -> Any:
    """The Python literal, true or false that the text spells, otherwise the text itself."""
    try:
        with warnings.catch_warnings():  # about regular expressions, such as "\\d" in a text
            warnings.simplefilter("ignore")
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {"true": True, "false": False}.get(text.lower(), text)


def _printable(text: str) -> str:
    """The text in one line, for errors."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _check_scalars(where: str, value: Any) -> Any:
    """The value, if it is made of what a config can hold: JSON's scalars, lists, tuples and groups."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: not a finite number")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise UserError(f"{where}: larger than 64 bits")
    if isinstance(value, list | tuple):
        for each in value:
            _check_scalars(where, each)
    elif isinstance(value, dict):
        for key, each in value.items():
            if not isinstance(key, str) or not key or "." in key:
                raise UserError(f"{where}: a field is named {key!r}; expected a text without a full stop")
            _check_scalars(where, each)
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise UserError(f"{where}: holds {type(value).__name__}; expected numbers, texts, lists or tuples")
    return value


def _parse(flag: str, text: str, old: Any, is_open: bool = False) -> Any:
    """The value in `text`, with the type of the old value.

    Args:
      is_open: an entry of `OPEN_GROUPS`, whose reader checks the types: a whole number there may become a fraction.
    """
    where, value = f"{flag}={_printable(text)}", _literal(text)
    if isinstance(old, str):
        return value if isinstance(value, str) else text
    value = _as_type_of(old, value)
    if old is not None and type(value) is not type(old) and not (is_open and {type(old), type(value)} == {int, float}):
        got = type(value).__name__ if text else "nothing"
        raise UserError(f"{where}: expected {type(old).__name__} like {old!r}, got {got}{_advice(flag, old)}")
    if isinstance(value, list | tuple) and (kind := _shared_type(old)) is not None:
        value = type(value)(_as_type_of(old[0], each) for each in value)
        if wrong := [each for each in value if type(each) is not kind]:
            raise UserError(f"{where}: expected {kind.__name__} everywhere as in {old!r}, got {wrong[0]!r}")
    return _check_scalars(where, value)


def _as_type_of(old: Any, value: Any) -> Any:
    """The value in the type of the old one, where both mean the same: 1 and 1.0, 1e6 and 1000000, (1, 2) and [1, 2]."""
    if type(old) is float and type(value) is int and abs(value) <= LARGEST:
        return float(value)
    if type(old) is int and type(value) is float and abs(value) <= EXACT and value.is_integer():
        return int(value)
    if isinstance(old, list | tuple) and isinstance(value, list | tuple):
        return type(old)(value)
    return value


def _shared_type(old: Any) -> type | None:
    """The type of a sequence's elements if they are scalars of one type."""
    kinds = {type(each) for each in old} if isinstance(old, list | tuple) else set()
    return kinds.pop() if len(kinds) == 1 and kinds <= {bool, int, float, str} else None


def _advice(flag: str, old: Any) -> str:
    if isinstance(old, bool):
        return "; write true or false"
    if isinstance(old, list | tuple):
        return f"; quote it for the shell, as in {flag}='{str(old).replace(chr(39), chr(34))}'"
    return ""


def to_json(config: ConfigDict) -> str:
    """The config as stable, indented JSON (tuples become lists)."""
    return json.dumps(json.loads(config.to_json()), indent=2, sort_keys=True)


def from_json(text: str) -> ConfigDict:
    """The inverse of `to_json`."""
    return ConfigDict(json.loads(text))
