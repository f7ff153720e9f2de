"""FID's pixels against constants of the field's own packages and, where they are installed, against the packages.

pytorch-fid and torch-fidelity require torchvision, so they are in no extra: `pip install pytorch-fid torch-fidelity
clean-fid` beside this package runs the last tests, which are slow.
"""

import json
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image as PIL

from emu_jax.data.fluent_emoji import SIZE, read_example, records
from emu_jax.errors import UserError
from emu_jax.evaluate.benchmarks.benchmark import Weights
from emu_jax.evaluate.metrics import fid, frechet, inception
from emu_jax.evaluate.metrics.drawings import clip_name
from tests.evaluate.metrics.test_inception import file as weights  # noqa: F401  (a fixture)
from tests.evaluate.metrics.test_inception import network  # noqa: F401  (a fixture)


def gratings() -> np.ndarray:
    """uint8 [361, 640, 3]: ramps and stripes of a few pixels, which any other filter, crop or rounding changes."""
    y, x = np.mgrid[:361, :640]
    stripes = ((x // 3 + y // 5) % 2) * 255
    return np.stack([(3 * x + 5 * y) % 256, stripes, (x * y // 40) % 256], axis=-1).astype(np.uint8)


# Means and standard deviations of the channels, and the pixels at (0, 0), (150, 7), (298, 298) and (33, 250).
# clean: cleanfid 0.1.35, resize.build_resizer("clean")(gratings()), in 0 to 255.
CLEAN = (
    (127.4715, 127.4984, 121.4809),
    (71.8771, 88.3362, 71.4433),
    (2.41314, 0.0, 0.0),
    (184.67146, 250.69365, 69.84058),
    (130.58685, 110.45825, 111.64846),
    (14.74331, 49.66138, 12.77908),
)
# native: the input that pytorch-fid 0.3.0 makes of it: ToTensor, F.interpolate of torch 2.13.0, 2 x - 1.
NATIVE = (
    (-0.000158, -0.0000086, -0.046818),
    (0.563844, 0.821599, 0.560128),
    (-0.982517, -1.0, -1.0),
    (0.448607, 1.0, -0.452077),
    (0.025654, -0.111372, -0.119930),
    (-0.883967, -0.892975, -0.820094),
)
# crop256: the same of Pillow 12.3.0's crop((139, 0, 500, 361)).resize((256, 256), BICUBIC).
CROP256 = (
    (0.000195, -0.0000205, -0.017754),
    (0.550484, 0.572486, 0.537009),
    (0.278431, -1.0, -0.992157),
    (-0.462470, 0.891770, 0.225339),
    (0.749020, -0.403922, 0.050980),
    (0.909922, 0.268362, 0.442249),
)


@pytest.mark.parametrize(("rule", "expected"), [("clean", CLEAN), ("native", NATIVE), ("crop256", CROP256)])
def test_the_network_sees_the_fields_pixels(rule, expected):
    x = np.asarray(fid.network_input(gratings(), rule), np.float64)
    assert x.shape == (299, 299, 3)
    if rule == "clean":
        x = 128 * x + 128  # clean-fid's own scale is undone
    found = [x.mean((0, 1)), x.std((0, 1)), x[0, 0], x[150, 7], x[298, 298], x[33, 250]]
    np.testing.assert_allclose(found, expected, atol=1e-3 if rule == "clean" else 2e-5)


def test_a_drawing_of_256_pixels_is_not_changed_by_the_crop():
    pixels = gratings()[:256, :256]
    crop, native = (np.asarray(fid.network_input(pixels, rule)) for rule in ("crop256", "native"))
    np.testing.assert_array_equal(crop, native)


def test_files_are_read_as_pillow_converts_them(tmp_path):
    """Tags do not rotate, and transparent pixels keep their colours."""
    pixels = gratings()[:40, :60]
    exif = PIL.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    PIL.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif)
    PIL.fromarray(np.dstack([pixels, pixels[..., :1]])).save(tmp_path / "glass.png")
    PIL.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    for path in tmp_path.iterdir():
        expected = np.asarray(PIL.open(path).convert("RGB"))
        np.testing.assert_array_equal(fid.read_image(path), expected, err_msg=path.name)


def test_rules():
    with pytest.raises(UserError, match=r"^fid='crop': unknown; choose one of crop256, clean, native$"):
        fid.network_input(gratings(), "crop")
    with pytest.raises(UserError, match=r"^fid='crop': unknown"):
        Weights(fid="crop")


# ---------------------------------------------------------------- statistics as a file


@pytest.fixture
def narrow(monkeypatch):
    """Six features, which a file's name and the rule determine, in place of Inception's."""

    def features(params, files, rule):
        return np.stack([np.random.default_rng([*path.name.encode(), len(rule)]).normal(size=6) for path in files])

    monkeypatch.setattr(inception, "FEATURES", 6)
    monkeypatch.setattr(inception, "load", lambda file: {})
    monkeypatch.setattr(fid, "features", features)
    return features


DRAWN, REAL = ([pathlib.Path(f"{kind}{n}") for n in range(count)] for kind, count in (("drawn", 1200), ("real", 90)))


def test_statistics_stand_in_for_the_real_images(narrow, tmp_path):
    path = tmp_path / "coco.npz"
    (name, written), *_ = fid.figure(DRAWN, REAL, weights=tmp_path, rule="clean", statistics=path).items()
    assert name == "FID, clean, 1,200 images against coco.npz"
    assert fid.figure(DRAWN, [], weights=tmp_path, rule="clean", statistics=path)[name].value == pytest.approx(
        written.value, rel=1e-9
    )
    (name, images), *_ = fid.figure(DRAWN, REAL, weights=tmp_path, rule="clean").items()
    assert name == "FID, clean, 1,200 images" and images == written
    assert images.value == frechet.distance(narrow({}, DRAWN, "clean"), narrow({}, REAL, "clean"))
    with np.load(path) as archive:  # pytorch-fid's names and definitions
        real = narrow({}, REAL, "clean")
        np.testing.assert_allclose(archive["mu"], real.mean(0))
        np.testing.assert_allclose(archive["sigma"], np.cov(real, rowvar=False), atol=1e-12)
    assert [file.name for file in tmp_path.iterdir()] == ["coco.npz"]


def test_statistics_of_others_have_no_rule(narrow, tmp_path):
    real = narrow({}, REAL, "native")
    np.savez(tmp_path / "theirs.npz", mu=real.mean(0), sigma=np.cov(real, rowvar=False))
    (figure,) = fid.figure(DRAWN, [], weights=tmp_path, rule="native", statistics=tmp_path / "theirs.npz").values()
    assert figure.value == pytest.approx(frechet.distance(narrow({}, DRAWN, "native"), real), rel=1e-9)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(6)}, "sigma is not a file in the archive; expected an .npz file with mu"),
        ({"mu": np.zeros(5), "sigma": np.eye(6)}, r"mu is \[5\] and sigma \[6, 6\]; expected"),
        ({"mu": np.full(6, np.nan), "sigma": np.eye(6)}, "holds values that are not finite"),
        ({"mu": np.zeros(6), "sigma": np.eye(6), "rule": np.array("clean")}, "of --fid clean, not crop256; ask for"),
        ({"mu": np.array([{}] * 6), "sigma": np.eye(6)}, r"cannot be read \(Object arrays cannot be loaded"),
        (b"not zipped", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_statistics_that_cannot_be_used(narrow, tmp_path, arrays, words):
    path = tmp_path / "bad.npz"
    if isinstance(arrays, bytes):
        path.write_bytes(arrays)
    else:
        np.savez(path, **arrays)
    for refuse in (
        lambda: fid.figure(DRAWN, [], weights=tmp_path, statistics=path),
        lambda: Weights(inception=tmp_path, fid_statistics=path),  # before anything is drawn
    ):
        with pytest.raises(UserError, match=words) as error:
            refuse()
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_statistics_need_inception(tmp_path):
    with pytest.raises(UserError, match=r"fid_statistics=.*a\.npz: FID needs Inception's weights"):
        Weights(fid_statistics=tmp_path / "a.npz")


def test_a_folder_that_is_missing_is_named(narrow, tmp_path):
    known = frechet.moments(narrow({}, REAL, "clean"))
    with pytest.raises(UserError, match=r"none/a\.npz: cannot be written \(No such file or directory\)"):
        fid.write_statistics(tmp_path / "none" / "a.npz", known, "clean")


@pytest.mark.parametrize(
    ("config", "name"), [({"_name_or_path": "openai/clip-vit-large-patch14/"}, "clip-vit-large-patch14"), ({}, "mine")]
)
def test_clip_has_a_name(tmp_path, config, name):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    assert clip_name(folder) == name


# ---------------------------------------------------------------- the field's packages, where they are installed


ABSENT = "pytorch-fid, torch-fidelity or clean-fid is not installed: they require torchvision, so no extra has them"
SHAPES = ((361, 640), (640, 427), (500, 333), (240, 320))


def photograph(seed: int, shape: tuple[int, int]) -> PIL.Image:
    """An embedded image on a soft background with noise."""
    rng = np.random.default_rng(seed)
    height, width = shape
    soft = PIL.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((width, height), PIL.Resampling.BICUBIC)
    noise = rng.normal(0, 12, (height, width, 1))
    image = PIL.fromarray((np.asarray(soft) + noise).clip(0, 255).astype(np.uint8))
    source = records("train")
    shown = PIL.fromarray(read_example(source[int(rng.integers(len(source)))], SIZE).pixels)
    image.paste(shown.resize((180, 180)), (int(rng.integers(0, width - 180)), int(rng.integers(0, height - 180))))
    return image


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """Drawn and real images as JPEG files."""
    root = tmp_path_factory.mktemp("photographs")
    for number in range(8):
        for name, shape in (("drawn", (512, 512)), ("real", SHAPES[number % len(SHAPES)])):
            (root / name).mkdir(exist_ok=True)
            photograph(2 * number + (name == "real"), shape).save(root / name / f"{number}.jpg", quality=90)
    return root / "drawn", root / "real"


def _check_same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error < 1e-4, f"features off by {error:.1e} of the largest, expected below 1e-4"
    assert frechet.distance(*ours) == pytest.approx(frechet.distance(*theirs), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["crop256", "native"])
def test_features_are_pytorch_fids(rule, folders, weights, monkeypatch, tmp_path):  # noqa: F811
    theirs, score = (pytest.importorskip(f"pytorch_fid.{name}", reason=ABSENT) for name in ("inception", "fid_score"))
    state = torch.load(weights, weights_only=True)
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *args, **kwargs: state)
    model = theirs.InceptionV3([3])
    found = []
    for folder in folders:
        files = sorted(folder.iterdir())
        if rule == "crop256":
            for path in files:
                image = PIL.open(path)
                side = min(image.size)
                left, top = ((length - side) // 2 for length in image.size)
                crop = image.crop((left, top, left + side, top + side)).resize((256, 256), PIL.Resampling.BICUBIC)
                crop.save(tmp_path / f"{folder.name}{path.stem}.png")
            files = sorted(tmp_path.glob(f"{folder.name}*.png"))
        found.append(score.get_activations(files, model, batch_size=1, num_workers=0))
    params = inception.load(weights)
    _check_same([fid.features(params, sorted(folder.iterdir()), rule) for folder in folders], found)


@pytest.mark.slow
def test_features_are_torch_fidelitys(folders, weights, tmp_path):  # noqa: F811
    """Over images of 299 x 299 pixels: it resizes others as TensorFlow 1 did, which no rule here does."""
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason=ABSENT)
    model = theirs.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(weights))
    params, ours, found = inception.load(weights), [], []
    for folder in folders:
        files = []
        for path in sorted(folder.iterdir()):
            files.append(tmp_path / f"{folder.name}{path.stem}.png")
            PIL.open(path).resize((299, 299)).save(files[-1])
        ours.append(fid.features(params, files, "clean"))
        pixels = torch.from_numpy(np.stack([np.asarray(PIL.open(path)) for path in files])).permute(0, 3, 1, 2)
        with torch.inference_mode():
            found.append(model(pixels)[0].numpy())
    _check_same(ours, found)


def test_pixels_are_clean_fids(folders):
    theirs = pytest.importorskip("cleanfid.resize", reason=ABSENT)
    resize = theirs.build_resizer("clean")
    for folder in folders:
        for path in folder.iterdir():
            expected = (resize(np.array(PIL.open(path).convert("RGB"))) - 128) / 128
            np.testing.assert_array_equal(fid.network_input(fid.read_image(path), "clean"), expected)
