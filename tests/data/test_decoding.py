"""The one opener: which formats are reached, what is refused and in which words, metadata, bit depths, sizes."""

import base64
import concurrent.futures
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, ImageFile, TiffImagePlugin
from PIL import Image as PIL

from emu_jax.data import decoding
from emu_jax.data.avif import coded_sizes
from emu_jax.data.decoding import FORMATS, ImageError, eight_bits
from emu_jax.data.images import EncodedImage, Recoding, decode_image, load_image, shape_of
from emu_jax.data.raw.image_files import data_address
from emu_jax.data.raw.readers.pairs import ImageText
from emu_jax.data.video import VideoError, read_frames
from emu_jax.serve.data_urls import read_data_url
from tests.data.damaged_images import damaged, encoded, exif, variants
from tests.data.decoded_anyhow import decode_anyhow

EXPECTED = "; expected a whole JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or PPM file"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
WHOLE = variants()


def refused(data: bytes, **settings) -> str:
    with pytest.raises(ImageError) as error:
        decode_image(data, "x", **settings)
    return str(error.value)


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("name", WHOLE)
def test_every_variant_is_read(name):
    pixels = decode_image(WHOLE[name], name)
    shapes = {"JPEG EXIF": (24, 16, 3), "PNG EXIF": (24, 16, 3), "WebP EXIF": (24, 16, 3), "TIFF EXIF": (24, 16, 3)}
    shapes |= {"AVIF": (24, 16, 3), "PPM plain": (2, 4, 3)}
    assert pixels.shape == shapes.get(name, (16, 24, 3))
    assert pixels.mean() > 20 and pixels.std() > 10, "not black"


def test_ghostscript_never_runs(tmp_path, monkeypatch):
    """With any format allowed, Pillow runs it; ours does not, whatever the bytes are called and wherever they are."""
    ran = tmp_path / "ran"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # what an earlier search has found
    subprocess.run(["gs"], check=True)
    assert ran.exists()
    ran.unlink()
    with pytest.raises(OSError), PIL.open(io.BytesIO(EPS)) as image:  # the program writes no image
        image.load()
    assert ran.exists(), "Pillow on its own runs it"
    ran.unlink()

    words = f"not a readable image (a PostScript program){EXPECTED}"
    named = tmp_path / "a.jpg"
    named.write_bytes(EPS)
    with pytest.raises(ImageError) as error:
        load_image(named)
    assert str(error.value) == f"{named}: {words}"
    address = "data:image/jpeg;base64," + base64.b64encode(EPS).decode()
    assert refused(read_data_url(address, "images[0]")) == f"x: {words}"
    assert refused(data_address(address)) == f"x: {words}"
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (("1.jpg", EPS), ("1.txt", b"a text")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    reader = ImageText()
    ((document,),) = ([*reader.read(shard)] for shard in reader.shards(str(tmp_path / "a.tar")))
    with pytest.raises(ImageError) as error:
        Recoding(64).recode(document.parts[0].data, "key#0")
    assert str(error.value) == f"key#0: {words}"
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["ICO", "ICNS", "TGA", "PCX", "SGI", "JPEG2000", "DDS", "IM", "MSP"])
def test_other_plugins_are_not_reached(kind):
    image = PIL.new("1" if kind == "MSP" else "RGB", (32, 32))
    known = "a file of icons" if kind in ("ICO", "ICNS") else "its first bytes are those of no image"
    assert refused(encoded(image, kind)) == f"x: not a readable image ({known}){EXPECTED}"


