"""Our readers of subtitles, pages and tables, and other people's: `python -m tests.benchmarks.benchmark_parsers [RAW]`.

In: the untidy cases of `tests/data/raw`; with RAW, the folder of that name that launch/mixture.sh writes, also its
subtitles and every `--every`th page. Needs `pip install '.[prepare,parsers]'`.

Out: a table, a row for each set and parser:

    right    documents whose words, images and times are all as they should be
    words    share of the words that are read, in whatever order
    foreign  words that are read and should not be, as a share of those that should be
    images   of a page, kept in reading order

What a real page should give is the text of the element that holds its content. Tables of contents, and what a program
adds around scikit-learn's examples, count neither way.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import dataclasses
import difflib
import html
import io
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pysubs2
import resiliparse.extract.html2text
import trafilatura
import webvtt
from lxml import etree

from emu_jax.data.raw import page_text
from emu_jax.data.raw.readers import videos
from emu_jax.data.raw.subtitles import parse
from tests.data.raw import page_cases, subtitle_cases

WORD = re.compile(r"\w+")


@dataclasses.dataclass
class Score:
    """Counts of one parser on one set."""

    documents: int = 0
    right: int = 0
    words: int = 0
    kept: int = 0
    foreign: int = 0
    images: int = 0
    images_kept: int = 0
    seconds: float = 0.0

    def row(self, about: str, parser: str) -> str:
        share = [f"{part / self.words:8.1%}" for part in (self.kept, self.foreign)]
        images = f"{self.images_kept:,} of {self.images:,}" if self.images else ""
        pace = f"{1000 * self.seconds / self.documents:.1f} ms"
        right = f"{self.right:5d} of {self.documents:<5d}"
        return f"{about:22s}{parser:13s}{right}{share[0]} {share[1]}{images:>16s}{pace:>10s}"


class Read(NamedTuple):
    """What was read of a document, or should be."""

    words: collections.Counter[str]
    images: Sequence[str] = ()
    cues: Sequence[tuple[float, float, str]] = ()


def count(score: Score, wanted: Read, found: Read, neutral: collections.Counter[str]) -> None:
    lost, foreign = wanted.words - found.words, found.words - wanted.words - neutral
    images = [image for image in found.images if image in wanted.images]
    score.documents += 1
    score.right += not lost and not foreign and [*wanted.images] == images and [*wanted.cues] == [*found.cues]
    score.words += wanted.words.total()
    score.kept += (wanted.words & found.words).total()
    score.foreign += foreign.total()
    score.images += len(wanted.images)
    matcher = difflib.SequenceMatcher(None, wanted.images, found.images, autojunk=False)
    score.images_kept += sum(block.size for block in matcher.get_matching_blocks())


def words_of(text: str) -> collections.Counter[str]:
    return collections.Counter(WORD.findall(text))


# ---------------------------------------------------------------- subtitles


def our_subtitles(data: bytes, name: str) -> subtitle_cases.Cues:
    return [(cue.start, cue.end, cue.text) for cue in parse(data, name).cues]


def webvtt_py(data: bytes, name: str) -> subtitle_cases.Cues:
    with tempfile.NamedTemporaryFile(suffix=name) as file:
        file.write(data)
        file.flush()
        found = webvtt.read(file.name) if name.endswith(".vtt") else webvtt.from_srt(file.name)
    times = [(cue.start_time.in_milliseconds() / 1000, cue.end_time.in_milliseconds() / 1000) for cue in found]
    return _as_ours((*time, cue.text) for time, cue in zip(times, found, strict=True))


def pysubs2_(data: bytes, name: str) -> subtitle_cases.Cues:
    found = pysubs2.SSAFile.from_string(data.decode("utf-8-sig"), name[-3:])
    return _as_ours((event.start / 1000, event.end / 1000, event.plaintext) for event in found)


def _as_ours(cues: Iterable[tuple[float, float, str]]) -> subtitle_cases.Cues:
    """Sorted, on one line, entities resolved: what any user of the libraries would add."""
    plain = [(start, end, " ".join(html.unescape(text).split())) for start, end, text in cues]
    return sorted((cue for cue in plain if cue[2]), key=lambda cue: cue[0])


SUBTITLES = {"ours": our_subtitles, "webvtt-py": webvtt_py, "pysubs2": pysubs2_}


def compare_subtitles(about: str, cases: Iterable[subtitle_cases.Case]) -> Iterator[str]:
    scores = {name: Score() for name in SUBTITLES}
    for case in cases:
        wanted = [(float(start), float(end), text) for start, end, text in case.cues]
        for name, read in SUBTITLES.items():
            began = time.perf_counter()
            try:
                found = read(case.data, case.name)
            except Exception:  # whatever a parser raises, the file is lost
                found = []
            scores[name].seconds += time.perf_counter() - began
            reads = [Read(words_of(" ".join(cue[2] for cue in cues)), cues=cues) for cues in (wanted, found)]
            count(scores[name], *reads, collections.Counter())
    return (score.row(about, name) for name, score in scores.items())


def real_subtitles(raw: Path) -> Iterator[subtitle_cases.Case]:
    """The storyboards' files. They are written by a program: a block is two lines, its times and its text."""
    for path in sorted(raw.glob("bunny/*/*.vtt")):
        cues = []
        for block in path.read_text("utf-8").strip().split("\n\n")[1:]:
            times, text = block.split("\n")
            clocks = [int(minutes) * 60 + float(seconds) for minutes, seconds in re.findall(r"(\d+):([\d.]+)", times)]
            cues.append((round(clocks[0], 3), round(clocks[1], 3), text))
        yield subtitle_cases.Case(path.name, path.name, path.read_bytes(), cues)


