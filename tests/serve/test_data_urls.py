"""Images in data URLs: whatever clients write is read; anything else is refused by what is wrong with it."""

import base64
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emu_jax.data.forgiving_base64 import decode_base64
from emu_jax.serve.data_urls import read_data_url
from emu_jax.serve.limits import LimitError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
FILE = io.BytesIO()
Image.fromarray(PIXELS).save(FILE, "PNG")
PNG = FILE.getvalue()
TEXT = base64.b64encode(PNG).decode()
LINES = base64.encodebytes(PNG).decode()


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{TEXT}",
        f"DATA:image/PNG;BASE64,{TEXT}",
        f"data:image/png;charset=utf-8;base64,{TEXT}",
        f"data:image/png; base64,{TEXT}",
        f"data:image/jpeg;base64,{TEXT}",
        f"data:application/octet-stream;base64,{TEXT}",
        f"data:;base64,{TEXT}",
        f" data:image/png;base64, {LINES}",
        f"data:image/png;base64,{LINES.replace(chr(10), chr(13) + chr(10))}",
        f"data:image/png;base64,{TEXT.rstrip('=')}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(PNG).decode()}",
        f"data:image/png;base64,{TEXT.replace('+', '%2B').replace('/', '%2f').replace('=', '%3D')}",
    ],
)
def test_what_clients_send(url):
    assert read_data_url(url, "url") == PNG


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://a/b.png", "url is an address (https:…), and no address is fetched; expected data:image/png;base64,"),
        ("file:///etc/passwd", "url is an address (file:…), and no address is fetched"),
        ("cat.png", "url is 'cat.png'…, no data URL"),
        (TEXT, f"url is {TEXT[:40]!r}…, no data URL"),
        ("", "url is ''…, no data URL"),
        ("data:image/png;base64", "url is a data URL without a comma and data"),
        ("data:image/svg+xml,%3Csvg/%3E", "url is a data URL without ;base64"),
        (f"data:video/mp4;base64,{TEXT}", "url is a data URL of 'video/mp4'; expected data:image/png"),
        (f"data:text/html;base64,{TEXT}", "url is a data URL of 'text/html'"),
        (f"data:image/png;base64,{TEXT[:9]}*{TEXT[9:]}", "url is not base64: '*' is its character 10"),
        (f"data:image/png;base64,{TEXT[:12]}=={TEXT[12:]}", "url is not base64: '=' is its character 13"),
        ("data:image/png;base64,AAAAA", "url is not base64: 5 characters are one too many, or it was cut"),
    ],
)
def test_what_is_wrong_is_said(url, said):
    with pytest.raises(LimitError) as raised:
        read_data_url(url, "url")
    assert said in str(raised.value)
    assert raised.value.parameter == "url"
    assert ("no address is fetched" in str(raised.value)) == ("address" in said)


@given(st.binary(max_size=30), st.lists(st.tuples(st.integers(0, 50), st.sampled_from(" \t\r\n\f")), max_size=5))
def test_white_space_and_missing_padding(data, spaces):
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        text = encode(data).decode()
        for place, space in spaces:
            text = text[:place] + space + text[place:]
        assert decode_base64(text) == decode_base64(text.replace("=", "")) == data
