"""Writes every record of docs/data-formats.md to its path and reads it with the reader of its section.

The result is compared with the page's block "becomes". Images are embedded ones; videos show one of them.
`python -m tests.test_data_formats` updates these blocks after a record was changed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PIL

from emu_jax.cli import make_parser
from emu_jax.data.document import Document, Text
from emu_jax.data.images import Recoding
from emu_jax.data.prepare import PrepareConfig, prepare
from emu_jax.data.prepared import Records
from emu_jax.data.raw.reader import RawDocument
from emu_jax.data.raw.readers import READERS, make_reader
from emu_jax.data.sources import PairOrder, open_source
from emu_jax.data.system_messages import IMAGE_SYSTEM, VIDEO_SYSTEM
from emu_jax.evaluate.benchmarks.registry import benchmark_names, find_benchmark
from emu_jax.evaluate.question import Question
from emu_jax.generate.files import read_requests
from tests.evaluate.choice_samples import write_parquet
from tests.evaluate.people import HELD_OUT, encoded, people
from tests.pages import ROOT, Block, blocks, commands
from tests.videos import write_video

PAGE = Path("docs/data-formats.md")
BECOMES, RECORD = "becomes", "record"
SYSTEM = {IMAGE_SYSTEM: "the paper's message for images", VIDEO_SYSTEM: "the paper's message for videos"}


def groups() -> list[list[Block]]:
    """The page's blocks, each group up to what its records become."""
    found: list[list[Block]] = [[]]
    for block in blocks(PAGE):
        found[-1].append(block)
        if block.about in (BECOMES, RECORD):
            found.append([])
    return [group for group in found if group and group[-1].about in (BECOMES, RECORD)]


def name(group: list[Block]) -> str:
    return f"{group[-1].headings[-1]}, line {group[-1].line}"


# ---------------------------------------------------------------- files


def write(group: list[Block], folder: Path) -> None:
    """The group's records and the files that they name; members of archives come in the order of the page."""
    archives: dict[Path, dict[str, bytes]] = {}
    for block in group:
        if block.about == "files":
            for line in block.text.splitlines():
                _put(folder, line, None, archives)
        elif "." in block.about:
            _put(folder, block.about, block.text + "\n", archives)
    for path, members in archives.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for member, data in members.items():
                (folder / "member").write_bytes(data)
                archive.add(folder / "member", member)


def _put(folder: Path, place: str, text: str | None, archives: dict[Path, dict[str, bytes]]) -> None:
    path, _, member = place.partition("!")
    if not member:
        _write_file(folder / path, text)
        return
    _write_file(folder / "member" / member, text)
    archives.setdefault(folder / path, {})[member] = (folder / "member" / member).read_bytes()
    (folder / "member" / member).unlink()
    (folder / "member").rmdir()


