"""Samples with one thing changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emu_jax.errors import UserError
from emu_jax.evaluate.benchmarks.registry import find_benchmark
from emu_jax.evaluate.question import Question


def load(path: Path) -> Any:
    """The value of a JSON file, or the list of the values of a file of JSON lines."""
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if _has_lines(path) else json.loads(text)


def store(path: Path, value: Any) -> None:
    """Writes a value as the file of `path` has it: as JSON lines if it has several lines and the value is a list."""
    lines = isinstance(value, list) and _has_lines(path)
    path.write_text("".join(json.dumps(item) + "\n" for item in value) if lines else json.dumps(value))


def _has_lines(path: Path) -> bool:
    return "\n" in path.read_text().strip()


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Rewrites a file of JSON or of JSON lines; `change` alters its value in place."""
    value = load(path)
    change(value)
    store(path, value)


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
