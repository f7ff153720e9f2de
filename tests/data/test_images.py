"""Images: orientation, transparency, size limits, and errors that name the file."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from emu_jax.data.images import EncodedImage, ImageError, Recoding, StoredImage, decode_image, load_image, resize
from emu_jax.errors import UserError


def png(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_transparency_becomes_white():
    pixels = decode_image(png(Image.new("RGBA", (2, 1), (255, 0, 0, 0))), "x")
    np.testing.assert_array_equal(pixels, np.full((1, 2, 3), 255))


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees
    assert decode_image(png(Image.new("RGB", (4, 2)), exif=exif), "x").shape == (4, 2, 3)


def test_the_reference_s_reading_is_pillow_s():
    """Transparent red stays red, a turned photo stays turned, and 16 bits are clipped, as `convert("RGB")` does."""
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.array([[40, 255, 256, 65535]], np.uint16))
    for image, expected in (
        (png(Image.new("RGBA", (2, 1), (255, 0, 0, 0))), np.array([[[255, 0, 0]] * 2])),
        (png(Image.new("RGB", (4, 2), (1, 2, 3)), exif=exif), np.full((2, 4, 3), (1, 2, 3))),
        (png(deep), np.asarray(Image.open(io.BytesIO(png(deep))).convert("RGB"))),
    ):
        np.testing.assert_array_equal(decode_image(image, "x", reading="reference"), expected)


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode):
    assert load_image(Image.new(mode, (5, 7))).shape == (7, 5, 3)


def test_resize_goes_straight_to_the_square():
    assert resize(np.zeros((10, 30, 3), np.uint8), 8).shape == (8, 8, 3)


def test_cut_and_foreign_files_are_refused_by_name(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for name, data in {"cut.png": png(noise)[:2000], "text.png": b"hello"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: not a readable image"):
            load_image(tmp_path / name)
    with pytest.raises(UserError, match=r"gone\.png: no such image file"):
        load_image(tmp_path / "gone.png")


@pytest.mark.parametrize("side", [8_000, 13_000, 30_000])
def test_large_images_are_refused_by_their_header(side):
    """A one-colour PNG of 900 megapixels is small on disk; it must not be decoded."""
    header = png(Image.new("1", (8, 8)))
    # Width and height stand at bytes 16 to 24 of a PNG, followed by a checksum over the header.
    body = header[12:16] + side.to_bytes(4, "big") * 2 + header[24:29]
    data = header[:12] + body + zlib.crc32(body).to_bytes(4, "big") + header[33:]
    with pytest.raises(UserError, match=r"^big\.png: .*pixels.*; expected at most 50 megapixels, scale it down$"):
        decode_image(data, "big.png")


def test_arrays_are_checked():
    with pytest.raises(UserError, match=r"expected uint8 \[H, W, 3\], got float64 \[2, 2, 3\]"):
        load_image(np.zeros((2, 2, 3)))


@pytest.mark.parametrize(("fit", "expected"), [("crop", [0, 0]), ("pad", [255, 0, 255]), ("squash", [200, 0, 200])])
def test_how_a_wide_image_becomes_square(fit, expected):
    """A black square between two grey ones: as it is prepared, and as it is read."""
    pixels = np.full((96, 288, 3), 200, np.uint8)
    pixels[:, 96:192] = 0
    if fit == "pad":
        pixels = pixels[:, 96:192].repeat(2, axis=0)[:192]  # twice as high as wide
    stored = Recoding(image_size=96, fit=fit).recode(pixels, "wide")
    for found in (decode_image(stored, "wide"), EncodedImage(png(Image.fromarray(pixels)), 96, "wide", fit)()):
        assert found.shape == (96, 96, 3), found.shape
        middle = found[48, :, 0].astype(int)
        count = len(expected)
        places = [middle[round((n + 0.5) * 96 / count)] for n in range(count)]
        assert np.abs(np.array(places) - expected).max() < 8, places
    with pytest.raises(UserError, match="fit=stretch: unknown; choose one of squash, crop, pad"):
        Recoding(fit="stretch")


def test_images_of_tables_are_their_bytes():
    """Checked by their header at once, decoded when they are called."""
    data = png(Image.new("RGB", (3, 2), (1, 2, 3)))
    image = StoredImage(data, "a.tsv: line 2")
    np.testing.assert_array_equal(image(), np.full((2, 3, 3), (1, 2, 3)))
    assert image == StoredImage(data, "a.tsv: line 3") and len({image, StoredImage(data, "b")}) == 1
    assert repr(image) == "StoredImage(where='a.tsv: line 2')"
    cut = StoredImage(data[:-30], "a.tsv: line 4")
    with pytest.raises(ImageError, match=r"^a\.tsv: line 4: not a readable image \("):
        cut()
    with pytest.raises(ImageError, match=r"^a\.tsv: line 5: not a readable image \("):
        StoredImage(b"text", "a.tsv: line 5")
