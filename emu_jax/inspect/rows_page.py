"""A survey as one self-contained HTML page: tables, histograms, and packed rows in a readable form.

In: `survey.Survey`. Out: HTML that contains its style and its images. Texts come from the data and are not trusted:
everything is escaped, and the page's policy forbids scripts and loading.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image as PIL

from emu_jax.data.packing import CONTINUES
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.inspect.survey import PackedRow, Survey, Table

HUES = (212, 28, 145, 275, 345, 182, 52, 318)  # of documents in turn; neighbours differ most
SOURCE_COLOURS = ("#3466a8", "#c2601f", "#3c8a57", "#8557a3", "#a88420", "#2f8b94", "#b04566", "#6b7280")
PNG_SIDE = 96  # pixels of a side up to which images are PNG, otherwise JPEG
MAX_BARS = 24  # of a histogram

STYLE = (Path(__file__).parent / "rows_page.css").read_text(encoding="utf-8")


def draw_page(found: Survey) -> str:
    """The whole page."""
    d = found.data
    names = ", ".join(found.names)
    hues = "".join(
        f".d{n}{{--edge:hsl({hue} 55% 52%);--tint:hsl({hue} 75% 97%);--shade:hsl({hue} 70% 92%)}}"
        for n, hue in enumerate(HUES)
    )
    rows = "".join(_row(row, number, found) for number, row in enumerate(found.rows, 1))
    shown = f"<h2>The first {len(found.rows):,} rows</h2>{_legend(found)}{rows}" if found.rows else ""
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><title>What the model reads: {html.escape(names)}</title>
<style>
{STYLE}{hues}</style></head><body><h1>What the model reads</h1>
<p class="sub">{html.escape(found.title)}</p>
<p>The model learns from documents, in which texts and images alternate. A text is split into tokens: words, or parts
of words; an image takes {found.queries} positions. Several documents are packed into a row of {d.row_tokens:,}
positions with at most {d.row_images:,} images, and {d.batch_rows:,} rows make a batch. A document does not see
its neighbours in the row.</p>
<h2>Sources</h2>
<div class="tables">{_table(found.source_table(), found.names)}{_table(found.document_table(), [])}</div>
<dl>{"".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in found.remarks())}</dl>
<h2>Documents and rows</h2><div class="plots">{"".join(_plots(found))}</div>
{shown}</body></html>
"""


def _table(table: Table, names: Sequence[str]) -> str:
    head, *lines = [[html.escape(cell) for cell in line] for line in table]
    dots = [_dot(number) for number in range(len(names))] + [""] * len(lines)
    body = "".join(
        f"<tr><td>{dot}{line[0]}</td>{''.join(f'<td>{cell}</td>' for cell in line[1:])}</tr>"
        for dot, line in zip(dots, lines, strict=False)
    )
    return f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{body}</table>"


def _dot(source: int) -> str:
    return f'<i class="dot" style="background:{SOURCE_COLOURS[source % len(SOURCE_COLOURS)]}"></i>'


# ---------------------------------------------------------------- histograms


def _plots(found: Survey) -> Iterator[str]:
    """Histograms: tokens and images of every source's documents, on common scales; then those of rows."""
    d = found.documents
    for number, name in enumerate(found.names):
        mine = d.sources == number
        for what, values in (("Tokens", d.tokens), ("Images", d.images)):
            caption = f"{_dot(number)}{what} of a document, <b>{html.escape(name)}</b>"
            yield _histogram(
                values[mine], int(values.max()), caption, SOURCE_COLOURS[number % len(SOURCE_COLOURS)], "documents"
            )
    for what, values, limit in (
        ("Tokens", found.row_tokens, found.data.row_tokens),
        ("Images", found.row_images, found.data.row_images),
    ):
        yield _histogram(values, limit, f"{what} in a row, of {limit:,}", "#55616f", "rows")


