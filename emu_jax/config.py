"""Experiment configs: `configs/quickstart.py:variant` and `--config.a.b=c` overrides -> a validated ConfigDict.

A config file defines `get_config(variant: str = …) -> ConfigDict`. Values of overrides are parsed as Python literals
(plain words as strings) and must have the field's type. An override sets an existing field; in the groups of
`OPEN_GROUPS` it may also add an entry, or a field of an entry.

An installed wheel contains the project's `configs` (setup.py). They are used where the user has no such file, and a
user's own config can also import them (`from configs import quickstart`).
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from emu_jax.errors import UserError, nearest
from emu_jax.storage import check_local

# Groups whose entries the user names. The entries' fields are checked by the reader of the group, not here.
OPEN_GROUPS = (("data", "mixture"),)
# The folder that holds our `configs`: the package's own in a wheel, the root of a checkout otherwise.
SHIPPED = Path(__file__).with_name("shipped")
if not SHIPPED.is_dir():
    SHIPPED = Path(__file__).parents[1]


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads `path/to/file.py[:variant]` and applies overrides like `--config.train.steps=10`.

    >>> load_config("configs/quickstart.py", ["--config.train.steps=10"]).train.steps
    10

    Raises:
      UserError: the file is missing or in a bucket, the variant or a field is unknown, or a value has the wrong type.
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
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config {path}: the file defines no get_config(variant) function")
    config = module.get_config(variant) if variant else module.get_config()
    for text in overrides:
        override(config, text)
    return config


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
    """
    flag, separator, text = text.partition("=")
    path = flag.removeprefix("--config.").split(".")
    if not flag.startswith("--config.") or not separator or not all(path):
        raise UserError(f"{flag}: expected --config.<field>=<value>")
    open_from = next((len(group) for group in OPEN_GROUPS if tuple(path[: len(group)]) == group), len(path))
    node: Any = config
    for depth, part in enumerate(path):
        where = ".".join(["config", *path[:depth]])
        if isinstance(node, ConfigDict) and part not in node and depth >= open_from:
            if len(path) == open_from + 1:
                raise UserError(
                    f"{flag}: {where} has no {part!r} to set; create it by setting one of its fields, as in "
                    f"--config.{'.'.join(path[:open_from])}.mine.<field>=<value>"
                )
            value = _literal(text)
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
            f"{flag} is a group of fields ({fields}); set one of them, as in {flag}.{next(iter(node[name]), 'mine')}=…"
        )
    with node.unlocked():
        node[name] = _parse(flag, text, node[name])


def _literal(text: str) -> Any:
    """The Python literal, true or false that the text spells, otherwise the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def _parse(flag: str, text: str, old: Any) -> Any:
    """The value in `text`, with the type of the old value."""
    value = _literal(text)
    if isinstance(old, str):
        return text
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
    if old is not None and type(value) is not type(old):
        raise UserError(f"{flag}={text}: expected {type(old).__name__} like {old!r}, got {type(value).__name__}")
    return value


def to_json(config: ConfigDict) -> str:
    """The config as stable, indented JSON (tuples become lists)."""
    return json.dumps(json.loads(config.to_json()), indent=2, sort_keys=True)


def from_json(text: str) -> ConfigDict:
    """The inverse of `to_json`."""
    return ConfigDict(json.loads(text))