def _write_file(path: Path, text: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    person = people(HELD_OUT)[0].pixels
    if path.suffix == ".parquet":
        write_parquet(path, [_row(json.loads(line), person) for line in (text or "").splitlines()])
    elif text is not None:
        path.write_text(text, encoding="utf-8")
    elif path.suffix in (".mp4", ".avi"):
        write_video(path, [np.roll(person, shift, axis=1) for shift in range(16)])
    elif path.name.endswith("_0.webp"):  # a sheet of thumbnails
        PIL.fromarray(person).resize((320, 180)).save(path)
    elif path.suffix == ".webp":
        frames = [PIL.fromarray(np.roll(person, shift, axis=1)) for shift in range(16)]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    else:
        PIL.fromarray(person).save(path, None if path.suffix else "PNG")


def _row(shown: dict, person: np.ndarray) -> dict:
    """A row of a table of Hugging Face with all its columns and the bytes of its images."""
    row = {f"image_{number}": None for number in range(1, 8)} | shown
    return {name: cell | {"bytes": encoded(person)} if isinstance(cell, dict) else cell for name, cell in row.items()}


# ---------------------------------------------------------------- what they become


def become(group: list[Block], folder: Path) -> str:
    """What the group's reader makes of its records, run in the folder that holds them."""
    section = group[-1].headings[-1]
    if group[-1].about == RECORD:
        return stored_record(folder)
    if group[-1].headings[1] == "Benchmarks":
        questions = find_benchmark(section).read(folder / "benchmarks" / section)
        return "\n".join(line for question in questions for line in told_question(question))
    if section == "JSONL":
        source = open_source("mine.jsonl", "train", 64, PairOrder("image_first"))
        documents = [
            source.documents(record, np.random.default_rng(0))[0] for record in source.read(range(len(source)))
        ]
        return "\n\n".join("\n".join(told_parts(document)) for document in documents)
    options = options_of(group)
    if options.command == "generate":
        return "\n".join(
            f"{request.out.name}: seed {request.seed}, {', '.join(map(_told_prompt, request.prompt))}"
            for request in read_requests(options.prompts)
        )
    reader = make_reader(options.source, options.set)
    items = [item for shard in reader.shards(options.path) for item in reader.read(shard)]
    assert items and all(isinstance(item, RawDocument) for item in items), items
    return "\n\n".join("\n".join([f"{item.kind} {item.key}", *told_parts(item)]) for item in items)


def options_of(group: list[Block]):
    """The one command of a group."""
    lines = {block.line for block in group}
    (words,) = [words for number, words in commands(PAGE) if number - 1 in lines]
    return make_parser().parse_known_args(words[1:])[0]


def told_parts(document: RawDocument | Document) -> Iterator[str]:
    """A line a text, a line for images beside one another."""
    for kind, parts in itertools.groupby(document.parts, type):
        if kind is Text:
            for part in parts:
                said = SYSTEM.get(part.text, json.dumps(part.text, ensure_ascii=False))
                yield f"  {part.role or 'text'}: {said}"
        else:
            scores = [getattr(part, "score", None) for part in parts]
            known = "".join(f", similarity {score:g}" for score in scores if score is not None)
            yield f"  {'image' if len(scores) == 1 else f'{len(scores)} images'}{known}"


def told_question(question: Question) -> Iterator[str]:
    images = {0: "nothing", 1: "an image"}.get(len(question.images), f"{len(question.images)} images")
    shown = "a video" if question.video else images
    yield f"question {question.id}: {shown}, {json.dumps(question.text)}" + (f", {question.kind}" * bool(question.kind))
    if question.hint:
        yield f"  hint: {json.dumps(question.hint)}"
    for asked, answer in question.history:
        yield f"  after {json.dumps(asked)}: {json.dumps(answer)}"
    if question.candidates:
        yield f"  {len(question.candidates)} candidates"
    counts = Counter(question.answers).items()
    yield "  answers: " + (", ".join(f"{n} x " * (n > 1) + json.dumps(text) for text, n in counts) or "none published")


def _told_prompt(part: str | Path) -> str:
    return part.name if isinstance(part, Path) else json.dumps(part)


def stored_record(folder: Path) -> str:
    """The first section's pair, prepared."""
    group = groups()[0]
    write(group, folder)
    options = options_of(group)
    config = PrepareConfig(name="laion_coco", recoding=Recoding(image_size=224))
    prepare(make_reader(options.source, options.set), options.source, options.path, options.out, config)
    (record,) = (Records(options.out, "train")[index] for index in range(1))
    texts = [part for part in record.parts if isinstance(part, Text)]
    images = [part for part in record.parts if not isinstance(part, Text)]
    fields = {
        "key": record.key,
        "kind": record.kind,
        "layout": "".join("T" if isinstance(part, Text) else "P" for part in record.parts),
        "texts": [text.text for text in texts],
        "roles": [text.role for text in texts],
        "images": f"[{len(images)} JPEG file]",
        "scores": [round(image.score, 4) for image in images],
    }
    return "\n".join(
        f"{field:9s} {value if isinstance(value, str) else json.dumps(value)}" for field, value in fields.items()
    )


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("group", groups(), ids=name)
def test_records_become_what_the_page_says(group, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(group, tmp_path)
    assert become(group, tmp_path) == group[-1].text


def test_every_source_and_benchmark_is_on_the_page():
    """And every record on it belongs to a group that is compared."""
    raw = [group for group in groups() if group[-1].headings[1].startswith("Raw data")]
    assert {options_of(group).source for group in raw} == set(READERS)
    benchmarks = {group[-1].headings[-1] for group in groups() if group[-1].headings[1] == "Benchmarks"}
    assert benchmarks == {name for name in benchmark_names() if find_benchmark(name).tree}
    compared = [block for group in groups() for block in group]
    assert [block.about for block in blocks(PAGE) if block not in compared] == []


def test_settings_that_the_page_names():
    """Each `--set …` in a source's section is one of its reader's."""
    sections = re.split(r"^### ", (ROOT / PAGE).read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = [(section.split("\n")[0], text) for section in sections for text in re.findall(r"`--set ([^`]*)`", section)]
    assert len(named) > 4
    for source, settings in named:
        make_reader(source, settings.split())


def test_settings_of_each_source_are_listed():
    """The table of a source's section has a row for each field of its reader, and no other."""
    raw = (ROOT / PAGE).read_text(encoding="utf-8").partition("\n## Benchmarks")[0]  # one of which is a coco, too
    sections = {section.partition("\n")[0]: section for section in re.split(r"^##+ ", raw, flags=re.MULTILINE)}
    for source in READERS:
        listed = re.findall(r"^\| `(\w+)` \|", sections[source], flags=re.MULTILINE)
        if source == "video_chatgpt":
            assert "[videochat](#videochat)" in sections[source] and not listed
            listed = re.findall(r"^\| `(\w+)` \|", sections["videochat"], flags=re.MULTILINE)
        assert listed == [field.name for field in dataclasses.fields(make_reader(source))], source


def fill() -> None:
    """Writes the results into the page."""
    lines = (ROOT / PAGE).read_text(encoding="utf-8").splitlines()
    for group in reversed(groups()):
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            write(group, Path(folder))
            found = become(group, Path(folder)).splitlines()
            os.chdir(ROOT)
        first = group[-1].line
        lines[first : first + len(group[-1].text.splitlines())] = found
    (ROOT / PAGE).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    fill()
