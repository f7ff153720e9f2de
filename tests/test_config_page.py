"""docs/configs.md explains every field of the shipped configs, and no other."""

from __future__ import annotations

import re

import pytest
from ml_collections import ConfigDict

from emu_jax.config import load_config
from tests.pages import ROOT

CONFIGS = (
    "quickstart.py",
    "pretrain.py:14b",
    "instruct.py:14b",
    "vae.py",
    "decoder.py:mini",
    "mixture.py",
    "codebook.py",
    "end_to_end.py",
)
NAMED = {"data.mixture", "optimizer.learning_rate"}  # their entries have names of the user's, or of parts
ALIKE = {"train.fits"}  # their entries have the same fields
TOP = {"objective"}  # explained in the text


def explained() -> dict[str, set[str]]:
    """Fields by group, as the tables of the page have them in their first column."""
    found: dict[str, set[str]] = {"": set(TOP)}
    group = None
    for line in (ROOT / "docs" / "configs.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            named = re.fullmatch(r"#+ `config\.([\w.]+)`", line)
            group = named[1] if named else "" if line == "## The visual decoder's groups" else None
        elif group is not None and (row := re.match(r"\| (`.*?`) \|", line)):
            found.setdefault(group, set()).update(re.findall(r"`(\w+)`", row[1]))
    return found


def shipped() -> dict[str, set[str]]:
    """Fields by group over the shipped configs; a group is not a field of its parent, except those of `NAMED`."""
    found: dict[str, set[str]] = {}

    def add(group: str, fields: ConfigDict) -> None:
        for name, value in fields.items():
            where = f"{group}.{name}".lstrip(".")
            if not isinstance(value, ConfigDict) or where in NAMED:
                found.setdefault(group, set()).add(name)
            elif where in ALIKE:
                for entry in value.values():
                    add(where, entry)
            else:
                add(where, value)

    for config in CONFIGS:
        add("", load_config(f"{ROOT}/configs/{config}"))
    return found


@pytest.mark.parametrize("group", sorted(shipped()), ids=lambda group: group or "config")
def test_every_field_is_explained(group):
    groups = {where.rpartition(".")[2] for where in shipped() if where.rpartition(".")[0] == group}
    assert explained()[group] - groups == shipped()[group]


def test_no_other_group_is_explained():
    assert set(explained()) == set(shipped())
