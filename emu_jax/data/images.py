"""Images from bytes, files and arrays to uint8 [H, W, 3], and to the JPEG files of prepared records.

The header is read before the pixels, and images of more than `MAX_PIXELS` are refused. If a codec can decode at a
reduced scale and a small image is wanted, it does.
"""

from __future__ import annotations

import dataclasses
import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image as PIL
from PIL import ImageOps

from emu_jax.errors import UserError
from emu_jax.storage import Path, as_path

MAX_PIXELS = 50_000_000
JPEG = b"\xff\xd8\xff"  # first bytes of a JPEG file
READINGS = ("upright", "reference")  # how an opened image becomes pixels (`flatten`)
FITS = ("squash", "crop", "pad")  # how an image becomes square; the reference squashes


class ImageError(UserError):
    """An image that cannot be used; `reason` is one word, or several joined by `_`."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def read_file(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
      ImageError: there is none, or it may not be read.
    """
    try:
        return as_path(path).read_bytes()  # a process for input has no file systems yet
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ImageError("missing_image", f"{path}: no such image file") from error
    except PermissionError as error:
        raise ImageError("missing_image", f"{path}: it may not be read ({error.strerror})") from error


def decode_image(data: bytes, where: str, *, at_least: int = 0, reading: str = "upright") -> np.ndarray:
    """Encoded bytes -> uint8 [H, W, 3]; `where` names the image in errors.

    Args:
      at_least: pixels that each side must keep: a large JPEG may be decoded at 1/2, 1/4 or 1/8 of its size. 0 decodes
        at full size.
      reading: one of `READINGS`.

    Raises:
      ImageError: the data are too large, broken, or not an image.
    """
    try:
        image = _open(data, where)
        if at_least:
            image.draft("RGB", (at_least, at_least))  # only JPEG supports it
        image.load()
        return flatten(image, reading)
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(
            "unreadable_image",
            f"{where}: not a readable image ({error}); expected a complete PNG, JPEG or WebP file",
        ) from error


def _open(data: bytes, where: str) -> PIL.Image:
    """Reads only the header."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.DecompressionBombWarning)  # our own limit is lower
            image = PIL.open(io.BytesIO(data))
    except PIL.DecompressionBombError as error:  # from Pillow's own limit, which is checked first
        raise ImageError(
            "too_many_pixels",
            f"{where}: {error.args[0].split(', ')[0]}; expected at most {MAX_PIXELS // 1_000_000} megapixels, "
            "scale it down",
        ) from error
    _check_size(image, where)
    return image


def _check_size(image: PIL.Image, where: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            "too_many_pixels",
            f"{where}: {width} x {height} pixels; expected at most {MAX_PIXELS // 1_000_000} megapixels, scale it down",
        )


def flatten(image: PIL.Image, reading: str = "upright") -> np.ndarray:
    """PIL image -> uint8 [H, W, 3], rotated by its EXIF tag, with transparency on white; the current frame.

    With reading="reference" it is what Pillow converts to RGB, as the reference and most evaluation code have it: not
    rotated, transparency dropped and the colours below it shown, 16 bits clipped.

    >>> glass = PIL.new("RGBA", (2, 1), (255, 0, 0, 0))
    >>> flatten(glass).tolist()
    [[[255, 255, 255], [255, 255, 255]]]
    """
    if reading == "reference":
        return np.asarray(image.convert("RGB"))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip instead of scale
        wide = np.asarray(image).astype(np.int64)
        return np.repeat(np.clip(wide >> 8, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PIL.new("RGBA", image.size, "white")
        image = PIL.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def load_image(image: PIL.Image | np.ndarray | Path, reading: str = "upright") -> np.ndarray:
    """A PIL image, a uint8 array [H, W, 3] or a file's path -> uint8 [H, W, 3].

    Args:
      reading: one of `READINGS`.

    Raises:
      ImageError: the file is missing or not a readable image.
      UserError: the array is of another shape or type.
    """
    if isinstance(image, Path):
        return decode_image(read_file(image), str(image), reading=reading)
    if isinstance(image, PIL.Image):
        _check_size(image, "image")
        return flatten(image, reading)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"image array: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    return image


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [size, size, 3], bicubic and without cropping, as the reference does.

    >>> resize(np.full((40, 60, 3), 7, np.uint8), 16).shape
    (16, 16, 3)
    """
    return _resize(pixels, size, size)


def square(pixels: np.ndarray, fit: str) -> np.ndarray:
    """uint8 [H, W, 3] -> its middle (crop), or all of it on white (pad), [S, S, 3]; as it is with squash.

    >>> wide = np.zeros((2, 4, 3), np.uint8)
    >>> [square(wide, fit).shape[:2] for fit in FITS]
    [(2, 4), (2, 2), (4, 4)]
    >>> square(wide, "pad")[:, 0, 0].tolist()
    [255, 0, 0, 255]

    Raises:
      UserError: `fit` is not in `FITS`.
    """
    if fit not in FITS:
        raise UserError(f"fit={fit}: unknown; choose one of {', '.join(FITS)}")
    height, width = pixels.shape[:2]
    if fit == "squash" or height == width:
        return pixels
    if fit == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return pixels[top : top + side, left : left + side]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    rest = ((top, side - height - top), (left, side - width - left), (0, 0))
    return np.pad(pixels, rest, constant_values=255)


