"""Parts of a request: what is checked of an image before it is decoded."""

import base64

import pytest

from emu_jax.serve.limits import LimitError, Limits
from emu_jax.serve.parts import FileField, ImageField, _uploads

DATA = bytes(range(100))
TEXT = base64.b64encode(DATA).decode()


@pytest.mark.parametrize(
    "field",
    [
        ImageField(f"data:;base64,{TEXT}", "url"),
        ImageField("data:;base64," + TEXT.replace("A", "A\n"), "url"),  # white space is no byte
        FileField(DATA, "url"),
    ],
)
def test_the_size_is_of_the_bytes(field):
    (upload,) = _uploads([field], Limits(upload_bytes=len(DATA)))
    assert (upload.data, upload.where) == (DATA, "url")
    with pytest.raises(LimitError, match=r"^url has 0\.0 MB; expected at most"):
        _uploads([field], Limits(upload_bytes=len(DATA) - 1))