# ---------------------------------------------------------------- pages


# launch/mixture.sh's setting for one of the sets.
DROP = ("sphx-glr-download*", "sphx-glr-timing", "sphx-glr-signature", "sphx-glr-thumb*", "sk-top-container")


class Image(str):
    """The address of an image, between texts."""


def our_page(page: str) -> list[str]:
    tree = page_text.parse_page(page.encode())
    return [] if tree is None else page_text.read_page(tree, lambda image: Image(page_text.source_of(image)), DROP)


def trafilatura_(page: str) -> list[str]:
    found = trafilatura.extract(page, output_format="xml", include_images=True, include_comments=False)
    if found is None:
        return []
    parts: list[str] = []
    main = etree.fromstring(found.encode()).find("main")
    for event, element in etree.iterwalk(main, events=("start", "end")):
        if event == "start" and element.tag == "graphic":
            parts.append(Image(element.get("src")))
        parts.append((element.text if event == "start" else element.tail) or "")
    return parts


def resiliparse_(page: str) -> list[str]:
    """It has no images; their texts are made their addresses, so that these are in the place of the images."""
    marked = re.sub(r"<img\b([^>]*)>", _as_text, page)
    extract = resiliparse.extract.html2text.extract_plain_text
    found = extract(marked, main_content=True, preserve_formatting=True, list_bullets=False)
    parts = re.split(r"<image:([^>]*)>", found)
    return [Image(part) if number % 2 else part for number, part in enumerate(parts)]


def _as_text(image: re.Match[str]) -> str:
    source = re.search(r"""\ssrc=["']?([^"'\s>]+)""", image[1])
    return f" &lt;image:{source[1]}&gt; " if source else ""


PAGES: dict[str, Callable[[str], list[str]]] = {
    "ours": our_page,
    "trafilatura": trafilatura_,
    "resiliparse": resiliparse_,
}


class Page(NamedTuple):
    page: str
    parts: list[str]
    neutral: str = ""


def read_of(parts: Sequence[str]) -> Read:
    """Texts of any layout are equal if their words are."""
    text = "".join(" " if isinstance(part, Image) else part for part in parts)
    return Read(words_of(text), [part for part in parts if isinstance(part, Image)])


def compare_pages(about: str, pages: Iterable[Page]) -> Iterator[str]:
    scores = {name: Score() for name in PAGES}
    for page in pages:
        for name, read in PAGES.items():
            began = time.perf_counter()
            found = read(page.page)
            scores[name].seconds += time.perf_counter() - began
            count(scores[name], read_of(page.parts), read_of(found), words_of(page.neutral))
    return (score.row(about, name) for name, score in scores.items())


def case_page(case: page_cases.PageCase) -> Page:
    return Page(case.page, [Image(part[1:-1]) if part.startswith("<") else part for part in case.expected])


