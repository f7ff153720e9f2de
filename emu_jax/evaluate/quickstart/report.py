"""The report of a run: `report.html`, one self-contained page, and `scores.json` with every figure; for a model with a
decoder also `drawings.png`, a grid of drawings.

The page shows scores with intervals and chance, loss and collapse curves, held-out images with true and generated
captions, the images that captions retrieve, the config and the versions.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import importlib.metadata
import io
import json
import pathlib
import platform
import textwrap
from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.quickstart.captions import Answer, Scores
from emu_jax.evaluate.quickstart.chat import Chats
from emu_jax.evaluate.quickstart.drawings import Drawings
from emu_jax.generate.model import GeneratedText
from emu_jax.storage import Path, replace_text, write_atomically
from emu_jax.workdir import CONFIG_FILE, METRICS_FILE, read_metrics

IMAGE_COLUMNS = 8  # of drawings.png
GRID = 24  # held-out images shown with their captions
CURVES = (
    ("text_loss", "text: cross-entropy (nats a token)", True),
    ("regression_loss", "visual: squared error a dimension", False),
    ("variance_fraction", "share of variance between images", False),
    ("effective_rank", "effective rank of a batch's embeddings", False),
)
PACKAGES = ("emu-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "numpy")

STYLE = (pathlib.Path(__file__).parent / "report.css").read_text(encoding="utf-8")


def write_report(
    out: Path, workdir: Path, scores: Scores, drawings: Drawings | None = None, chats: Chats | None = None
) -> Path:
    """Writes `scores.json` and `report.html` into `out`, each completely or not at all; returns the page's path.

    Args:
      workdir: the run's work directory, with metrics.jsonl and config.json.
    """
    figures = scores.figures | (drawings.figures if drawings else {}) | (chats.figures if chats else {})
    out.mkdir(parents=True, exist_ok=True)
    summary = {
        "figures": {name: dataclasses.asdict(figure) for name, figure in figures.items()},
        "gallery": scores.gallery,
        "workdir": workdir.name,
        "versions": _versions(),
    }
    replace_text(out / "scores.json", json.dumps(summary, indent=2) + "\n")
    replace_text(out / "report.html", _page(workdir, scores, figures, drawings, chats))
    if drawings:
        _drawings_image(out / "drawings.png", drawings)
    return out / "report.html"


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def _page(
    workdir: Path, scores: Scores, figures: dict[str, Figure], drawings: Drawings | None, chats: Chats | None
) -> str:
    metrics = read_metrics(workdir / METRICS_FILE)
    config = (workdir / CONFIG_FILE).read_bytes().decode()
    held_out = [answer for answer in scores.answers if answer.split == "heldout_combinations"]
    unseen = [answer for answer in scores.answers if answer.split == "heldout_concepts"]
    versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
    last = metrics[-1]
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>emu_jax · {html.escape(workdir.name)}</title>
<style>
{STYLE}</style><h1>{html.escape(workdir.name)}</h1>
<p class="sub">One checkpoint after {last["step"]:,} steps: it names images and, from a name, generates the
embeddings of an image. Held-out combinations are roles and skin tones that were each seen in training, but never
together.</p>
<h2>Scores</h2>{_score_table(figures)}{_drawing_sections(drawings) if drawings else ""}
<h2>Held-out images and the captions the model gave them</h2>{_caption_cards(held_out[:GRID])}
<h2>Images found by the embeddings of a held-out caption</h2>
<p class="sub">Left: the caption's own image. Right: of all {scores.gallery:,} images, the one closest to the
generated embeddings.</p>{_retrieval_cards(held_out[: GRID // 2])}
{_chat_cards(chats) if chats else ""}
<h2>Concepts never seen</h2>{_caption_cards(unseen[: GRID // 2])}
<h2>Training</h2><img src="{_curves(metrics)}" style="width:100%" alt="training curves">
<h2>Config</h2><pre>{html.escape(config)}</pre><p class="k">{html.escape(versions)}</p></html>
"""


def _score_table(figures: dict[str, Figure]) -> str:
    rows = [
        f"<tr><td>{html.escape(name)}</td><td class=n><b>{f.value:.3f}</b></td>"
        f"<td class=n>{f.interval[0]:.3f} to {f.interval[1]:.3f}</td><td class=n>{_chance(f)}</td>"
        f"<td class=n>{f.count}</td></tr>"
        for name, f in figures.items()
    ]
    head = "<tr><th>figure<th>value<th>95% interval<th>chance<th>images</tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _chance(figure: Figure) -> str:
    return "" if figure.chance is None else f"{figure.chance:.4f}"


