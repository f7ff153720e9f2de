"""Samples with one thing changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emu_jax.errors import UserError
from emu_jax.evaluate.benchmarks.registry import find_benchmark
from emu_jax.evaluate.question import Question


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Rewrites a JSON file; `change` alters its value in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def read(name: str, root: Path, split: str = "") -> dict[str, Question]:
    questions = find_benchmark(name).read(root, split)
    by_id = {question.id: question for question in questions}
    assert len(by_id) == len(questions)
    return by_id


def refused(name: str, root: Path, split: str = "") -> str:
    """The error of reading, which is one line."""
    with pytest.raises(UserError) as caught:
        find_benchmark(name).read(root, split)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{root}/", "").replace(str(root), "ROOT")
