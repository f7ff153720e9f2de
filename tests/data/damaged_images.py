"""Small images in 32 variants of the formats that are read, and damage: bytes flipped, cut and spliced."""

import io
import random
import struct

import numpy as np
from PIL import Image

MAX_BYTES = 1 << 16
NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)


def exif(orientation: int = 6) -> bytes:
    """EXIF with an orientation, two numbers, a text and a place of the GPS."""
    tags = Image.Exif()
    tags[0x0112], tags[0x010F], tags[0x011A], tags[0x0128] = orientation, "maker", 72.5, 2
    tags.get_ifd(0x8825)[2] = (51.0, 30.0, 1.5)
    return tags.tobytes()


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.copy().save(buffer, kind, **options)  # saving leaves settings in an image
    return buffer.getvalue()


def variants() -> dict[str, bytes]:
    """Name -> a whole image of about 24 x 16 pixels; the name begins with the format."""
    smooth = np.add.outer(np.arange(16) * 9, np.arange(24) * 5)
    pixels = np.stack([smooth, smooth[::-1], smooth[:, ::-1]], axis=-1).astype(np.uint8)
    rgb, grey = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    clear = rgb.copy()
    clear.putalpha(grey)
    deep = Image.fromarray(smooth.astype(np.uint16) * 256)
    number, real = Image.fromarray(smooth.astype(np.int32)), Image.fromarray((smooth / 255).astype(np.float32))
    more = {"save_all": True, "append_images": [rgb.transpose(Image.Transpose.ROTATE_180), grey.convert("RGB")]}
    palette, cmyk, turned = rgb.convert("P"), rgb.convert("CMYK"), {"exif": exif()}
    return {
        "JPEG": encoded(rgb, "JPEG"),
        "JPEG progressive": encoded(rgb, "JPEG", progressive=True),
        "JPEG grey": encoded(grey, "JPEG"),
        "JPEG CMYK": encoded(cmyk, "JPEG"),
        "JPEG EXIF": encoded(rgb, "JPEG", icc_profile=bytes(200), **turned),
        "JPEG MPO": encoded(rgb, "MPO", **more),
        "PNG": encoded(rgb, "PNG"),
        "PNG alpha": encoded(clear, "PNG"),
        "PNG palette": encoded(palette, "PNG", transparency=3),
        "PNG 16 bits": encoded(deep, "PNG"),
        "PNG 1 bit": encoded(grey.convert("1"), "PNG"),
        "PNG EXIF": encoded(rgb, "PNG", icc_profile=bytes(200), **turned),
        "PNG animated": encoded(rgb, "PNG", **more),
        "WebP": encoded(rgb, "WEBP"),
        "WebP lossless": encoded(clear, "WEBP", lossless=True),
        "WebP EXIF": encoded(rgb, "WEBP", icc_profile=bytes(200), **turned),
        "WebP animated": encoded(rgb, "WEBP", **more),
        "GIF": encoded(palette, "GIF", transparency=3),
        "GIF animated": encoded(palette, "GIF", disposal=2, **more),
        "BMP": encoded(rgb, "BMP"),
        "BMP palette": encoded(palette, "BMP"),
        "TIFF": encoded(rgb, "TIFF"),
        "TIFF LZW": encoded(clear, "TIFF", compression="tiff_lzw"),
        "TIFF JPEG": encoded(rgb, "TIFF", compression="jpeg"),
        "TIFF EXIF": encoded(rgb, "TIFF", **turned),
        "TIFF deep": encoded(deep, "TIFF"),
        "TIFF float": encoded(real, "TIFF", compression="tiff_deflate"),
        "TIFF frames": encoded(number, "TIFF", save_all=True, append_images=[grey, rgb]),
        "AVIF": encoded(clear, "AVIF", speed=10, **turned),
        "AVIF animated": encoded(rgb, "AVIF", speed=10, **more),
        "PPM": encoded(rgb, "PPM"),
        "PPM plain": b"P3 4 2 99 " + b" ".join(b"%d" % value for value in range(24)),
    }


def damaged(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """`data` with one to four kinds of damage."""
    broken = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = _place(broken, rng)
        match rng.randrange(7):
            case 0:  # a bit
                broken[place : place + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in broken[place : place + 1])
            case 1:  # some bytes
                broken[place : place + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(9))
            case 2:  # a number of the file
                size, order = rng.choice((1, 2, 4)), rng.choice("<>")
                number = rng.choice(NUMBERS) & ((1 << 8 * size) - 1)
                broken[place : place + size] = struct.pack(order + {1: "B", 2: "H", 4: "I"}[size], number)
            case 3:  # the end
                del broken[_place(broken, rng) :]
            case 4:  # a piece
                del broken[place : place + rng.randrange(1, 40)]
            case 5:  # a piece twice
                piece = broken[place : place + rng.randrange(1, 200)]
                at = _place(broken, rng)
                broken[at:at] = piece
            case 6:  # the end of another file
                other = rng.choice(others)
                broken[place:] = other[_place(other, rng) :]
    return bytes(broken[:MAX_BYTES])


def _place(data: bytes | bytearray, rng: random.Random) -> int:
    """Any place, the first 200 bytes more often: headers stand there."""
    return rng.randrange(min(len(data), 200) + 1) if rng.random() < 0.5 else rng.randrange(len(data) + 1)
