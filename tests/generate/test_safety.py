"""The safety checker against the published implementation, on a small random one in its own file layout."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from emu_jax.checkpoints.load import LoadedSafetyChecker, load_part
from emu_jax.errors import UserError
from emu_jax.generate.decoder import Decoder, Drawing
from emu_jax.generate.safety import SafetyCheck, preprocess

SIZE = 28
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "image_size": SIZE,
    "patch_size": 7,
}
IMAGES = 96


def images(count: int) -> list[np.ndarray]:
    """Smooth random images of all sorts of sizes, which are unlike each other."""
    random = np.random.default_rng(0)
    shapes = [(SIZE, SIZE), (40, 64), (99, 31), (64, 64)]
    coarse = random.integers(0, 256, (count, 3, 3, 3), np.uint8)
    return [np.asarray(Image.fromarray(c).resize(shapes[i % 4][::-1])) for i, c in enumerate(coarse)]


@pytest.fixture(scope="module")
def theirs():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    safety = pytest.importorskip("diffusers.pipelines.stable_diffusion.safety_checker")
    torch.manual_seed(0)
    config = transformers.CLIPConfig(vision_config=VISION, projection_dim=16)
    model = safety.StableDiffusionSafetyChecker(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("embeds"):
                value.normal_()
            elif value.ndim > 1:  # at the published initialisation images would hardly differ
                value.mul_(8.0)
        # Thresholds that tell the images apart: half of them are near a special concept, a third near another one.
        normalize = torch.nn.functional.normalize
        seen = normalize(model.visual_projection(model.vision_model(torch.from_numpy(published_pixels()))[1]))
        for name, share in (("special_care", 0.5), ("concept", 1 / 3)):
            cosines = seen @ normalize(getattr(model, f"{name}_embeds")).T  # [N, K]
            excess = cosines - cosines.mean(0)
            level = excess.max(1).values.quantile(1 - share)
            getattr(model, f"{name}_embeds_weights").copy_(cosines.mean(0) + level)
    return model


def published_pixels() -> np.ndarray:
    """What the checker sees of all images, channels first [N, 3, S, S]."""
    return np.stack([preprocess(image, SIZE).transpose(2, 0, 1) for image in images(IMAGES)])


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("safety_checker")
    theirs.save_pretrained(path)
    return path


def safety_check(folder) -> SafetyCheck:
    return SafetyCheck(load_part(folder, LoadedSafetyChecker))


def test_flags_are_the_published_ones(theirs, folder):
    import torch

    some = images(IMAGES)
    _, expected = theirs(torch.from_numpy(published_pixels()), [np.ones((1, 1, 3), np.float32) for _ in some])
    found = safety_check(folder).flagged(some)
    print(f"{sum(expected)} of {len(expected)} flagged")
    assert 10 < sum(expected) < len(expected) - 10, "the thresholds must tell images apart"
    assert found == [bool(flag) for flag in expected]


def test_special_care_lowers_the_threshold(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "without")
    state = load_file(folder / "model.safetensors")
    state["special_care_embeds_weights"] = np.full_like(state["special_care_embeds_weights"], 2.0)  # nothing is close
    save_file(state, tmp_path / "without" / "model.safetensors")
    with_care, without = (sum(safety_check(f).flagged(images(IMAGES))) for f in (folder, tmp_path / "without"))
    assert with_care > without, f"{with_care} flagged with special care, {without} without"


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.slow
def test_flagged_images_are_black(folder, golden, tmp_path, on):
    for name in ("unet", "vae", "scheduler"):
        (tmp_path / name).symlink_to(golden / "mini-a" / "pretrain" / name)
    shutil.copytree(folder, tmp_path / "safety_checker")
    state = load_file(folder / "model.safetensors")
    state["concept_embeds_weights"] = np.full_like(state["concept_embeds_weights"], -10.0)  # everything is close
    save_file(state, tmp_path / "safety_checker" / "model.safetensors")
    decoder = Decoder.load(tmp_path, safety_checker=on)
    reduction = decoder.vae_config.reduction
    latents = decoder.initial_latents([0, 1], 4 * reduction, 4 * reduction)
    condition = np.zeros((2, 4, decoder.unet_config.condition_dim), np.float32)
    drawn, flags = decoder.draw(condition, condition, latents, Drawing("ddim", 1, 1.0))
    assert flags == ([True, True] if on else [None, None])
    assert (drawn.max() == 0) == on, "black where the checker is on, and only there"


def test_preprocessing_is_the_published_one():
    processors = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = processors.CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    for image in images(4):
        expected = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_allclose(preprocess(image, SIZE), expected, atol=1e-5)


def test_sizes_are_read_off_the_files(folder):
    sizes = dataclasses.asdict(safety_check(folder).config)
    expected = {"image_size": SIZE, "patch_size": 7, "width": 32, "layers": 3, "heads": 4, "mlp_dim": 48}
    assert expected.items() <= sizes.items(), sizes
    assert (sizes["embedding_dim"], sizes["concepts"], sizes["special_concepts"]) == (16, 17, 3), sizes


def test_files_that_do_not_fit_are_named(folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": VISION}))
    save_file({key: value for key, value in state.items() if key != "concept_embeds"}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="holds no concept_embeds; expected Stable Diffusion's safety checker"):
        safety_check(tmp_path)
    state["extra.weight"] = state["concept_embeds"]
    save_file({key: value.copy() for key, value in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"unknown: extra\.weight|1 unknown: extra\.weight"):
        safety_check(tmp_path)