def test_the_list_is_what_errors_name():
    assert FORMATS == ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty"),
        (b"\0\1\2garbage", "its first bytes are those of no image"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS; `git lfs pull` fetches the image"),
        (b"\xef\xbb\xbf \n<!DOCTYPE html><html>", "an HTML page"),
        (b"<?xml version='1.0'?>\n<!-- a --><svg>", "an SVG drawing"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC image"),
        (b"%PDF-1.7", "a PDF document"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "JPEG, but damaged, cut off or of an unknown kind"),
        (b"\xff\xd8\xff", "JPEG, but damaged, cut off or of an unknown kind"),
        (WHOLE["JPEG"][:21], "JPEG, but damaged, cut off or of an unknown kind"),
        (WHOLE["PNG"][:-40], "PNG, but damaged, cut off or of an unknown kind"),
        (WHOLE["WebP"][:60], "WebP, but damaged, cut off or of an unknown kind"),
        (WHOLE["AVIF"][:-40], "AVIF, but damaged, cut off or of an unknown kind"),
        (WHOLE["TIFF"][:60], "TIFF, but damaged, cut off or of an unknown kind"),
        (b"GIF89a" + bytes(20), "GIF, but damaged, cut off or of an unknown kind"),
    ],
)  # fmt: skip
def test_words_are_fixed(data, words):
    expected = f"x: not a readable image ({words}){EXPECTED}"
    assert refused(data) == refused(data, reading="reference") == expected
    with pytest.raises(ImageError) as error:
        Recoding(64, min_side=1).recode(data, "x")
    assert str(error.value) == expected


@pytest.mark.parametrize(
    "raised", [SyntaxError, TypeError, struct.error, AttributeError, RuntimeError, NotImplementedError, IndexError,
               ValueError, OverflowError, zlib.error, KeyError, AssertionError, RecursionError, OSError]
)  # fmt: skip
def test_whatever_a_decoder_raises_has_the_same_words(monkeypatch, raised):
    def load(_):
        raise raised(f"{object()}")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert (
        refused(WHOLE["JPEG"])
        == f"x: not a readable image (JPEG, but damaged, cut off or of an unknown kind){EXPECTED}"
    )
    words = "image: not a readable image (its pixels cannot be decoded)" + EXPECTED
    with pytest.raises(ImageError) as error:
        load_image(PIL.open(io.BytesIO(WHOLE["JPEG"])))
    assert str(error.value) == words


def test_too_little_memory_is_no_fault_of_the_image(monkeypatch):
    def load(_):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(MemoryError):
        decode_image(WHOLE["JPEG"], "x")


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(ImageError("too_small", "a.png", "1 x 1 pixels")))
    assert (error.reason, error.detail, str(error)) == ("too_small", "1 x 1 pixels", "a.png: 1 x 1 pixels")


def test_a_damaged_jpeg_of_a_record():
    words = f"key: not a readable image (JPEG, but damaged, cut off or of an unknown kind){EXPECTED}"
    image = EncodedImage(WHOLE["JPEG"][:200], 8, "key")
    for read in (image, lambda: image.into(np.empty((8, 8, 3), np.uint8))):
        with pytest.raises(ImageError) as error:
            read()
        assert str(error.value) == words


# ---------------------------------------------------------------- metadata

# EXIF whose orientation (6, turned by 90 degrees) can be read or not -> whether it can.
_ENTRY = b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
MALFORMED = {
    b"II*\0": False,  # cut in the header
    b"XX*\0\x08\0\0\0\0\0\0\0": False,  # no byte order
    b"II*\0\x08\0\0\0\x01\0" + _ENTRY.replace(b"\x06", b"\x63"): False,  # an orientation of 99
    b"II*\0\x08\0\0\0\x02\0" + _ENTRY + b"\x28\x01\x02\0\x07\0\0\0\x26\0\0\0" + bytes(4) + b"inches\0": True,
    b"II*\0\x08\0\0\0\x02\0" + _ENTRY + b"\x1a\x01\x05\0\x01\0\0\0\xff\xff\xff\xff": True,  # a number behind the end
    b"II+\0\x08\0\0\0\x02\0" + _ENTRY: True,  # says BigTIFF, and is not
    b"MM\0*\0\0\0\x08\0\x09\x01\x12\0\x03\0\0\0\x01\0\x06\0\0": True,  # nine tags, of which one is there
}


