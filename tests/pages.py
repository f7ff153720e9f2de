"""The pages to read, taken apart: their fenced blocks, the commands in them, their links."""

from __future__ import annotations

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
    ]
)
SCRIPTS = ("launch/", "pip ", "python ", "git ", "cp ", "ruff ", "mypy ", "emu-jax ")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: the words behind its opening fence, its lines, and the headings that it stands under."""

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
                language, _, about = fence[1].partition(" ")
                found.append(Block(page, fence[0], language, about, "\n".join(inside), tuple(headings)))
                fence = None
        elif fence is not None:
            inside.append(line)
        elif heading := re.match(r"(#+) (.*)", line):
            headings = [*headings[: len(heading[1]) - 1], heading[2]]
    assert fence is None, f"{page}:{fence}: a fence is not closed"
    return found


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and words of every command in blocks without a language: a line that begins as a command does.

    A line that ends in a backslash goes on in the next; comments are left out; an ellipsis stands for more words.
    """
    for block in blocks(page):
        if block.language not in ("", "sh", "bash"):
            continue
        lines = re.sub(r"\\\n\s*", " ", block.text).splitlines()
        for number, line in enumerate(lines, block.line + 1):
            line = re.sub(r"^[A-Z_]+=\S+ ", "", line)  # settings in front
            if line.startswith(SCRIPTS):
                yield number, [word for word in shlex.split(line, comments=True) if word != "…"]


def links(page: Path) -> list[str]:
    """Targets of the page's links and pictures, outside of fenced blocks."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchor(heading: str) -> str:
    """What a heading's link is called."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
