"""The report of a run: `report.html`, one self-contained page, and `scores.json` with every figure; for a model with a
decoder also `drawings.png`, a grid of drawings.

The page opens with images: what was drawn or named, and what was chatted. Curves follow, over those of the model in the
box, then the main figures with intervals and chance. The other figures and images, the config and the versions are
folded.
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

from emu_jax.checkpoints.shipped import CURVES_FILE, DEFAULT, MODELS
from emu_jax.checkpoints.store import open_checkpoint
from emu_jax.config import to_json
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.quickstart.captions import Answer, Scores
from emu_jax.evaluate.quickstart.chat import Chats
from emu_jax.evaluate.quickstart.drawings import ROLE_FIGURE, TONE_FIGURE, Drawings
from emu_jax.evaluate.quickstart.held_out import CAPTION, CLOSEST
from emu_jax.generate.model import GeneratedText
from emu_jax.storage import Path, replace_text, write_atomically
from emu_jax.workdir import CONFIG_FILE, METRICS_FILE, read_metrics

IMAGE_BANDS, IMAGE_COLUMNS = 3, 8  # of drawings.png
GRID = 24  # held-out images shown with their captions
# metric, title, whether its axis is logarithmic
CURVES = (
    (CAPTION, "held-out images named exactly right", False),
    (CLOSEST, "held-out names that lead to their image", False),
    ("text_loss", "text: cross-entropy (nats a token)", True),
    ("regression_loss", "visual: squared error a dimension", False),
)
SPLIT = "heldout_combinations"
# The figures that are not folded: group -> (what is shown, the figure's name after the split's).
MAIN = {
    "Images named": (
        ("caption exactly right", "caption exactly right"),
        ("its role right", "caption's role right"),
        ("its skin tone right", "caption's skin tone right"),
    ),
    "Names imagined": (
        ("the right image is the closest", "embeddings from text, right image in top 1"),
        ("the right image is in the top 5", "embeddings from text, right image in top 5"),
        ("R² of the embeddings", "embeddings from text, autoregressive R2"),
    ),
    "Names drawn": (
        ("the role is among the 5 nearest images", f"drawn from the caption, {ROLE_FIGURE} (pixels)"),
        ("the nearest image has the skin tone", f"drawn from the caption, {TONE_FIGURE} (pixels)"),
    ),
    "Questions answered": (
        ("“what is this?”", "names, tuned, 0 examples: exactly right (name)"),
        ("“what skin tone does the person have?”", "questions, tuned, 0 examples: exactly right (tone)"),
        ("“yes or no, is this a …”", "questions, tuned, 0 examples: exactly right (is-this)"),
    ),
}
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


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a report says of a run beside its scores; a model without a work directory has no metrics."""

    name: str
    config: str
    metrics: list[dict[str, float]]

    @classmethod
    def of(cls, path: Path) -> _Run:
        if (path / CONFIG_FILE).is_file():
            return cls(path.name, (path / CONFIG_FILE).read_bytes().decode(), read_metrics(path / METRICS_FILE))
        metrics = read_metrics(path / CURVES_FILE) if (path / CURVES_FILE).is_file() else []
        return cls(path.name, to_json(open_checkpoint(path).config), metrics)