def fitted(pixels: np.ndarray, size: int, fit: str) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [size, size, 3] (`square`, `resize`)."""
    return resize(square(pixels, fit), size)


def _resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(PIL.fromarray(pixels).resize((width, height), PIL.Resampling.BICUBIC))


@dataclasses.dataclass(frozen=True)
class Recoding:
    """How images are checked and stored, once for all training runs.

    Attributes:
      image_size: pixels of a side of the models' images.
      quality: quality of the JPEG files, 1 to 100.
      min_side: shortest side in pixels; smaller images are icons and rules.
      max_aspect: largest ratio of the longer to the shorter side; others would be distorted beyond recognition.
      fit: how they become square, one of `FITS`; squash, as the reference does, keeps what is smaller than `image_size`
        as it is.
    """

    image_size: int = 224
    quality: int = 90
    min_side: int = 32
    max_aspect: float = 4.0
    fit: str = "squash"

    def __post_init__(self):
        if self.fit not in FITS:
            raise UserError(f"fit={self.fit}: unknown; choose one of {', '.join(FITS)}")
        if self.image_size < 8 or not 1 <= self.quality <= 100 or self.min_side < 1 or self.max_aspect < 1:
            raise UserError(
                f"{self}; expected image_size of at least 8, quality of 1 to 100, min_side and max_aspect of at least 1"
            )

    def recode(self, image: bytes | np.ndarray, where: str) -> bytes:
        """An image file or uint8 [H, W, 3] -> a JPEG file of at most `image_size` x `image_size`.

        >>> stored = Recoding(image_size=64).recode(np.zeros((100, 80, 3), np.uint8), "black.png")
        >>> decode_image(stored, "black.png").shape
        (64, 64, 3)
        >>> Recoding().recode(np.zeros((16, 16, 3), np.uint8), "icon.png")
        Traceback (most recent call last):
        emu_jax.data.images.ImageError: icon.png: 16 x 16 pixels; expected 32 or more a side

        Raises:
          ImageError: the image is broken, too large, too small, or too long and narrow.
        """
        # Not slightly larger: decoding 256 pixels at 7/8 takes twice as long as decoding 224 at full scale.
        size = self.image_size
        if isinstance(image, np.ndarray):
            height, width = image.shape[:2]
            self._check_shape(width, height, where)
            pixels = image
        else:
            try:
                header = _open(image, where)
            except (OSError, SyntaxError, ValueError, EOFError):
                header = None  # decoding reports the fault
            if header is not None:
                self._check_shape(*header.size, where)
            pixels = decode_image(image, where, at_least=2 * size)
        pixels = square(pixels, self.fit)
        height, width = pixels.shape[:2]
        pixels = _resize(pixels, min(width, size), min(height, size))
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), self.quality, colorsubsampling="420")

    def _check_shape(self, width: int, height: int, where: str) -> None:
        if min(width, height) < self.min_side:
            raise ImageError(
                "too_small", f"{where}: {width} x {height} pixels; expected {self.min_side} or more a side"
            )
        if max(width, height) > self.max_aspect * min(width, height):
            raise ImageError(
                "extreme_aspect", f"{where}: {width} x {height} pixels; expected at most {self.max_aspect:g} : 1"
            )


def shape_of(data: bytes, where: str) -> tuple[int, int]:
    """Height and width in pixels of an encoded image, from its header; before a rotation by its EXIF tag.

    Raises:
      ImageError: it has none that can be read.
    """
    try:
        width, height = _open(data, where).size
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError("unreadable_image", f"{where}: not a readable image ({error})") from error
    return height, width


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """A file with an image, for a model that reads `size` x `size` pixels.

    Attributes:
      fit: how it becomes square, one of `FITS`.
    """

    path: Path
    size: int
    fit: str = "squash"

    def stored_shape(self) -> tuple[int, int]:
        """As in `EncodedImage`."""
        return shape_of(read_file(self.path), str(self.path))

    def __call__(self) -> np.ndarray:
        """Decodes to uint8 [size, size, 3].

        Raises:
          ImageError: there is no such file, or it is broken.
        """
        return fitted(load_image(self.path), self.size, self.fit)


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """An image file of a prepared record, for a model that reads `size` x `size` pixels.

    The format is recognised by the first bytes: `Recoding` writes JPEG, the embedded set is WebP.

    Attributes:
      where: names the image in errors.
      fit: how it becomes square, one of `FITS`.
    """

    data: bytes
    size: int
    where: str
    fit: str = "squash"

    def stored_shape(self) -> tuple[int, int]:
        """Height and width in pixels of what is stored, from its header.

        Raises:
          ImageError: the file is broken.
        """
        return shape_of(self.data, self.where)

    def __call__(self) -> np.ndarray:
        """Decodes to uint8 [size, size, 3]; a JPEG is decoded at the smallest scale k/8 that is large enough.

        Raises:
          ImageError: the file is broken.
        """
        if not self.data.startswith(JPEG):
            return fitted(decode_image(self.data, self.where), self.size, self.fit)
        try:
            pixels = simplejpeg.decode_jpeg(self.data, "RGB", fastdct=True, min_height=self.size, min_width=self.size)
        except ValueError as error:
            raise self._broken(error) from error
        return fitted(pixels, self.size, self.fit)

    def into(self, out: np.ndarray) -> None:
        """Decodes into a contiguous uint8 [size, size, 3]; mapping the pages of a new array would double the time.

        Raises:
          ImageError: the file is broken; `out` is then black.
        """
        try:
            if self.data.startswith(JPEG):
                height, width, *_ = simplejpeg.decode_jpeg_header(self.data)
                if (height, width) == (self.size, self.size):
                    simplejpeg.decode_jpeg(self.data, "RGB", fastdct=True, buffer=out)
                    return
            out[...] = self()
        except ValueError as error:
            out[...] = 0
            raise (error if isinstance(error, ImageError) else self._broken(error)) from error

    def _broken(self, error: ValueError) -> ImageError:
        return ImageError("unreadable_image", f"{self.where}: not a readable JPEG file ({error})")