def _drawing_sections(drawings: Drawings) -> str:
    """Drawings above the real images, reconstructions, blends and a continued document."""
    pairs, rebuilt = [], []
    for drawn in drawings.examples[:GRID]:
        e = drawn.example
        pairs.append(_card([[drawn.drawn], [e.pixels]], html.escape(e.caption)))
        rebuilt.append(_card([[drawn.reconstructed], [e.pixels]], ""))
    blends = [
        _card([[a.pixels, b.pixels], [image]], f"{html.escape(a.caption)} <b>+</b> {html.escape(b.caption)}")
        for a, b, image in drawings.blends
    ]
    continued = []
    for example, items in drawings.continued:
        said = [html.escape(item.text) for item in items if isinstance(item, GeneratedText)]
        images = [np.asarray(item.image) for item in items if not isinstance(item, GeneratedText)]
        continued.append(_card([[example.pixels], *([image] for image in images)], f"“{' '.join(said)}”"))
    return f"""<h2>Drawn from held-out captions</h2>
<p class="sub">Above: drawn from the caption, which no training image had. Below: the real image.</p>{_grid(pairs)}
<h2>Reconstructed</h2><p class="sub">Above: drawn from the embeddings of the image below.</p>{_grid(rebuilt)}
<h2>Blends</h2><p class="sub">Two images, and the image that the model draws from both.</p>{_grid(blends)}
<h2>Interleaved</h2><p class="sub">An image, and the text and the image with which the model continued.</p>
{_grid(continued)}"""


def _chat_cards(chats: Chats) -> str:
    """Conversations of the instruction-tuned model as speech bubbles next to their images."""
    cards = []
    for conversation in chats.conversations:
        turns = []
        for exchange in conversation.exchanges:
            right = exchange.answer == exchange.right
            mark = "good" if right else "bad"
            truth = "" if right else f" <span class=k>({html.escape(exchange.right)})</span>"
            turns.append(f"<div class=asked>{html.escape(exchange.question)}</div>")
            turns.append(f'<div class="said {mark}">{html.escape(exchange.answer) or "(nothing)"}{truth}</div>')
        image = f'<img src="{_png(conversation.example.pixels)}" alt="">'
        cards.append(f"<div class=card>{image}{''.join(turns)}</div>")
    return f"""<h2>Chats</h2><p class="sub">After instruction tuning: the image is shown with the first
question. Red answers are wrong, with the right one after them. The table above has the scores of such questions before
and after tuning.</p><div class="grid wide">{"".join(cards)}</div>"""


def _drawings_image(path: Path, drawings: Drawings) -> None:
    """Two bands of held-out captions: the real image, the image drawn from the caption, the reconstruction."""
    some = drawings.examples[: 2 * IMAGE_COLUMNS]
    rows = {
        "real": [d.example.pixels for d in some],
        "drawn from\nthe caption": [d.drawn for d in some],
        "reconstructed": [d.reconstructed for d in some],
    }
    figure, axes = plt.subplots(6, IMAGE_COLUMNS, figsize=(1.25 * IMAGE_COLUMNS, 8.6), constrained_layout=True)
    for number, drawn in enumerate(some):
        band, column = divmod(number, IMAGE_COLUMNS)
        for row, (name, images) in enumerate(rows.items()):
            axis = axes[3 * band + row, column]
            axis.imshow(images[number])
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if column == 0:
                axis.set_ylabel(name, fontsize=8)
            if row == 0:
                axis.set_title(textwrap.fill(drawn.example.caption, 20), fontsize=7)
    with write_atomically(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
    plt.close(figure)


def _card(rows: Sequence[Sequence[np.ndarray]], about: str) -> str:
    """Rows of images above a line of HTML."""
    images = [[f'<img src="{_png(image)}" alt="">' for image in row] for row in rows]
    lines = "".join(f"<div class=pair>{''.join(row)}</div>" for row in images)
    return f"<div class=card>{lines}{about}</div>"


def _grid(cards: Sequence[str]) -> str:
    return f"<div class=grid>{''.join(cards)}</div>"


def _caption_cards(answers: Sequence[Answer]) -> str:
    cards = []
    for answer in answers:
        right = answer.caption == answer.example.caption
        truth = "" if right else f"<div class=k>{html.escape(answer.example.caption)}</div>"
        cards.append(
            f'<div class=card><img src="{_png(answer.example.pixels)}" alt="">'
            f'<div class="{"good" if right else "bad"}">{html.escape(answer.caption) or "(nothing)"}</div>{truth}</div>'
        )
    return _grid(cards)


def _retrieval_cards(answers: Sequence[Answer]) -> str:
    cards = []
    for answer in answers:
        place = f'<div class="{"good" if answer.rank == 0 else "bad"}">right image: place {answer.rank + 1}</div>'
        images = [answer.example.pixels, answer.nearest.pixels]
        cards.append(_card([images], html.escape(answer.example.caption) + place))
    return _grid(cards)


def _png(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3] -> data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _curves(metrics: Sequence[dict]) -> str:
    """The training curves as a PNG data URI."""
    figure, axes = plt.subplots(1, len(CURVES), figsize=(4 * len(CURVES), 3), constrained_layout=True)
    for axis, (name, title, logarithmic) in zip(axes, CURVES, strict=True):
        points = [(row["step"], row[name]) for row in metrics if name in row]
        axis.plot(*zip(*points, strict=True), linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        if logarithmic:
            axis.set_yscale("log")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
