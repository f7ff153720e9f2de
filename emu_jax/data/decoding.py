"""The one opener of encoded images: bytes that nobody vouches for -> a PIL image, and its pixels, uint8 [H, W, 3].

    bytes ─ PIL.open(formats=FORMATS) ─ sizes checked ─ decoded ─ upright ─ 8 bits ─ on white ─ pixels
             │                             │               │
             └──── without metadata ◄──────┼── any error ──┘
                                           └─ ImageError: too_many_pixels

No other plugin of Pillow can be reached, such as the one that starts Ghostscript. What a library raises, and what it
says, depends on its version and even on addresses in memory: it becomes an `ImageError` with fixed words.
Metadata never decide whether an image can be read: what fails is tried once more without them.
"""

from __future__ import annotations

import importlib
import io
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import ExifTags
from PIL import Image as PIL
from PIL.TiffImagePlugin import TiffImageFile

from emu_jax.data.avif import coded_sizes
from emu_jax.errors import UserError

MAX_PIXELS = 50_000_000
READINGS = ("upright", "reference")  # how an opened image becomes pixels (`flatten`)

# What Pillow calls a format -> its plugin, and what people call it. ICO and ICNS hold icons, and Pillow decodes an ICO
# before its size can be seen; EPS runs a program; the others are rare, and their plugins little tested.
_FORMATS = {
    "JPEG": ("JpegImagePlugin", "JPEG"),
    "PNG": ("PngImagePlugin", "PNG"),
    "WEBP": ("WebPImagePlugin", "WebP"),
    "GIF": ("GifImagePlugin", "GIF"),
    "BMP": ("BmpImagePlugin", "BMP"),
    "TIFF": ("TiffImagePlugin", "TIFF"),
    "AVIF": ("AvifImagePlugin", "AVIF"),
    "PPM": ("PpmImagePlugin", "PPM"),  # also PGM, PBM, PFM
}
_EXPECTED = "expected a whole JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or PPM file"
# First bytes (after white space) -> what they are.
_OTHERS = (
    (rb"version https://git-lfs", "a pointer of Git LFS; `git lfs pull` fetches the image"),
    (rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!doctype svg[^>]*>\s*)?<svg", "an SVG drawing"),
    (rb"<(!doctype html|html|head|body)", "an HTML page"),
    (rb"%PDF", "a PDF document"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript program"),
    (rb".{4}ftyp(hei[cxms]|hev[cxms])", "a HEIC image"),
    (rb"\0\0\x01\0|icns", "a file of icons"),
)
_UPRIGHT = {
    2: PIL.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Transpose.ROTATE_180,
    4: PIL.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Transpose.TRANSPOSE,
    6: PIL.Transpose.ROTATE_270,
    7: PIL.Transpose.TRANSVERSE,
    8: PIL.Transpose.ROTATE_90,
}
_PNG = b"\x89PNG\r\n\x1a\n"
# Chunks of a PNG that pixels need; the others are texts, profiles and the like.
_PNG_CHUNKS = {b"tRNS", b"eXIf"}  # beside the critical ones, whose names begin with a capital
_APNG_CHUNKS = {b"acTL", b"fcTL", b"fdAT"}

Used = TypeVar("Used")


class ImageError(UserError):
    """An image that cannot be used.

    Attributes:
      reason: one word, or several joined by `_`.
      detail: what is wrong, without the image's name.
    """

    def __init__(self, reason: str, where: str, detail: str):
        super().__init__(f"{where}: {detail}")
        self.reason, self.where, self.detail = reason, where, detail

    def __reduce__(self):
        return ImageError, (self.reason, self.where, self.detail)


def _register() -> list[str]:
    """Imports the plugins of `_FORMATS`: a format without one would make Pillow import all that it has."""
    for plugin, _ in _FORMATS.values():
        try:
            importlib.import_module(f"PIL.{plugin}")
        except ImportError:  # AVIF came with Pillow 11.3
            continue
    return [name for name in _FORMATS if name in PIL.OPEN]


FORMATS = tuple(_register())  # as `PIL.Image.open` takes them


def ignore_warnings() -> None:
    """Ignores what Pillow warns about, odd metadata and sizes for which we have a limit, in the whole process.

    `warnings.catch_warnings` around each image would be narrower. Before Python 3.14 it changes the filters of all
    threads, and images are decoded in many: they could be left as they are inside of it, for good.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


ignore_warnings()


# ---------------------------------------------------------------- open


def use_image(
    source: bytes | BinaryIO, where: str, use: Callable[[PIL.Image], Used], *, animated: bool = False
) -> Used:
    """`use(image)` for an encoded image; its header alone is read and checked before, and `use` decodes it.

    A file that fails is used once more without its metadata, so `use` must not keep anything of the first time.

    Args:
      animated: whether `use` needs the other frames of an animation; otherwise their damage does not matter either.

    Raises:
      ImageError: it is too large, damaged or not an image; or `use` raises one.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        return _use(file, where, use)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise a dozen types for damaged bytes; all mean the same
        fault = error
    try:
        if (plain := without_metadata(file, animated)) is not None:
            return _use(io.BytesIO(plain), where, use)
    except (ImageError, MemoryError):
        raise
    except Exception:  # as above; the first fault is the one to report
        pass
    file.seek(0)
    raise unreadable(where, _what(file.read(1024))) from fault


def unreadable(where: str, what: str) -> ImageError:
    return ImageError("unreadable_image", where, f"not a readable image ({what}); {_EXPECTED}")


def _use(file: BinaryIO, where: str, use: Callable[[PIL.Image], Used]) -> Used:
    try:
        image = PIL.open(file, formats=FORMATS)
    except (PIL.DecompressionBombError, PIL.DecompressionBombWarning) as error:  # Pillow's own limit is checked first
        pixels = re.search(r"\d+ pixels", str(error))
        raise _too_many(where, pixels[0] if pixels else "too many pixels") from error
    with image:
        check_size(image, where)
        if image.format == "AVIF":
            file.seek(0)
            sizes = coded_sizes(file.read())
            for width, height in sizes:
                check_pixels(width, height, where)
            # An image, its transparency and a preview, or the tiles of a grid.
            check_pixels(1, sum(width * height for width, height in sizes) // 4, where)
        return use(image)


def check_size(image: PIL.Image, where: str) -> None:
    """Raises ImageError if decoding the current frame would need more than `MAX_PIXELS`."""
    sizes = [image.size]
    if isinstance(image, TiffImageFile):  # a whole tile is decoded, however small the image is
        sizes += [(_number(image, 322), _number(image, 323))]
    for width, height in sizes:
        check_pixels(width, height, where)


def check_pixels(width: int, height: int, where: str) -> None:
    """Raises ImageError for more than `MAX_PIXELS`."""
    if width * height > MAX_PIXELS:
        raise _too_many(where, f"{width} x {height} pixels")


def _number(image: TiffImageFile, tag: int) -> int:
    value = image.tag_v2.get(tag, 0)
    return value if isinstance(value, int) else 0  # Pillow refuses such a file


def _too_many(where: str, size: str) -> ImageError:
    detail = f"{size}; expected at most {MAX_PIXELS // 1_000_000} megapixels, scale it down"
    return ImageError("too_many_pixels", where, detail)


def _what(head: bytes) -> str:
    """What a file is that cannot be read as an image, by its first bytes."""
    if not head:
        return "it is empty"
    for name in FORMATS:
        _, accept = PIL.OPEN[name]
        if accept and accept(head[:16]):
            return f"{_FORMATS[name][1]}, but damaged, cut off or of an unknown kind"
    for pattern, name in _OTHERS:
        if re.match(rb"(\xef\xbb\xbf)?\s*" + pattern, head, re.IGNORECASE | re.DOTALL):
            return name
    return "its first bytes are those of no image"


# ---------------------------------------------------------------- metadata


def without_metadata(file: BinaryIO, animated: bool = False) -> bytes | None:
    """The file with what its pixels and their orientation need; None for formats that Pillow reads whatever they say.

    A PNG may hold texts that expand to gigabytes, which Pillow refuses by refusing the image.
    """
    file.seek(0)
    head = file.read(8)
    if not (head == _PNG or head.startswith(b"\xff\xd8\xff") or head[4:] == b"ftyp"):
        return None
    data = head + file.read()
    if head == _PNG:
        return _PNG + b"".join(_png_chunks(data, _PNG_CHUNKS | _APNG_CHUNKS if animated else _PNG_CHUNKS))
    if head[4:] != b"ftyp":
        return _plain_jpeg(data)
    # An AVIF's item of another type is ignored.
    return re.sub(rb"(infe(?:\x02\0\0.{5}|\x03\0\0.{7}))Exif", rb"\1free", data, flags=re.DOTALL)


def _png_chunks(data: bytes, kept: set[bytes]) -> Iterator[bytes]:
    position = len(_PNG)
    while position < len(data):
        length, name = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        end = position + 12 + length
        checksum = zlib.crc32(data[position + 4 : end - 4]).to_bytes(4, "big")
        # Damage of what is essential is left for the decoder to find.
        if name[:1].isupper() or (name in kept and data[end - 4 : end] == checksum):
            yield data[position:end]
        position = end


def _plain_jpeg(data: bytes) -> bytes:
    kept, position, orientation = [b"\xff\xd8"], 2, 1
    while data[position : position + 1] == b"\xff" and data[position + 1 : position + 2] not in (b"", b"\xda"):
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        marker, segment = data[position + 1], data[position:end]
        if segment[4:10] == b"Exif\0\0":
            orientation = max(orientation, exif_orientation(segment[4:]))
        # JFIF's and Adobe's tell how colours are stored, where they are whole.
        elif (marker in (0xE0, 0xEE) and len(segment) >= 16) or not 0xE0 <= marker <= 0xFE:
            kept.append(segment)
        position = end
    if orientation > 1:
        body = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0" + bytes([orientation]) + bytes(6)
        kept.insert(1, b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body)
    return b"".join([*kept, data[position:]])


def exif_orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, in EXIF whose other tags may be malformed; 1 where there is none.

    >>> exif_orientation(b"Exif\\0\\0II*\\0\\x08\\0\\0\\0\\x01\\0\\x12\\x01\\x03\\0\\x01\\0\\0\\0\\x06\\0\\0\\0")
    6
    """
    data = exif.removeprefix(b"Exif\0\0")
    if data[:2] not in (b"II", b"MM"):
        return 1

    def number(start: int, size: int) -> int:
        return int.from_bytes(data[start : start + size], "little" if data[:2] == b"II" else "big")

    first = number(4, 4) + 2
    for entry in range(first, min(first + 12 * number(first - 2, 2), len(data) - 9), 12):
        if (number(entry, 2), number(entry + 2, 2)) == (ExifTags.Base.Orientation, 3):  # of 16 bits
            value = number(entry + 8, 2)
            return value if value in _UPRIGHT else 1
    return 1


def orientation(image: PIL.Image) -> int:
    """The orientation, 1 to 8, that the metadata of a decoded image state; 1 where they cannot be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises struct.error, SyntaxError, TypeError and more for any malformed tag
        value = None
    if value is None:  # also where opening a JPEG has met malformed EXIF: Pillow then has none
        exif = image.info.get("exif")
        return exif_orientation(exif) if isinstance(exif, bytes) else 1
    return value if value in _UPRIGHT else 1


# ---------------------------------------------------------------- pixels


def flatten(image: PIL.Image, reading: str = "upright", where: str = "image") -> np.ndarray:
    """PIL image -> uint8 [H, W, 3], rotated by its EXIF tag, with transparency on white; the current frame.

    With reading="reference" it is what Pillow converts to RGB, as the reference and most evaluation code have it: not
    rotated, transparency dropped and the colours below it shown, 16 bits clipped.

    >>> glass = PIL.new("RGBA", (2, 1), (255, 0, 0, 0))
    >>> flatten(glass).tolist()
    [[[255, 255, 255], [255, 255, 255]]]

    Raises:
      ImageError: its values are of no known range (`eight_bits`).
    """
    if reading == "reference":
        return np.asarray(image.convert("RGB"))
    image.load()
    deep = _is_deep(image)
    upright = image.transpose(_UPRIGHT[turn]) if (turn := orientation(image)) != 1 else image
    if deep:
        grey = eight_bits(np.asarray(upright), where, bits=_bits(image))
        if (
            isinstance(image, TiffImageFile) and image.tag_v2.get(262) == 0
        ):  # white is 0, which Pillow undoes for 8 bits
            grey = 255 - grey
        return np.repeat(grey[..., None], 3, axis=2)
    if upright.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in upright.info:
        upright = upright.convert("RGBA")
        white = PIL.new("RGBA", upright.size, "white")
        upright = PIL.alpha_composite(white, upright)
    return np.asarray(upright.convert("RGB"))


def _is_deep(image: PIL.Image) -> bool:
    """Whether a pixel is one number of more than 8 bits, which Pillow would clip instead of scale."""
    return image.mode == "F" or image.mode.startswith("I")


def _bits(image: PIL.Image) -> int | None:
    """How many bits its values have by their definition; None where only the values tell."""
    if isinstance(image, TiffImageFile) and image.tag_v2.get(258) == (12,):
        return 12
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 16
    return None


DARKEST = 4096  # the least largest value of 16 bits, where nothing else says that values have so many


def eight_bits(values: np.ndarray, where: str, bits: int | None = None) -> np.ndarray:
    """Grey values of any type -> uint8.

    Args:
      bits: how many the values have, 12 or 16. With None their largest one tells: floats are up to 1, integers and
        other floats up to 255 or, from 4,096 on, up to 65,535. In between they may be of 12 bits or of any range: as 16
        bits they would be almost black.

    >>> [eight_bits(np.array(values), "x").tolist() for values in ([0.0, 0.5, 1.0], [0.0, 2.0], [0, 255], [0, 65535])]
    [[0, 128, 255], [0, 2], [0, 255], [0, 255]]

    Raises:
      ImageError: some are negative, greater than 65,535, or not finite; or the largest tells no range.
    """
    if bits is not None:
        return np.clip(values.astype(np.int64) >> (bits - 8), 0, 255).astype(np.uint8)
    least, most = values.min(), values.max()  # NaN if there is one
    for top in (1, 255, 65_535) if values.dtype.kind == "f" else (255, 65_535):
        if least >= 0 and most <= top and not (top == 65_535 and most < DARKEST):
            return values.astype(np.uint8) if top == 255 and values.dtype.kind != "f" else _scaled(values, top)
    raise ImageError(
        "unsupported_depth",
        where,
        f"grey values from {least:g} to {most:g}; expected 0 to 1, 0 to 255 or 0 to 65,535, scale them",
    )


def _scaled(values: np.ndarray, top: int) -> np.ndarray:
    if values.dtype.kind != "f":
        return (values >> 8).astype(np.uint8)
    return np.rint(values * np.float32(255 / top)).astype(np.uint8)