def _with_exif(kind: str, body: bytes) -> bytes:
    """24 x 16 pixels with this EXIF, which no library would write."""
    if kind == "JPEG":
        segment = b"Exif\0\0" + body
        return b"\xff\xd8\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + WHOLE["JPEG"][2:]
    if kind == "PNG":
        return _with_chunk(b"eXIf", body)
    image = PIL.open(io.BytesIO(WHOLE["PNG"]))
    return encoded(image, "WEBP", exif=body)  # Pillow looks at it only where it must turn an image


def _with_chunk(name: bytes, body: bytes, checksum: int | None = None) -> bytes:
    """The PNG with a chunk behind its header."""
    data = WHOLE["PNG"]
    checksum = zlib.crc32(name + body) if checksum is None else checksum
    return data[:33] + struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum) + data[33:]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP"])
@pytest.mark.parametrize("body", MALFORMED)
def test_malformed_exif_costs_no_pixels(kind, body):
    got = decode_image(_with_exif(kind, body), "x")
    if MALFORMED[body]:
        got = np.rot90(got)
    if kind == "WebP":
        np.testing.assert_array_equal(got, decode_image(encoded(PIL.open(io.BytesIO(WHOLE["PNG"])), "WEBP"), "x"))
    else:
        np.testing.assert_array_equal(got, decode_image(WHOLE[kind], "x"))


def test_malformed_exif_of_an_avif():
    """The container states the orientation, too."""
    data = WHOLE["AVIF"]
    at = data.index(b"MM\0*", data.index(b"mdat"))
    got = decode_image(data[:at] + b"XX" + data[at + 2 :], "x")
    np.testing.assert_array_equal(got, decode_image(data, "x"))


@pytest.mark.parametrize("body", [b"\xff\xff\xff\xff", b"\0\0\0\0"])
def test_a_tiff_whose_places_of_metadata_are_wrong(body):
    data = WHOLE["TIFF EXIF"]
    at = data.index(struct.pack("<HHI", 0x8825, 4, 1)) + 8
    np.testing.assert_array_equal(decode_image(data[:at] + body + data[at + 4 :], "x"), decode_image(data, "x"))


@pytest.mark.parametrize(
    "data",
    [
        _with_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2_000_000))),
        _with_chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(2_000_000))),
        _with_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(1_200_000))),
        _with_chunk(b"iCCP", b"profile\0\0no zlib"),
        _with_chunk(b"tEXt", b"Comment\0a text", checksum=1),
        _with_chunk(b"tIME", b"", checksum=1),
        _with_chunk(b"pHYs", b"\0"),
        _with_chunk(b"gAMA", b""),
        _with_chunk(b"cHRM", b"\1\2\3"),
        _with_chunk(b"acTL", b"\0\0\0\2"),
    ],
    ids=lambda data: data[37:41].decode(),
)
def test_chunks_that_are_no_pixels_cost_none(data):
    for reading in ("upright", "reference"):
        got = decode_image(data, "x", reading=reading)
        np.testing.assert_array_equal(got, decode_image(WHOLE["PNG"], "x"))
    assert shape_of(data, "x") == (16, 24)


def test_a_large_text_leaves_the_orientation():
    chunk = b"Comment\0\0" + zlib.compress(bytes(2_000_000))
    text = struct.pack(">I", len(chunk)) + b"zTXt" + chunk + struct.pack(">I", zlib.crc32(b"zTXt" + chunk))
    data = WHOLE["PNG EXIF"]
    got = decode_image(data[:33] + text + data[33:], "x")
    np.testing.assert_array_equal(got, decode_image(data, "x"))
    assert got.shape == (24, 16, 3)