SCRIPTED = ("sphx-glr-footer", "sphx-glr-timing", "sphx-glr-download", "sphx-glr-signature", "sphx-glr-thumb", "sk-top")
# Set -> XPaths of the element that holds the content, of what in it is none, and of what counts neither way.
CONTENT = {
    "gimp": ("//body", "//*[@class='navheader' or @class='navfooter']", "//*[@class='toc']"),
    "sklearn": (
        "//*[contains(@class, 'sk-page-content')]",
        "//script | //style | //*[@class='headerlink'] | //*[contains(@class, 'sk-toggleable__control')]",
        " | ".join(f"//*[contains(@class, '{name}')]" for name in SCRIPTED),
    ),
}

# Elements that do not end a word.
INLINE = re.compile("a|abbr|acronym|b|cite|code|dfn|em|i|kbd|q|s|samp|small|span|strong|sub|sup|tt|u|var|wbr")


def real_pages(folder: Path, every: int) -> Iterator[Page]:
    content, furniture, neutral = CONTENT[folder.name]
    for path in sorted(folder.rglob("*.html"))[::every]:
        tree = page_text.parse_page(path.read_bytes())
        found = tree.xpath(content) if tree is not None else []
        if not found:
            continue
        page = page_text.decode_page(path.read_bytes())
        for element in tree.xpath(furniture):
            element.addprevious(etree.Comment(""))  # keeps the text that follows the element
            element.getprevious().tail = element.tail
            element.getparent().remove(element)
        unsure = " ".join("".join(element.itertext()) for element in tree.xpath(neutral))
        for element in tree.xpath(neutral):
            tail = element.tail
            element.clear()
            element.tail = tail
        parts: list[str] = []
        for event, element in etree.iterwalk(found[0], events=("start", "end", "comment")):
            if event != "comment" and not INLINE.fullmatch(element.tag):
                parts.append(" ")
            if event == "start" and element.tag == "img" and element.get("src"):
                parts.append(Image(element.get("src")))
            if event == "start":
                parts.append(element.text or "")
            elif element is not found[0]:
                parts.append(element.tail or "")
        yield Page(page, parts, unsure)


# ---------------------------------------------------------------- tables

TABLES = (
    ("a line break in quotes", 'file,text\na,"one\nmore"\nb,two\n', 2),
    ("an open quote", 'file,text\na,one\nb,"two\nc,three\nd,four\n', 3),
    ("a quote inside quotes", 'file,text\na,"a "red" eye"\nb,two\nc,three\n', 2),
    ("a cut quote", 'file,text\na,one\nb,"tw', 1),
)


def compare_tables() -> Iterator[str]:
    for about, table, good in TABLES:
        found = [row for row in videos.table_rows(io.BytesIO(table.encode())) if isinstance(row, list)][1:]
        strict: list[list[str]] = []
        with contextlib.suppress(csv.Error):
            strict.extend(csv.reader(io.StringIO(table, newline=""), strict=True))
        plain = list(csv.reader(io.StringIO(table, newline="")))[1:]
        mixed = sum("\n" in cell and "more" not in cell for row in plain for cell in row)
        yield (
            f"{about:24s} {good} good rows: ours {len(found)}, csv strict {len(strict[1:])} until its error, "
            f"csv {len(plain) - mixed}, and {mixed} of several rows"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("raw", type=Path, nargs="?", help="the folder `raw` of launch/mixture.sh")
    parser.add_argument("--every", type=int, default=1, help="of the pages")
    options = parser.parse_args()
    print(f"{'set':22s}{'parser':13s}{'right':13s}{'words':>8s} {'foreign':>8s}{'images':>16s}{'a file':>10s}")
    sets: list[Iterator[str]] = [
        compare_subtitles("cases, .vtt", subtitle_cases.VTT),
        compare_subtitles("cases, .srt", subtitle_cases.SRT),
        compare_pages("cases, pages", map(case_page, page_cases.CASES)),
    ]
    for rows in sets:
        print(*rows, sep="\n", flush=True)
    if options.raw:
        print(*compare_subtitles("bunny", real_subtitles(options.raw)), sep="\n", flush=True)
        for name in CONTENT:
            print(*compare_pages(name, real_pages(options.raw / name, options.every)), sep="\n", flush=True)
    print(*compare_tables(), sep="\n")


if __name__ == "__main__":
    main()
