"""The documentation site: it builds, loads nothing from other hosts, and says what the code says."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from emu_jax.data.document import Document, Image, Text
from emu_jax.data.packing import build_row
from emu_jax.data.sequence import tokenize_document
from emu_jax.data.tokenizer import Tokenizer
from tests.pages import ROOT, blocks

README_LINES = 150


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= README_LINES


# ---------------------------------------------------------------- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_builds(site):
    """Strictly: every page is in the navigation, every link and heading that is linked to is there."""
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        assert (site / ("" if name.name == "index" else name) / "index.html").is_file(), page
    text = (site / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("load", "generate_text", "generate_image", "continue_document", "score_candidates", "chat", "merged"):
        assert f'id="emu_jax.generate.model.Emu.{name}"' in text
    assert not list(site.rglob("*.py"))


class _Loaded(HTMLParser):
    """Addresses that a browser loads with a page; what a reader may click on is not among them."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag != "a" and values.get("rel") != "canonical":
            self.found += [values[name] or "" for name in ("src", "href", "srcset") if name in values]


def test_nothing_is_loaded_from_other_hosts(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for address in _Loaded(text).found:
            assert not re.match(r"(https?:)?//", address), f"{page}: {address}"
        assert 'class="mermaid"' not in text, f"{page}: the theme would load Mermaid from another host"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet
    assert _Loaded('<a href="https://a.b"></a><img src="https://a.b/c.png">').found == ["https://a.b/c.png"]


def test_images_of_the_notebooks_are_shown(site):
    text = (site / "index.html").read_text(encoding="utf-8")
    assert 'src="images/drawings.png"' in text and (site / "images" / "drawings.png").is_file()
    assert "../notebooks/" not in text


# ---------------------------------------------------------------- what pages say of the code


def test_the_row_of_the_architecture_page_is_packed_so():
    tokenizer = Tokenizer.train(["a cat", "hello"], vocab_size=6, model_type="word")
    documents = [
        Document((Text("a cat"), Image(np.zeros((4, 4, 3), np.uint8), "cat.png"))),
        Document((Text("hello"),)),
    ]
    sequences = [
        sequence
        for document in documents
        for sequence in tokenize_document(document, tokenizer, queries=2, row_tokens=12, row_images=1)
    ]
    row, _ = build_row(sequences, row_tokens=12, row_images=1, image_size=4, pad_id=tokenizer.pad_id)
    (text,) = (block.text for block in blocks(Path("docs/architecture.md")) if block.text.startswith("tokens "))
    shown = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    names = {tokenizer.pad_id: "[PAD]", tokenizer.img_id: "[IMG]", tokenizer.img_end_id: "[/IMG]"}
    names |= {tokenizer.image_id: "<image>", tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    found = {name: [f"{value:g}" for value in row[name]] for name in shown if name != "tokens"}
    found["tokens"] = [names.get(int(id)) or tokenizer.decode([int(id)]) for id in row["tokens"]]
    assert found == shown


MESSAGE = re.compile(r"^\| (?:\[[^\]]*\] )?`([^`]+)` \|")


def messages() -> Iterator[str]:
    """Every text of the package, with … where it has a value."""
    for path in (ROOT / "emu_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    lines = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    end = lines.index("## It runs, but")
    listed = [found[1] for line in lines[:end] if (found := MESSAGE.match(line))]
    assert len(listed) >= 60
    known = list(messages())

    def said(message: str) -> bool:
        pattern = re.compile(".*".join(re.escape(piece) for piece in message.split("…")), re.DOTALL)
        return any(pattern.search(text) for text in known)

    assert [message for message in listed if not said(message)] == []
    assert not said("config.sing=…; expected a song")
