"""Base64 as people and programs send it: the URL standard's forgiving decoder, and the alphabet for URLs, too."""

from __future__ import annotations

import base64
import re
from urllib.parse import unquote_to_bytes

WHITE_SPACE = b"\t\n\f\r "
URL_SAFE = bytes.maketrans(b"-_", b"+/")
NOT_BASE64 = re.compile(rb"[^A-Za-z0-9+/]")


def decode_base64(text: str) -> bytes:
    r"""The bytes of a text.

    White space and missing padding are forgiven; "%2B" is "+", as in URLs.

    >>> decode_base64("aGk"), decode_base64("aG\nk="), decode_base64("-_-_"), decode_base64("%2B/%2b/")
    (b'hi', b'hi', b'\xfb\xff\xbf', b'\xfb\xff\xbf')

    Raises:
      ValueError: other characters, or one too many.
    """
    data = (unquote_to_bytes(text) if "%" in text else text.encode(errors="replace")).translate(URL_SAFE, WHITE_SPACE)
    data = data.rstrip(b"=")
    if other := NOT_BASE64.search(data):
        character = other[0].decode("latin-1")
        raise ValueError(f"not base64: {character!r} is its character {other.start() + 1}")
    if len(data) % 4 == 1:
        raise ValueError(f"not base64: {len(data)} characters are one too many, or it was cut")
    return base64.b64decode(data + b"=" * (-len(data) % 4))
