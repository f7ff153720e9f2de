"""VLMEvalKit's requests to a served `emu-mini`, as the page on harnesses configures it.

VLMEvalKit is on no package registry and requires torchvision, so its requests are replayed: bodies and headers are what
its classes send (commit e8e78f05 of its repository), and answers are read as they read them.

    GPT4V        vlmeval/api/gpt.py; the body was recorded from the class itself
    LMDeployAPI  vlmeval/api/lmdeploy.py and openai_sdk.py, which `run.py --base-url` uses; read from the source
"""

from __future__ import annotations

import base64
import io
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from emu_jax import Emu
from emu_jax.data.fluent_emoji import Example, examples
from tests.pages import blocks
from tests.serve.conftest import Server

pytestmark = pytest.mark.slow

PAGE = Path("docs/harnesses.md")
QUESTION = "what is this?"
SMALLEST = 100  # pixels: VLMEvalKit enlarges smaller images


@pytest.fixture(scope="module")
def box() -> Iterator[Server]:
    """`emu-jax serve`, as the page says, without its page."""
    server = Server("--no-page", patience=900.0)  # it compiles all programs of emu-mini
    yield server
    assert server.stop() == 0, server.lines


@pytest.fixture(scope="module")
def shown() -> list[Example]:
    return examples("heldout_combinations", 128)[:4]


@pytest.fixture(scope="module")
def emu() -> Emu:
    return Emu.load("emu-mini", tuned=True)


def jpeg(pixels: np.ndarray) -> bytes:
    """What VLMEvalKit's `encode_image_to_base64` sends, Pillow's default JPEG."""
    assert min(pixels.shape[:2]) >= SMALLEST
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def configured() -> dict[str, Any]:
    """The model of the page's configuration."""
    (text,) = (block.text for block in blocks(PAGE) if block.language == "json")
    (model,) = json.loads(text)["model"].values()
    assert model.pop("class") == "GPT4V"
    return model


def gpt4v(model: dict[str, Any], image: bytes, question: str) -> dict[str, Any]:
    """The body of `GPT4V.generate([image, question])`."""
    uri = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": uri, "detail": model.get("img_detail", "low")}},
        {"type": "text", "text": question},
    ]
    settings = {"temperature": model.get("temperature", 0), "max_tokens": model.get("max_tokens", 2048)}
    return {"model": model["model"], "messages": [{"role": "user", "content": content}], **settings}


def lmdeploy(model: dict[str, Any], image: bytes, question: str) -> dict[str, Any]:
    """The body of `LMDeployAPI.generate` as `run.py --base-url` makes it."""
    uri = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": question}]
    settings = {"n": 1, "max_tokens": 2**15, "temperature": 0.0}
    return {"model": model["model"], "messages": [{"role": "user", "content": content}], **settings}


def post(server: Server, model: dict[str, Any], body: dict[str, Any]) -> str:
    """The answer's raw text; the page's address, at this server's port."""
    address = model["api_base"].replace("http://127.0.0.1:7860", server.address)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {model['key']}"}
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert 200 <= answer.status < 300
        return answer.read().decode()


def whole(text: str) -> str:
    """As both classes read an answer."""
    return json.loads(text)["choices"][0]["message"]["content"].strip()


def streamed(text: str) -> str:
    """As both classes read a stream: its lines `data: …` up to [DONE]."""
    pieces = []
    for line in filter(None, map(str.strip, text.splitlines())):
        assert line.startswith("data:")
        if (data := line[5:].strip()) == "[DONE]":
            break
        for choice in json.loads(data)["choices"][:1]:
            pieces.append(choice["delta"].get("content") or "")
    return "".join(pieces).strip()


@pytest.mark.parametrize("make", [gpt4v, lmdeploy])
def test_the_answers_are_those_of_a_chat(make, box, shown, emu):
    model = configured()
    for example in shown:
        image = jpeg(example.pixels)
        expected = emu.chat().say([PIL.Image.open(io.BytesIO(image)), QUESTION]).text
        body = make(model, image, QUESTION)
        assert whole(post(box, model, body)) == expected
        assert streamed(post(box, model, {**body, "stream": True})) == expected
        assert example.role in expected, (example.caption, expected)


def test_two_images_between_texts(box, shown, emu):
    """As datasets with several images ask."""
    model = configured()
    images = [jpeg(example.pixels) for example in shown[:2]]
    first, second = (gpt4v(model, image, text) for image, text in zip(images, ("first", QUESTION), strict=True))
    first["messages"][0]["content"] += second["messages"][0]["content"]
    opened = [PIL.Image.open(io.BytesIO(image)) for image in images]
    expected = emu.chat().say([opened[0], "first", opened[1], QUESTION]).text
    assert whole(post(box, model, first)) == expected
