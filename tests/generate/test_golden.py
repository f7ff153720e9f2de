"""Token ids, beam scores, visual embeddings and candidate rankings of the reference implementation."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from emu_jax import Emu
from emu_jax.data.tokenizer import IMAGE, IMG, IMG_END

FILES = {"pretrain": "mini-a/pretrain", "instruct": "mini-a/instruct/Emu-instruct.pt"}
PLACEHOLDER = IMG + IMAGE * 4 + IMG_END


@pytest.fixture(scope="module", params=FILES)
def case(request, golden):
    """(model, reference.json, tensors, images [3, H, W, 3])."""
    model = Emu.load(golden / FILES[request.param], tokenizer=golden / "llama_tokenizer.model", vision_head_dim=12)
    folder = golden / "mini-a" / request.param
    tensors = load_file(folder / "reference.safetensors")
    images = np.ascontiguousarray(tensors["images"].transpose(0, 2, 3, 1))
    return model, json.loads((folder / "reference.json").read_text()), tensors, images


def as_prompt(text: str, placeholder: str, images: np.ndarray, indices) -> list:
    """The reference's prompt with placeholders -> a list of texts and images."""
    parts = []
    for number, piece in enumerate(text.split(placeholder)):
        parts += [images[next(indices)]] if number else []
        parts += [piece] if piece else []
    return parts


@pytest.mark.parametrize("number", range(5))
def test_generated_text(case, number):
    model, reference, _, images = case
    expected = reference["generate"][number]
    indices = iter(expected["image_indices"])
    prompts = [as_prompt(text, PLACEHOLDER, images, indices) for text in expected["prompt"]]
    options = {name: value for name, value in expected["kwargs"].items() if name != "do_sample"}
    results = model.generate_text(prompts, **options)
    # The reference's ids begin with the placeholder <s> that it decodes from.
    assert [[1, *result.token_ids] for result in results] == expected["output_ids"], expected["name"]
    if expected["sequence_scores"]:
        np.testing.assert_allclose([r.score for r in results], expected["sequence_scores"], rtol=2e-4)


def test_generated_embeddings(case):
    model, reference, tensors, images = case
    for expected in reference.get("generate_image", []):
        indices = iter(expected["image_indices"])
        prompts = [as_prompt(text, "[<IMG_PLH>]", images, indices) for text in expected["text"]]
        target = tensors[f"generate_image/{expected['name']}"]
        error = np.abs(model.generate_embeddings(prompts) - target).max() / np.abs(target).max()
        assert error < 2e-4, f"{expected['name']}: {error:.1e}"


def test_encoded_images(case):
    model, _, tensors, images = case
    target = tensors["causal_embeds"]
    assert np.abs(model.encode_images(images) - target).max() / np.abs(target).max() < 2e-4


def test_candidate_scores_and_ranking(case):
    model, reference, tensors, images = case
    expected = reference["candidates"]
    prompt = as_prompt(expected["prompt"], PLACEHOLDER, images, iter(expected["image_indices"]))
    scores = model.score_candidates(prompt, expected["candidates"])
    np.testing.assert_allclose(scores, tensors["candidate_nll_sum"], rtol=2e-4)
    assert np.argsort(scores).tolist() == expected["rank"]


def test_generated_image(golden):
    """From the published layout and fixed initial latents: the embeddings' own image, as the reference draws it."""
    folder = golden / FILES["pretrain"]
    model = Emu.load(folder, tokenizer=golden / "llama_tokenizer.model", vision_head_dim=12)
    tensors = load_file(folder / "diffusion_reference.safetensors")
    start = tensors["sampling/initial_latents"].transpose(0, 2, 3, 1)  # [1, h, w, 4]
    result = model.generate_image(["a red bus on the street"], latents=start)
    assert result.image.size == (128, 128) and result.flagged is None
    expected = tensors["sampling/pndm_50_cfg7.5/image"][0].transpose(1, 2, 0)  # [H, W, 3] in [0, 1]
    error = np.abs(np.asarray(result.image) / 255.0 - expected).max()
    assert error < 0.5 / 255 + 2e-4, f"off by {error:.4f}, expected half a grey level at most"