@pytest.mark.parametrize(
    "segment",
    [
        b"\xff\xed" + b"Photoshop 3.0\x008BIM\x04\x04",  # cut behind a resource's number
        b"\xff\xe0" + b"JFIF",
        b"\xff\xe2" + b"MPF\0II*\0\x08\0\0\0\x01\0\x01\xb0\4\0\1\0\0\0\2\0\0\0",
        b"\xff\xe2" + b"ICC_PROFILE\0",
        b"\xff\xee" + b"Adobe",
    ],
    ids=["Photoshop", "JFIF", "MPF", "ICC", "Adobe"],
)
def test_segments_that_are_no_pixels_cost_none(segment):
    piece = segment[:2] + struct.pack(">H", len(segment)) + segment[2:]
    for data in (WHOLE["JPEG"], _with_exif("JPEG", exif()[6:])):
        whole = decode_image(data, "x")
        data = data[:2] + piece + data[2:]
        np.testing.assert_array_equal(decode_image(data, "x"), whole)


# ---------------------------------------------------------------- bit depths

RAMP = np.array([[0, 64, 128, 255]])
DEPTHS = {
    "32-bit float, 0 to 1": (PIL.fromarray((RAMP / 255).astype(np.float32)), [0, 64, 128, 255]),
    "32-bit float, 0 to 255": (PIL.fromarray(RAMP.astype(np.float32)), [0, 64, 128, 255]),
    "32-bit float, 0 to 65,535": (PIL.fromarray((RAMP * 257).astype(np.float32)), [0, 64, 128, 255]),
    "32 bits, 0 to 255": (PIL.fromarray(RAMP.astype(np.int32)), [0, 64, 128, 255]),
    "32 bits, 0 to 65,535": (PIL.fromarray((RAMP * 257).astype(np.int32)), [0, 64, 128, 255]),
    "16 bits": (PIL.fromarray((RAMP * 257).astype(np.uint16)), [0, 64, 128, 255]),
    "16 bits, dark": (PIL.fromarray(RAMP.astype(np.uint16)), [0, 0, 0, 0]),
    "8 bits": (PIL.fromarray(RAMP.astype(np.uint8)), [0, 64, 128, 255]),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_deep_pixels_are_scaled(name):
    image, expected = DEPTHS[name]
    for got in (load_image(image), decode_image(encoded(image, "TIFF"), "x")):
        assert got.tolist() == [[[value] * 3 for value in expected]], name


def _tiff(bits: int, white: int, values: bytes, width: int) -> bytes:
    """A grey TIFF of one row; `white` is 0 where 0 is white, otherwise 1."""
    tags = [
        (256, width),
        (257, 1),
        (258, bits),
        (259, 1),
        (262, white),
        (273, 0),
        (277, 1),
        (278, 1),
        (279, len(values)),
    ]
    start = 8 + 2 + 12 * len(tags) + 4
    body = b"".join(struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + body + bytes(4) + values


def test_twelve_bits_and_white_that_is_0():
    """Pillow has 12 bits as they are, which would be nearly black, and does not invert 16 bits."""
    twelve = b"\x00\x0f\xff"  # 0 and 4095
    assert decode_image(_tiff(12, 1, twelve, 2), "x")[0, :, 0].tolist() == [0, 255]
    sixteen = struct.pack("<2H", 0, 65535)
    assert decode_image(_tiff(16, 1, sixteen, 2), "x")[0, :, 0].tolist() == [0, 255]
    assert decode_image(_tiff(16, 0, sixteen, 2), "x")[0, :, 0].tolist() == [255, 0]
    assert decode_image(_tiff(8, 0, b"\0\xff", 2), "x")[0, :, 0].tolist() == [255, 0]


def test_pgm_and_pfm():
    assert decode_image(b"P5 2 1 65535 \0\0\xff\xff", "x")[0, :, 0].tolist() == [0, 255]
    assert decode_image(b"P5 2 1 1023 \0\0\x03\xff", "x")[0, :, 0].tolist() == [0, 255]
    assert decode_image(b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 0, 0.5), "x")[0, :, 0].tolist() == [0, 128]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array([[-1.0, 1.0]], np.float32), "from -1 to 1"),
        (np.array([[0.0, 70_000.0]], np.float32), "from 0 to 70000"),
        (np.array([[0.0, np.nan]], np.float32), "from nan to nan"),
        (np.array([[0.0, np.inf]], np.float32), "from 0 to inf"),
        (np.array([[0.0, 1000.0]], np.float32), "from 0 to 1000"),
        (np.array([[0, 4095]], np.int32), "from 0 to 4095"),
        (np.array([[-5, 100]], np.int32), "from -5 to 100"),
        (np.array([[0, 1 << 30]], np.int32), "from 0 to 1.07374e+09"),
    ],
)
def test_values_of_no_known_range_are_refused(values, words):
    message = f"x: grey values {words}; expected 0 to 1, 0 to 255 or 0 to 65,535, scale them"
    assert refused(encoded(PIL.fromarray(values), "TIFF")) == message
    assert decode_image(encoded(PIL.fromarray(values), "TIFF"), "x", reading="reference").shape == (1, 2, 3)