def _page(
    workdir: Path, scores: Scores, figures: dict[str, Figure], drawings: Drawings | None, chats: Chats | None
) -> str:
    run = _Run.of(workdir)
    held_out = [answer for answer in scores.answers if answer.split == SPLIT]
    unseen = [answer for answer in scores.answers if answer.split == "heldout_concepts"]
    versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
    steps = f" after {run.metrics[-1]['step']:,} steps" if run.metrics else ""
    captions = f"""<h2>Named</h2><p class="sub">Held-out images, and the names that the model gave them. Red ones are
wrong, with the right one below.</p>{_caption_cards(held_out[:GRID])}"""
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>emu_jax · {html.escape(run.name)}</title>
<style>
{STYLE}</style><h1>{html.escape(run.name)}</h1>
<p class="sub">One checkpoint{steps}: it names images, and from a name it generates the embeddings of an image. Held-out
combinations are roles and skin tones that were each seen in training, but never together.</p>
{_drawn_cards(drawings) if drawings else ""}{captions}
{_chat_cards(chats) if chats else ""}
<h2>Imagined</h2><p class="sub">Left: the image that belongs to a held-out name. Right: the one among all
{scores.gallery:,} that is closest to the embeddings that the model generates from the name.</p>
{_retrieval_cards(held_out[: GRID // 2])}
{_training(run.metrics)}
<h2>Figures</h2>{_main_table(figures)}
<details><summary>All {len(figures)} figures</summary>{_score_table(figures)}</details>
{_drawing_details(drawings) if drawings else ""}
<details><summary>Concepts never seen</summary>{_caption_cards(unseen[: GRID // 2])}</details>
<details><summary>Config and versions</summary><pre>{html.escape(run.config)}</pre>
<p class="k">{html.escape(versions)}</p></details></html>
"""


def _training(metrics: Sequence[dict]) -> str:
    if not metrics:
        return ""
    behind = box_curves()
    about = f'<p class="sub">Grey: the run that made {DEFAULT}; its last value is dotted.</p>' if behind else ""
    image = f'<img src="{_curves(metrics, behind)}" style="max-width:100%" alt="training curves">'
    return f"<h2>Learnt</h2>{about}{image}"


def box_curves() -> list[dict[str, float]]:
    """Rows of the metrics of the run that made the model in the box."""
    file = MODELS[DEFAULT] / CURVES_FILE
    return read_metrics(file) if file.is_file() else []


def _main_table(figures: dict[str, Figure]) -> str:
    head = "<tr><th>on held-out combinations<th>value<th>95% interval<th>chance<th>images</tr>"
    rows = []
    for group, lines in MAIN.items():
        found = [(label, figures[f"{SPLIT}: {name}"]) for label, name in lines if f"{SPLIT}: {name}" in figures]
        if found:
            rows += [f"<tr><th colspan=5>{group}</th></tr>", *(_figure_row(label, f) for label, f in found)]
    return f"<table>{head}{''.join(rows)}</table>"


def _score_table(figures: dict[str, Figure]) -> str:
    head = "<tr><th>figure<th>value<th>95% interval<th>chance<th>images</tr>"
    return f"<table>{head}{''.join(_figure_row(name, figure) for name, figure in figures.items())}</table>"


def _figure_row(name: str, f: Figure) -> str:
    return (
        f"<tr><td>{html.escape(name)}</td><td class=n><b>{f.value:.3f}</b></td>"
        f"<td class=n>{f.interval[0]:.3f} to {f.interval[1]:.3f}</td><td class=n>{_chance(f)}</td>"
        f"<td class=n>{f.count}</td></tr>"
    )


def _chance(figure: Figure) -> str:
    return "" if figure.chance is None else f"{figure.chance:.4f}"


def _drawn_cards(drawings: Drawings) -> str:
    cards = [
        _card([[drawn.drawn], [drawn.example.pixels]], html.escape(drawn.example.caption))
        for drawn in drawings.examples[:GRID]
    ]
    return f"""<h2>Drawn</h2><p class="sub">Above: drawn from the name, which no training image had. Below: the real
image.</p>{_grid(cards)}"""


def _drawing_details(drawings: Drawings) -> str:
    """Reconstructions, blends and continued documents."""
    rebuilt = [_card([[drawn.reconstructed], [drawn.example.pixels]], "") for drawn in drawings.examples[:GRID]]
    blends = [
        _card([[a.pixels, b.pixels], [image]], f"{html.escape(a.caption)} <b>+</b> {html.escape(b.caption)}")
        for a, b, image in drawings.blends
    ]
    continued = []
    for example, items in drawings.continued:
        said = [html.escape(item.text) for item in items if isinstance(item, GeneratedText)]
        images = [np.asarray(item.image) for item in items if not isinstance(item, GeneratedText)]
        continued.append(_card([[example.pixels], *([image] for image in images)], f"“{' '.join(said)}”"))
    return f"""<details><summary>Reconstructed, blended, continued</summary>
<h3>Reconstructed</h3><p class="sub">Above: drawn from the embeddings of the image below.</p>{_grid(rebuilt)}
<h3>Blends</h3><p class="sub">Two images, and the image that the model draws from both.</p>{_grid(blends)}
<h3>Interleaved</h3><p class="sub">An image, and the text and the image with which the model continued.</p>
{_grid(continued)}</details>"""


def _chat_cards(chats: Chats) -> str:
    """Conversations of the instruction-tuned model as speech bubbles next to their images."""
    cards = []
    for conversation in chats.conversations:
        turns = []
        for exchange in conversation.exchanges:
            turns.append(f"<div class=asked>{html.escape(exchange.question)}</div>")
            if exchange.drawn is not None:
                turns.append(f'<div class="said good"><img src="{_png(np.asarray(exchange.drawn))}" alt=""></div>')
                continue
            right = exchange.answer == exchange.right
            mark = "good" if right else "bad"
            truth = "" if right else f" <span class=k>({html.escape(exchange.right or 'an image')})</span>"
            turns.append(f'<div class="said {mark}">{html.escape(exchange.answer) or "(nothing)"}{truth}</div>')
        image = f'<img src="{_png(conversation.example.pixels)}" alt="">'
        cards.append(f"<div class=card>{image}{''.join(turns)}</div>")
    return f"""<h2>Chatted</h2><p class="sub">After instruction tuning; the image is shown with the first question. Red
answers are wrong, with the right one after them.</p><div class="grid wide">{"".join(cards)}</div>"""


def _drawings_image(path: Path, drawings: Drawings) -> None:
    """Bands of held-out captions: the real image, the image drawn from the caption, the reconstruction."""
    some = drawings.examples[: IMAGE_BANDS * IMAGE_COLUMNS]
    rows = {
        "real": [d.example.pixels for d in some],
        "drawn from\nthe caption": [d.drawn for d in some],
        "reconstructed": [d.reconstructed for d in some],
    }
    size = 1.25 * IMAGE_COLUMNS, 4.3 * IMAGE_BANDS
    figure, axes = plt.subplots(3 * IMAGE_BANDS, IMAGE_COLUMNS, figsize=size, constrained_layout=True)
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


def _curves(metrics: Sequence[dict], behind: Sequence[dict]) -> str:
    """The training curves as a PNG data URI, over those of the model in the box as far as the run went."""
    last = metrics[-1]["step"]
    shown = [curve for curve in CURVES if any(curve[0] in row for row in metrics)]
    figure, axes = plt.subplots(1, max(1, len(shown)), figsize=(4 * max(1, len(shown)), 3), constrained_layout=True)
    for axis, (name, title, logarithmic) in zip(np.atleast_1d(axes), shown, strict=False):
        box = [(row["step"], row[name]) for row in behind if name in row]
        if box:
            axis.plot(*zip(*((x, y) for x, y in box if x <= last), strict=True), color="0.7", linewidth=2.5)
            axis.axhline(box[-1][1], color="0.7", linestyle=":")
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