def _histogram(values: np.ndarray, most: int, caption: str, colour: str, counted: str) -> str:
    """A histogram of whole numbers 0…most; the tooltip of a bar gives its range and count."""
    step = max(1, -(-(most + 1) // MAX_BARS))
    counts = np.bincount(values // step, minlength=most // step + 1)
    width, height, left, top, base = 540, 132, 44, 8, 112
    pitch = min((width - left - 6) / len(counts), 48)
    peak = max(int(counts.max()), 1)
    marks = []
    for number, count in enumerate(counts.tolist()):
        low, high = number * step, min((number + 1) * step - 1, most)
        tall = count / peak * (base - top)
        span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        marks.append(
            f'<rect x="{left + number * pitch + 0.5:.1f}" y="{base - tall:.1f}" width="{max(pitch - 1.5, 1):.1f}" '
            f'height="{tall:.1f}" rx="1" fill="{colour}"><title>{span}: {count:,} {counted}</title></rect>'
        )
    every = -(-len(counts) // 6)
    for number in range(0, len(counts), every):
        at = left + (number + 0.5) * pitch if step == 1 else left + number * pitch
        marks.append(f'<text x="{at:.1f}" y="{base + 14}" text-anchor="middle">{number * step:,}</text>')
    share = f"{peak / max(len(values), 1):.0%}"
    return (
        f'<figure><figcaption>{caption}</figcaption><svg viewBox="0 0 {width} {height}" role="img">'
        f'<line x1="{left}" y1="{base}" x2="{width - 6}" y2="{base}" stroke="#cbd2da"/>'
        f'<line x1="{left}" y1="{top}" x2="{width - 6}" y2="{top}" stroke="#edf0f4"/>'
        f'<text x="{left - 6}" y="{top + 4}" text-anchor="end">{share}</text>'
        f'<text x="{left - 6}" y="{base}" text-anchor="end">0</text>{"".join(marks)}</svg></figure>'
    )


# ---------------------------------------------------------------- rows


def _legend(found: Survey) -> str:
    q = found.queries
    entries = [
        '<span class="doc d0">a document</span> has one colour; shades separate its tokens',
        '<span class="d0"><span class="t w1">a text</span></span> that the model learns to write; <span class="d0">'
        '<span class="t w2">thin</span></span>: with less weight',
        '<span class="t w0">a text</span> that it only reads',
        f'<span class="pic"></span>an image (×{q} positions) whose embeddings it learns to predict',
        f'<span class="pic v0"></span>an image (×{q} positions) that it only sees',
        '<span class="tag">&lt;s&gt;</span><span class="tag">[IMG]</span> tokens that are not text; '
        '<span class="tag v1">[/IMG]</span> predicted with its image',
    ]
    lines = "".join(f'<span class="line">{entry}</span>' for entry in entries)
    return (
        '<p class="sub">Each row is shown as the model reads it: first a bar of all its positions (dark: images, grey: '
        "padding), then its documents in order. Images are the pixels that the model gets; the number after # is "
        f'the image slot in the row.</p><div class="legend">{lines}</div>'
    )


def _row(row: PackedRow, number: int, found: Survey) -> str:
    live = int((row.segments > 0).sum())
    documents = int(row.segments.max())
    images = int(row.slots.max()) + 1
    length, padding = len(row.tokens), len(row.tokens) - live
    pieces = [_document(row, document, found) for document in range(1, documents + 1)]
    about = (
        f"{_count(documents, 'document')} · {live:,} of {length:,} tokens · {images:,} of "
        f"{_count(found.data.row_images, 'image')}"
    )
    bar = f'<div class="padding" style="width:{padding / length:.1%}">padding ×{padding:,}</div>' if padding else ""
    return (
        f'<section class="row"><h3>Row {number:,} <span>· {about}</span></h3>{_strip(row)}'
        f'<div class="docs">{"".join(pieces)}</div>{bar}</section>'
    )


def _strip(row: PackedRow) -> str:
    """All positions as a bar: light for text, dark for images."""
    marks = []
    for (segment, slot), run in itertools.groupby(zip(row.segments.tolist(), row.slots.tolist(), strict=True)):
        if segment == 0:
            colour = "#e3e6ea"
        else:
            colour = f"hsl({HUES[(segment - 1) % len(HUES)]} {'50% 45%' if slot >= 0 else '62% 76%'})"
        marks.append(f'<i style="flex:{len(list(run))};background:{colour}"></i>')
    return f'<div class="strip">{"".join(marks)}</div>'


def _document(row: PackedRow, number: int, found: Survey) -> str:
    """A document of a row: its description, and its tokens in order."""
    positions = np.flatnonzero(row.segments == number)
    start, stop = int(positions[0]), int(positions[-1]) + 1
    images = int((row.slots[start:stop] >= 0).sum()) // found.queries
    source = int(row.source_ids[start])
    about = f"{_dot(source)}<b>{html.escape(found.names[source])}</b> · {_count(stop - start, 'token')}"
    about += f" · {_count(images, 'image')}"
    text, visual = float(row.text_weights[start:stop].max()), float(row.visual_weights[start:stop].max())
    about += f" · text ×{text:g}" if text not in (0.0, 1.0) else ""
    about += f" · images ×{visual:g}" if visual not in (0.0, 1.0) else ""
    about += "<em>continues a cut document</em>" if row.cuts[start] & CONTINUES else ""
    about += "<em>left out of the loss</em>" if text == visual == 0 else ""
    return (
        f'<article class="doc d{(number - 1) % len(HUES)}"><div class="about">{about}</div>'
        f'<div class="body">{"".join(_tokens(row, start, stop, found.tokenizer))}</div></article>'
    )


def _tokens(row: PackedRow, start: int, stop: int, tokenizer: Tokenizer) -> Iterator[str]:
    special = tokenizer.special

    def kind(position: int) -> tuple[str, int]:
        if row.slots[position] >= 0:
            return "image", int(row.slots[position])
        return ("tag", position) if int(row.tokens[position]) in special else ("text", 0)

    for (what, number), run in itertools.groupby(range(start, stop), kind):
        positions = list(run)
        first = positions[0]
        if what == "tag":
            visual = " v1" if row.visual_weights[first] > 0 else ""
            name = html.escape(special[int(row.tokens[first])])
            yield f'<span class="tag {_weight(row.text_weights[first])}{visual}">{name}</span>'
        elif what == "image":
            state = "" if row.visual_weights[first] > 0 else " v0"
            url = _data_url(row.images[number])
            yield (
                f'<span class="pic{state}"><img src="{url}" alt="image {number + 1} of the row">'
                f"<small>#{number + 1} ×{len(positions)}</small></span>"
            )
        else:
            for ids, text in tokenizer.pieces(row.tokens[first : positions[-1] + 1].tolist()):
                weight = _weight(row.text_weights[first])
                first += len(ids)
                yield f'<span class="t {weight}" title="{" ".join(map(str, ids))}">{html.escape(text)}</span>'


def _weight(weight: float) -> str:
    """The CSS class of a token by its loss weight."""
    return "w1" if weight >= 1 else "w2" if weight > 0 else "w0"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _data_url(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3] -> a data URL; lossless for small images."""
    kind, settings = ("png", {}) if len(pixels) <= PNG_SIDE else ("jpeg", {"quality": 88})
    file = io.BytesIO()
    PIL.fromarray(pixels).save(file, kind, **settings)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