@given(st.lists(st.integers(0, 65_535), min_size=1, max_size=20))
def test_depths_against_plain_python(values):
    top = 255 if max(values) <= 255 else 65_535
    if 255 < max(values) < 4096:
        for kind in (np.int32, np.float32):
            with pytest.raises(ImageError, match=f"grey values from .* to {max(values)}; expected 0 to 1"):
                eight_bits(np.array(values, kind), "x")
        return
    assert eight_bits(np.array(values), "x").tolist() == [value if top == 255 else value // 256 for value in values]
    real = eight_bits(np.array(values, np.float32), "x").astype(int)
    top = next(top for top in (1, 255, 65_535) if max(values) <= top)
    assert np.abs(real - [value * 255 / top for value in values]).max() <= 0.5 + 1e-3


# ---------------------------------------------------------------- sizes


def test_a_small_tiff_of_a_huge_tile():
    """A tile is decoded whole: 64 x 64 pixels of one that has 30,000 x 30,000 took 860 MB and five seconds."""
    tags = [
        (256, 64),
        (257, 64),
        (258, 8),
        (259, 8),
        (262, 1),
        (277, 1),
        (322, 30_000),
        (323, 30_000),
        (324, 200),
        (325, 9),
    ]
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    data = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + body + bytes(4) + bytes(100)
    assert refused(data) == "x: 30000 x 30000 pixels; expected at most 50 megapixels, scale it down"


def test_an_avif_that_holds_more_than_it_states(monkeypatch):
    """libavif decodes the frame before it compares sizes."""
    data = encoded(PIL.new("RGB", (400, 300)), "AVIF", speed=10)
    assert coded_sizes(data) == [(400, 300)]
    at = data.index(b"ispe") + 8
    data = data[:at] + struct.pack(">II", 64, 64) + data[at + 8 :]
    monkeypatch.setattr(decoding, "MAX_PIXELS", 400 * 300 - 1)
    with pytest.raises(ImageError, match=r"^x: 400 x 300 pixels; expected at most"):
        decode_image(data, "x")


@pytest.mark.parametrize(("width", "height"), [(1, 1), (16, 9), (255, 257), (1000, 3), (65, 4097)])
@pytest.mark.parametrize("options", [{}, {"save_all": True}])
def test_sizes_of_avifs(width, height, options):
    for mode, count in (("RGB", 1), ("RGBA", 2)):
        first, second = PIL.new(mode, (width, height)), PIL.new(mode, (width, height), "red")
        data = encoded(first, "AVIF", speed=10, **options, **({"append_images": [second]} if options else {}))
        # An animation has each also as an item.
        assert coded_sizes(data) == [(width, height)] * (2 * count if options else count)


@given(st.binary(max_size=200), st.integers(0, 600), st.integers(0, 255))
def test_sizes_of_damaged_avifs(piece, place, byte):
    whole = WHOLE["AVIF"]
    for data in (piece, whole[:place], whole[:place] + bytes([byte]) + whole[place + 1 :], whole[:place] + piece):
        try:
            assert all(width > 0 and height > 0 for width, height in coded_sizes(data))
        except ValueError as error:
            assert str(error) == "items overlap"


def test_a_gif_that_grows(monkeypatch):
    """A later frame may lie outside of the screen, and makes the image larger: its size counts before it is decoded."""
    frame = WHOLE["GIF"][WHOLE["GIF"].index(b",\0\0\0\0\x18\0\x10\0") :]
    data = WHOLE["GIF"][:-1] + b"," + struct.pack("<HH", 9_000, 9_000) + frame[5:]
    assert decode_image(data, "x").shape == (16, 24, 3), "the first frame is small"
    with pytest.raises(VideoError) as error:
        read_frames(data, 3)
    assert error.value.reason == "too_large" and "expected at most 50 megapixels" in str(error.value)


def test_words_about_animations():
    with pytest.raises(VideoError) as error:
        read_frames(b"GIF89a" + bytes(20))
    assert str(error.value) == "unreadable_video: not a whole animation"


# ---------------------------------------------------------------- damage


@given(st.sampled_from(sorted(WHOLE)), st.integers(0, 2**32))
@settings(max_examples=200)
def test_damage_gives_pixels_or_an_image_error(name, seed):
    decode_anyhow(damaged(WHOLE[name], random.Random(seed), list(WHOLE.values())))


@pytest.mark.slow
@given(st.sampled_from(sorted(WHOLE)), st.integers(0, 2**64))
@settings(max_examples=20_000)
def test_much_damage(name, seed):
    decode_anyhow(damaged(WHOLE[name], random.Random(seed), list(WHOLE.values())))


@given(st.sampled_from(sorted(WHOLE)), st.binary(max_size=64), st.floats(0, 1))
def test_any_bytes_in_an_image(name, piece, share):
    data = WHOLE[name]
    at = int(share * len(data))
    decode_anyhow(data[:at] + piece + data[at + len(piece) :])


def test_the_check_finds_what_it_is_for(monkeypatch):
    """It fails for the reader of the issue, which let exceptions of the decoder pass."""
    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "load", lambda _: 1 / 0)
    assert decode_anyhow(WHOLE["TIFF"]).refused
    monkeypatch.setattr(decoding, "use_image", lambda source, where, use: use(PIL.open(io.BytesIO(source))))
    monkeypatch.setattr("emu_jax.data.images.use_image", decoding.use_image)
    with pytest.raises(AssertionError, match="decode_image: ZeroDivisionError: division by zero"):
        decode_anyhow(WHOLE["TIFF"])


