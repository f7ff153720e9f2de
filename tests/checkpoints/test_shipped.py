"""The model in the box: what is shipped, and that it captions, draws and chats."""

import json

import numpy as np
import pytest

from emu_jax import Emu
from emu_jax.checkpoints.shipped import CURVES_FILE, DEFAULT, MODELS
from emu_jax.cli import main
from emu_jax.data.embedded_chats import has_one_tone
from emu_jax.data.fluent_emoji import examples
from emu_jax.data.latents import Latents
from emu_jax.evaluate.quickstart.captions import CAPTION_TOKENS
from emu_jax.evaluate.quickstart.held_out import CAPTION, CLOSEST
from emu_jax.evaluate.quickstart.report import MAIN
from emu_jax.workdir import read_metrics

FOLDER = MODELS[DEFAULT]
SPLIT = "heldout_combinations"


@pytest.fixture(scope="module")
def scores() -> dict:
    return json.loads((FOLDER / "scores.json").read_text(encoding="utf-8"))["figures"]


def test_what_is_shipped():
    files = {str(path.relative_to(FOLDER)): path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()}
    weights = {f"{part}emu_jax.safetensors" for part in ("", "vae/", "unet/", "chat/")}
    assert set(files) == weights | {"README.md", "scores.json", CURVES_FILE}, f"expected nothing else: {sorted(files)}"
    assert sum(files.values()) <= 20e6, f"expected at most 20 MB: {files}"


def test_the_card_has_the_scores(scores):
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    lines = [line.split("|") for line in card.splitlines() if line.startswith("| heldout")]
    shown = {cells[1].strip(): float(cells[2]) for cells in lines}
    expected = {name: round(figure["value"], 2) for name, figure in scores.items() if name.startswith("heldout")}
    assert shown == expected


def test_the_report_s_main_figures_are_scored(scores):
    names = {f"{SPLIT}: {name}" for lines in MAIN.values() for _, name in lines}
    assert names <= set(scores), f"no such figures: {sorted(names - set(scores))}"


def test_its_curves_have_scores_and_losses():
    rows = read_metrics(FOLDER / CURVES_FILE)
    assert {"step", "text_loss", "regression_loss", CAPTION, CLOSEST} <= set().union(*rows)
    assert rows[-1][CAPTION] > rows[0].get(CAPTION, 0.0)


@pytest.mark.long
def test_its_parts_have_names(tmp_path):
    """A U-Net of one's own can be trained on its embeddings and its latents."""
    parts = ["--model", DEFAULT, "--vae", f"{DEFAULT}/vae", "--split", "heldout_concepts"]
    assert main(["precompute", *parts, "--out", str(tmp_path / "latents")]) == 0
    assert len(Latents(tmp_path / "latents")) == 40


@pytest.mark.long
def test_it_captions_draws_and_chats(scores):
    """The first held-out images; the shares are compared with those of all of them, of which 24 are a sample."""
    emu, tuned = Emu.load(DEFAULT), Emu.load(DEFAULT, tuned=True)
    some = [e for e in examples(SPLIT, emu.config.vision.image_size) if has_one_tone(e)][:24]
    written = emu.generate_text([[e.pixels] for e in some], max_new_tokens=CAPTION_TOKENS)
    right = np.mean([one.text.strip() == e.caption for one, e in zip(written, some, strict=True)])
    expected = scores[f"{SPLIT}: caption exactly right"]["value"]
    assert abs(right - expected) < 0.2, f"expected captions to be right for about {expected}: {right}"

    chat = tuned.chat()
    answers = []
    for example in some:
        answers.append(chat.say([example.pixels, "what is this?"]).text.strip())
        chat.reset()
    right = np.mean([answer == e.caption or e.role in answer for answer, e in zip(answers, some, strict=True)])
    assert right > 0.5, answers

    begun = chat.say(f"draw {some[0].caption}")
    assert begun.ended_by == "image", begun
    images = [np.asarray(chat.draw().image, float), np.asarray(emu.generate_image([some[0].caption]).image, float)]
    gallery = np.stack([e.pixels for e in examples(SPLIT, images[0].shape[0])]).astype(float)
    roles = [e.role for e in examples(SPLIT, images[0].shape[0])]
    for drawn in images:
        nearest = np.square(gallery - drawn).sum((1, 2, 3)).argsort()[:5]
        assert some[0].role in {roles[number] for number in nearest}, [roles[number] for number in nearest]
