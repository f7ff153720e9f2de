"""Images in data URLs, read as browsers read them: forgiving base64, any case, a type that may be missing.

data:image/png;base64,iVBORw0…      DATA:;BASE64,iVBORw0…      data:application/octet-stream;base64,iVBO%0ARw0…
"""

from __future__ import annotations

import re

from emu_jax.data.forgiving_base64 import decode_base64
from emu_jax.serve.limits import LimitError

EXPECTED = "expected data:image/png;base64,… (or jpeg, webp, …)"
SCHEME = re.compile(r"\s*([a-z][a-z0-9+.-]*):", re.IGNORECASE)
DATA_URL = re.compile(r"\s*data:[^,]*;\s*base64\s*,", re.IGNORECASE)


def is_data_url(text: str) -> bool:
    """Whether a text is a data URL in base64, rather than words.

    >>> is_data_url("DATA:image/png;base64,iVBO"), is_data_url("data: the new oil, they say")
    (True, False)
    """
    return DATA_URL.match(text) is not None


def read_data_url(url: str, where: str) -> bytes:
    """An image's data URL -> its bytes, encoded as they are; `where` is the field that holds it.

    Raises:
      LimitError: no data URL (addresses are never fetched), another type than an image's, or not base64; the message
        says which.
    """
    scheme = SCHEME.match(url)
    if scheme is None or scheme[1].lower() != "data":
        if scheme is not None:
            raise LimitError(
                where, f"{where} is an address ({scheme[1][:20]}:…), and no address is fetched; {EXPECTED}"
            )
        raise LimitError(where, f"{where} is {url[:40]!r}…, no data URL; {EXPECTED}")
    head, comma, data = url.lstrip().partition(",")
    if not comma:
        raise LimitError(where, f"{where} is a data URL without a comma and data; {EXPECTED}")
    kind, *parameters = (part.strip().lower() for part in head[len("data:") :].split(";"))
    if not parameters or parameters[-1] != "base64":
        raise LimitError(where, f"{where} is a data URL without ;base64; {EXPECTED}")
    if kind and not kind.startswith("image/") and not kind.endswith("/octet-stream"):
        raise LimitError(where, f"{where} is a data URL of {kind[:100]!r}; {EXPECTED}")
    try:
        return decode_base64(data)
    except ValueError as error:
        raise LimitError(where, f"{where} is {error}") from error
