"""The pages to read, taken apart: their fenced blocks, the commands in them, their links."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT)
    for path in [
        *ROOT.glob("*.md"),
        *(path for part in ("configs", "launch", "tests", "notebooks") for path in (ROOT / part).glob("*.md")),
        *(ROOT / "docs").rglob("*.md"),
    ]
)
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.py"))  # their docstrings have commands
COMMAND = re.compile(r"(launch/\S+\.sh|emu-jax|lmms-eval|torchrun|python|pip|ruff|git|cp)( |$)")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language and title, its lines, and the headings above it."""

    page: Path
    line: int
    language: str
    about: str
    text: str
    headings: tuple[str, ...]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found: list[Block] = []
    headings: list[str] = []
    fence: tuple[int, str] | None = None
    inside: list[str] = []
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if fence is None:
                fence, inside = (number, line[3:].strip()), []
            else:
                language, _, title = fence[1].partition(" ")
                about = title.removeprefix('title="').removesuffix('"')
                found.append(Block(page, fence[0], language, about, "\n".join(inside), tuple(headings)))
                fence = None
        elif fence is not None:
            inside.append(line)
        elif heading := re.match(r"(#+) (.*)", line):
            headings = [*headings[: len(heading[1]) - 1], heading[2]]
    assert fence is None, f"{page}:{fence}: a fence is not closed"
    return found


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and words of every command in a page's blocks without a language, or in a config's docstring.

    A command is a line that begins as one; where it ends in a backslash, it goes on in the next. Comments are left
    out; "…" stands for words that are given elsewhere.
    """
    if page.suffix == ".py":
        tree = ast.parse((ROOT / page).read_text(encoding="utf-8"))
        nodes = [tree, *(node for node in tree.body if isinstance(node, ast.FunctionDef))]
        texts = [(1, ast.get_docstring(node) or "") for node in nodes]
    else:
        texts = [(block.line + 1, block.text) for block in blocks(page) if block.language in ("", "sh", "bash")]
    for first, text in texts:
        for number, line in enumerate(re.sub(r"\\\n\s*", " ", text).splitlines(), first):
            line = re.sub(r"^([A-Z_]+=\S+ )+", "", line)  # settings in front
            if COMMAND.match(line):
                yield from ((number, words) for words in _alternatives(shlex.split(line, comments=True)))


def _alternatives(words: list[str]) -> Iterator[list[str]]:
    """`script create | run` is two commands."""
    if "|" not in words:
        yield words
        return
    script, *rest = words
    yield from ([script, word] for word in rest if word != "|")


def links(page: Path) -> list[str]:
    """Targets of the page's links and images, outside of fenced blocks."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchor(heading: str) -> str:
    """What a heading's link is called."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
