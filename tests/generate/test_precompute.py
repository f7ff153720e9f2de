"""The decoder's examples: made in parts, again after a kill, from untidy images, or while the decoder trains."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from emu_jax import Emu
from emu_jax.data.images import ImageError
from emu_jax.data.latents import Latents, LatentsFolder
from emu_jax.errors import UserError
from emu_jax.generate import conditions
from emu_jax.generate import precompute as module
from emu_jax.generate.online import OnlineConfig
from emu_jax.generate.precompute import PrecomputeConfig, precompute
from emu_jax.train.loop import train
from emu_jax.workdir import read_metrics
from tests.data import folders
from tests.train import tiny


@pytest.fixture
def make(drawing, documents, monkeypatch):
    """Precomputes from the pairs of the small documents, five records a chunk."""
    monkeypatch.setattr(module, "CHUNK", 5)

    def made(out, part=(0, 1), source=None, split="", **settings):
        drawn = PrecomputeConfig(str(source or tiny.pairs(documents)), split, **settings)
        return precompute(drawing, drawing / "vae", out, drawn, part=part)

    return made


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_parts_and_a_killed_one_make_the_same_files(make, tmp_path, monkeypatch):
    assert make(tmp_path / "whole") == 12
    assert make(tmp_path / "parts", (1, 2)) is None
    assert make(tmp_path / "parts", (0, 2)) == 12
    assert files(tmp_path / "parts") == files(tmp_path / "whole")

    write, killed = LatentsFolder.write, []

    def dies(self, number, examples):
        if number == 1 and not killed:
            killed.append(next(iter(examples)))  # in the middle of a chunk
            raise KeyboardInterrupt
        write(self, number, examples)

    monkeypatch.setattr(LatentsFolder, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "killed")
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {"examples.array_record-00000", "unfinished"}
    assert make(tmp_path / "killed") == 12
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert make(tmp_path / "killed") == 12, "what is complete is left as it is"


def test_images_are_cropped_padded_or_squashed_and_small_ones_left_out(make, tmp_path, drawing):
    """A wide image whose middle is black, beside a small one."""
    pixels = np.full((24, 72, 3), 255, np.uint8)
    pixels[:, 24:48] = 0
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    source = tmp_path / "images.jsonl"
    lines = [{"image": name, "text": "a black bar"} for name in ("wide.png", "small.png")]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    means = {}
    for fit in ("crop", "pad", "squash"):
        assert make(tmp_path / fit, source=source, fit=fit, min_side=16) == 1
        means[fit] = Latents(tmp_path / fit)[0].mean
    assert make(tmp_path / "all", source=source) == 2, "small ones are kept unless a side is asked for"
    black = Latents(tmp_path / "all")[1].mean
    np.testing.assert_allclose(means["crop"], black, atol=1e-5)
    assert np.abs(means["pad"] - black).max() > 1e-3 and np.abs(means["squash"] - means["pad"]).max() > 1e-3
    with pytest.raises(UserError, match="fit=stretch: unknown; choose one of squash, crop, pad"):
        make(tmp_path / "x", source=source, fit="stretch")


def test_a_folder_that_was_squashed_is_said_to_be(make, tmp_path, capsys):
    source = folders.write_folder(tmp_path / "prepared", folders.pairs("a", 3))
    assert make(tmp_path / "out", source=source, split="train") == 3
    assert "`emu-jax prepare` has squashed its images, and fit=crop changes them no more" in capsys.readouterr().err
    assert make(tmp_path / "squashed", source=source, split="train", fit="squash") == 3
    assert "squashed" not in capsys.readouterr().err


def test_unreadable_images_cost_themselves_up_to_a_share(make, documents, tmp_path, capsys):
    source = documents.with_name("with_a_fault.jsonl")
    lines = tiny.pairs(documents).read_text().splitlines()
    lines[3] = json.dumps({"image": "broken.png", "text": "a broken one"})
    documents.with_name("broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    source.write_text("\n".join(lines) + "\n")
    with pytest.raises(ImageError, match=r"broken\.png: not a readable image"):
        make(tmp_path / "strict", source=source)
    with pytest.raises(
        UserError, match=r"1 of 5 images of records 0 to 4 cannot be read, more than max_faults=0\.1; the"
    ):
        make(tmp_path / "few", source=source, max_faults=0.1)
    assert make(tmp_path / "half", source=source, max_faults=0.5) == 11
    assert "chunk 0: 1 of 5 images left out; the first: " in capsys.readouterr().err


@pytest.mark.long
def test_a_decoder_learns_the_same_from_examples_made_online(make, drawing, documents, tmp_path):
    make(tmp_path / "latents")
    stored = tiny.decoder_config(tmp_path / "latents")
    stored.train.steps = 3
    online = tiny.decoder_config(tiny.pairs(documents))
    online.online.update({"model": str(drawing), "vae": str(drawing / "vae")})
    online.train.steps = 3
    with online.unlocked():
        online.data.split = ""
    found = [train(config, tmp_path / f"unet{number}").params for number, config in enumerate((stored, online))]
    difference = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), *found)
    assert max(jax.tree.leaves(difference)) < 1e-5, difference


@pytest.mark.long
def test_what_the_recipe_never_reads_need_not_be_stored(make, tmp_path):
    make(tmp_path / "less", dtype="bfloat16", encoded=False)
    config = tiny.decoder_config(tmp_path / "less")
    with pytest.raises(UserError, match=r"it holds no embeddings of the images themselves; set config\.loss\.encoded_"):
        train(config, tmp_path / "unet")
    config.loss.encoded_share = 0.0
    assert int(train(config, tmp_path / "unet").step) == 2


@pytest.mark.long
def test_the_frozen_parts_are_in_memory_once(drawing, documents, tmp_path, monkeypatch):
    """Two sources and held-out data share them."""
    load, loaded = conditions.Emu.load, []
    monkeypatch.setattr(conditions.Emu, "load", lambda *words, **fields: loaded.append(words) or load(*words, **fields))
    config = tiny.decoder_config(tmp_path)
    pairs = str(tiny.pairs(documents))
    config.data.update({"source": "", "split": ""})
    config.data.mixture = ConfigDict({"a": {"source": pairs, "weight": 7.0}, "b": {"source": pairs, "weight": 2.0}})
    config.online.update({"model": str(drawing), "vae": str(drawing / "vae")})
    config.eval.update({"every": 1, "source": pairs, "batches": 1})
    train(config, tmp_path / "unet")
    assert len(loaded) == 1, loaded
    assert "held_out_loss" in read_metrics(tmp_path / "unet" / "metrics.jsonl")[-1]


def test_an_autoencoder_s_conditions_are_the_images_own(drawing):
    """With encoded_share=1 (`configs/emu2.py`) nothing is generated."""
    made = {"generated": False, "encoded": True}
    frozen = conditions.Conditions(drawing, drawing / "vae", **made)
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    (example,) = frozen.of_pixels([(["a red bar"], image)], ["x"], 1)
    expected = Emu.load(drawing).encode_images(image[None])[0]
    np.testing.assert_allclose(example.condition, expected, atol=1e-5)
    np.testing.assert_array_equal(example.condition, example.encoded)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fit": "stretch"}, r"config\.online\.fit='stretch' is unknown; choose one of squash, crop, pad"),
        ({"min_side": -1}, r"config\.online\.min_side=-1; expected at least 0"),
    ],
)
def test_wrong_settings_fail_at_construction(fields, message):
    with pytest.raises(UserError, match=message):
        OnlineConfig(model="emu-mini", vae="emu-mini/vae", **fields)


def test_online_needs_both_parts(tmp_path, documents):
    config = tiny.decoder_config(tiny.pairs(documents))
    config.online.model = "emu-mini"
    with pytest.raises(UserError, match=r"config\.online\.model='emu-mini', config\.online\.vae=''; expected both, or"):
        train(config, tmp_path)