# ---------------------------------------------------------------- warnings

LARGE = b"BM" + struct.pack("<IIIIIIHH24x", 58, 0, 54, 40, 13_000, 13_000, 1, 24)  # Pillow warns, we refuse


def test_filters_of_warnings_are_left_alone_by_many_threads():
    before = warnings.filters, list(warnings.filters)
    images = [WHOLE["PNG"], LARGE, *(_with_exif("JPEG", body) for body in MALFORMED)] * 40
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        found = list(threads.map(_reason, images))
    assert found == ["", "too_many_pixels", *[""] * len(MALFORMED)] * 40
    assert warnings.filters is before[0] and warnings.filters == before[1]


def _reason(data: bytes) -> str:
    """Why an image is refused; "" for pixels."""
    try:
        decode_image(data, "x")
    except ImageError as error:
        return error.reason
    return ""


def test_pillows_warnings_are_neither_shown_nor_errors():
    code = f"""
from emu_jax.data.decoding import ImageError
from emu_jax.data.images import decode_image
try:
    decode_image({LARGE!r}, "x")
except ImageError as error:
    print(error)
"""
    for option in ("always", "error"):
        command = [sys.executable, "-W", f"{option}::RuntimeWarning", "-c", code]  # the kind of Pillow's
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == (
            "x: 13000 x 13000 pixels; expected at most 50 megapixels, scale it down\n",
            "",
        ), option
