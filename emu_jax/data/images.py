"""Images from bytes, files and arrays to uint8 [H, W, 3], and to the JPEG files of prepared records.

Whatever the bytes are, `decoding.py` opens them. If a codec can decode at a reduced scale and a small image is wanted,
it does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image as PIL

from emu_jax.data.decoding import ImageError, check_pixels, check_size, flatten, unreadable, use_image
from emu_jax.errors import UserError
from emu_jax.storage import Path, as_path

JPEG = b"\xff\xd8\xff"  # first bytes of a JPEG file
FITS = ("squash", "crop", "pad")  # how an image becomes square; the reference squashes


def read_file(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
      ImageError: there is none, or it may not be read.
    """
    try:
        return as_path(path).read_bytes()  # a process for input has no file systems yet
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ImageError("missing_image", f"{path}", "no such image file") from error
    except PermissionError as error:
        raise ImageError("missing_image", f"{path}", f"it may not be read ({error.strerror})") from error


def decode_image(
    data: bytes,
    where: str,
    *,
    at_least: int = 0,
    reading: str = "upright",
    check: Callable[[int, int, str], None] | None = None,
) -> np.ndarray:
    """Encoded bytes -> uint8 [H, W, 3]; `where` names the image in errors.

    Args:
      at_least: pixels that each side must keep: a large JPEG may be decoded at 1/2, 1/4 or 1/8 of its size. 0 decodes
        at full size.
      reading: one of `READINGS`.
      check: called with width, height and `where` before anything is decoded; what it raises must be an ImageError.

    Raises:
      ImageError: the data are too large, broken, or not an image.
    """

    def decoded(image: PIL.Image) -> np.ndarray:
        if check is not None:
            check(*image.size, where)
        if at_least:
            image.draft("RGB", (at_least, at_least))  # only JPEG supports it
        image.load()
        return flatten(image, reading, where)

    return use_image(data, where, decoded)


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
        check_size(image, "image")
        try:
            return flatten(image, reading)
        except (ImageError, MemoryError):
            raise
        except Exception as error:  # of a file that is decoded only now
            raise unreadable("image", "its pixels cannot be decoded") from error
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
        emu_jax.data.decoding.ImageError: icon.png: 16 x 16 pixels; expected 32 or more a side

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
            pixels = decode_image(image, where, at_least=2 * size, check=self._check_shape)
        pixels = square(pixels, self.fit)
        height, width = pixels.shape[:2]
        pixels = _resize(pixels, min(width, size), min(height, size))
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), self.quality, colorsubsampling="420")

    def _check_shape(self, width: int, height: int, where: str) -> None:
        if min(width, height) < self.min_side:
            detail = f"{width} x {height} pixels; expected {self.min_side} or more a side"
            raise ImageError("too_small", where, detail)
        if max(width, height) > self.max_aspect * min(width, height):
            detail = f"{width} x {height} pixels; expected at most {self.max_aspect:g} : 1"
            raise ImageError("extreme_aspect", where, detail)


def shape_of(data: bytes, where: str) -> tuple[int, int]:
    """Height and width in pixels of an encoded image, from its header; before a rotation by its EXIF tag.

    Raises:
      ImageError: it has none that can be read.
    """
    width, height = use_image(data, where, lambda image: image.size)
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
            height, width, *_ = simplejpeg.decode_jpeg_header(self.data)
            check_pixels(width, height, self.where)
            pixels = simplejpeg.decode_jpeg(self.data, "RGB", fastdct=True, min_height=self.size, min_width=self.size)
        except ImageError:
            raise
        except ValueError as error:
            raise self._broken() from error
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
            raise (error if isinstance(error, ImageError) else self._broken()) from error

    def _broken(self) -> ImageError:
        return unreadable(self.where, "JPEG, but damaged, cut off or of an unknown kind")


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """An image file in a cell of a table, decoded each time that it is called; two are equal if their bytes are.

    Attributes:
      data: the file's bytes.
      where: names the image in errors.
    """

    data: bytes = dataclasses.field(repr=False)
    where: str = dataclasses.field(compare=False)

    def __post_init__(self):
        shape_of(self.data, self.where)  # what is no image is refused before anything is computed

    def __call__(self) -> np.ndarray:
        """Decodes to uint8 [H, W, 3].

        Raises:
          ImageError: the file is broken.
        """
        return decode_image(self.data, self.where)
