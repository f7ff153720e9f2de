"""Drawing through the API and the command line: seeds, sizes, files and their metadata, interleaved replies."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from emu_jax import Emu
from emu_jax.cli import main
from emu_jax.errors import UserError
from emu_jax.generate import samplers
from emu_jax.generate.decoder import GeneratedImage
from emu_jax.generate.files import read_requests
from emu_jax.generate.model import GeneratedText

IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
FAST = {"sampler": "ddim", "steps": 2}


@pytest.fixture(scope="module")
def model(drawing) -> Emu:
    return Emu.load(drawing)


def test_an_image_depends_on_its_own_prompt_and_seed_alone(model):
    alone = model.generate_image(["a red bar"], seed=3, **FAST)
    together = model.generate_images([["a blue cross"], ["a red bar"]], seeds=[1, 3], **FAST)
    np.testing.assert_allclose(np.asarray(alone.image, int), np.asarray(together[1].image, int), atol=1)
    other = model.generate_image(["a red bar"], seed=4, **FAST)
    assert (np.asarray(alone.image) != np.asarray(other.image)).any()
    assert alone.flagged is None and alone.embeddings.shape == (4, 16)


def test_latents_fix_the_start(model):
    start = model.decoder.initial_latents([7], 16, 16)
    given = model.generate_image(["a"], latents=np.asarray(start), **FAST)
    np.testing.assert_array_equal(given.image, model.generate_image(["a"], seed=7, **FAST).image)


def test_guidance_and_seed_compile_nothing(model):
    model.generate_image(["a"], **FAST)
    before = samplers.sample._cache_size()
    model.generate_image(["a"], guidance=2.0, seed=9, **FAST)
    assert samplers.sample._cache_size() == before


@pytest.mark.slow
def test_other_sizes(model):
    assert model.generate_image(["a"], height=24, width=16, **FAST).image.size == (16, 24)
    assert model.generate_image(["a"], height=18, width=22, **FAST).image.size == (22, 18), "odd latents"


def test_blending_and_reconstruction(model):
    blend = model.generate_image([IMAGE, Image.fromarray(IMAGE)], **FAST)
    rebuilt = model.reconstruct(IMAGE, **FAST)
    assert blend.image.size == rebuilt.image.size == (16, 16)
    np.testing.assert_allclose(rebuilt.embeddings, model.encode_images(IMAGE[None])[0], atol=1e-5)


def test_documents_go_on_as_the_caller_says(model):
    items = model.continue_document(["a red bar"], pattern=("image", "image", "image"), **FAST)
    assert [type(item) for item in items] == [GeneratedImage] * 3
    items = model.continue_document(["a red bar"], pattern=("text", "image"), max_items=1, **FAST)
    assert [type(item) for item in items] in ([GeneratedText], [])
    assert all(isinstance(item, GeneratedText) for item in model.continue_document([IMAGE], max_items=1, **FAST))


@pytest.mark.long
def test_a_model_that_begins_images_decides(model):
    """[IMG] is made likelier than the word that would come: of a model that has learnt it no text holds it."""
    prompt, img = ["a red bar"], model.tokenizer.img_id
    word = model.generate_text([prompt], max_new_tokens=1)[0].token_ids[0]
    params = jax.tree.map(lambda leaf: leaf, model.params)
    head = params["llama"]["lm_head"]["kernel"]
    params["llama"]["lm_head"]["kernel"] = head.at[:, img].set(2 * head[:, word])
    learnt, published = (
        Emu(
            dataclasses.replace(model.config, learn_image_token=learns),
            params,
            model.statistics,
            model.tokenizer,
            model.decoder,
        )
        for learns in (True, False)
    )
    items = learnt.continue_document(prompt, max_items=2, max_new_tokens=4, **FAST)
    assert isinstance(items[0], GeneratedImage) and len(items) <= 2, items
    (text,) = learnt.generate_text([prompt], max_new_tokens=4)
    assert (text.token_ids, text.text, text.ended_by) == ([], "", "image")
    (text,) = published.generate_text([prompt], max_new_tokens=4)
    assert text.token_ids[0] == img and text.ended_by == "length", "as the reference decodes: it was never a label"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "plms"}, "sampler='plms' is unknown"),
        ({"steps": 0}, "steps=0; expected 1 to 999"),
        ({"height": 21}, "height=21; expected a multiple of 2 pixels"),
        ({"width": 7}, "width=7; expected a multiple of 2 pixels"),
        ({"guidance": float("nan")}, "guidance=nan; expected a finite number"),
        ({"seed": 2**32}, r"seeds=\[4294967296\]; expected 1 of them, one a prompt, each 0 to 4294967295"),
        ({"latents": np.zeros((1, 4, 4, 4))}, r"latents are \[1, 4, 4, 4\]; expected \[1, 8, 8, 2\]"),
    ],
)
def test_settings_that_cannot_work(model, settings, message):
    with pytest.raises(UserError, match=message):
        model.generate_image(["a"], **settings)


def test_an_image_that_cannot_be_read_is_named(model, tmp_path):
    (tmp_path / "cat.png").write_bytes(b"no image")
    for path in (tmp_path / "cat.png", tmp_path / "absent.png"):
        with pytest.raises(UserError, match=path.name):
            model.generate_image([path], **FAST)


def test_files_say_how_they_were_made(drawing, tmp_path, capsys):
    Image.fromarray(IMAGE).save(tmp_path / "cat.png")
    out = tmp_path / "blend.png"
    command = ["generate", "--model", str(drawing), "--prompt", str(tmp_path / "cat.png"), "a red bar"]
    drawn = ["--out", str(out), "--seeds", "3", "4", "--steps", "2", "--sampler", "ddim", "--guidance", "2"]
    assert main(command + drawn) == 0
    with Image.open(tmp_path / "blend-4.png") as image:
        assert json.loads(image.text["prompt"]) == [str(tmp_path / "cat.png"), "a red bar"]
        assert image.text["seed"] == "4" and image.text["safety"] == "not checked"
        assert json.loads(image.text["settings"]) == {"sampler": "ddim", "steps": 2, "guidance": 2.0}
    capsys.readouterr()
    assert main(command + drawn) == 2
    assert "blend-3.png: the file exists; name a new one" in capsys.readouterr().err


def test_many_from_a_file(drawing, tmp_path, capsys):
    requests = tmp_path / "requests.jsonl"
    lines = [{"prompt": ["a red bar"], "out": f"{n}.png", "seed": n} for n in range(3)]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["generate", "--model", str(drawing), "--prompts", str(requests), "--steps", "2", "--batch", "2"]
    assert main(command) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["0.png", "1.png", "2.png"]
    requests.write_text('{"prompt": ["a"]}\n')
    capsys.readouterr()
    assert main(command) == 2
    assert "requests.jsonl:1: out is null; expected the name of a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": [], "out": "a.png"}', "prompt is a list of 0; expected a text, or a list of texts and images"),
        ('{"prompt": [null], "out": "a.png"}', r"prompt\[0\] is null; expected a text or"),
        ('{"prompt": ["a", {"image": 7}], "out": "a.png"}', r"prompt\[1\].image is 7; expected the name of a file"),
        ('{"prompt": ["a"], "out": "a.png", "seed": "3"}', "seed is '3'; expected a whole number"),
        ('{"prompt": ["a"], "out": "a.png", "seed": true}', "seed is true; expected a whole number"),
        ('{"prompt": ["a"], "out": "a.png", "sed": 3}', "the field 'sed' is unknown; did you mean seed"),
        ('["a"]', "the line is a list of 1; expected"),
    ],
)
def test_lines_that_are_no_requests(tmp_path, line, message):
    (tmp_path / "r.jsonl").write_text(f'{{"prompt": ["a"], "out": "0.png"}}\n\n{line}\n', encoding="utf-8-sig")
    with pytest.raises(UserError, match=rf"r\.jsonl:3: {message}"):
        read_requests(tmp_path / "r.jsonl")
