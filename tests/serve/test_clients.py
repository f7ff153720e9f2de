"""The clients that people use, against `emu-jax serve` with the model in the box, in a process of its own."""

import base64
import io
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import numpy as np
import openai
import pytest
from PIL import Image

from emu_jax.data import fluent_emoji
from tests.serve.conftest import Server

pytestmark = pytest.mark.slow
STEPS = {"steps": 3, "seed": 4294967295}


@pytest.fixture(scope="module")
def mini() -> Iterator[Server]:
    slots = ("--text-slots", "4", "--drawing-slots", "2")
    server = Server("--model", "emu-mini", "--no-page", *slots, "--seconds", "600", patience=1800)
    yield server
    assert server.stop() == 0, server.lines


@pytest.fixture(scope="module")
def client(mini) -> openai.OpenAI:
    return openai.OpenAI(base_url=mini.address + "/v1", api_key="none", max_retries=0, timeout=900)


@pytest.fixture(scope="module")
def emoji() -> bytes:
    """A held-out image as a PNG."""
    file = io.BytesIO()
    Image.fromarray(fluent_emoji.examples("heldout_combinations", 64)[0].pixels).save(file, "PNG")
    return file.getvalue()


def size(b64: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(b64))).size


def test_openai_chats(client, emoji):
    url = "data:application/octet-stream;base64," + base64.encodebytes(emoji).decode()
    question = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]},
        {"role": "user", "content": [{"type": "text", "text": "what is"}, {"type": "text", "text": "this?"}]},
    ]
    fields = {"modalities": ["text"], "tool_choice": "none", "stop": ["\n"], "max_tokens": 2048, "n": 2}
    answer = client.chat.completions.create(
        model="emu-mini", messages=question, logprobs=True, top_logprobs=2, **fields
    )
    first, second = answer.choices
    assert first.message.content == second.message.content != "", "both are greedy"
    assert first.finish_reason == "stop"
    assert "".join(token.token for token in first.logprobs.content) == first.message.content
    assert all(len(token.top_logprobs) == 2 for token in first.logprobs.content)
    history = [*question, first.message, {"role": "user", "content": "are you sure?"}]
    stream = client.chat.completions.create(model="emu-mini", messages=history, stream=True, max_tokens=5)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def test_openai_draws_and_sends_the_drawing_back(client):
    ask = [{"role": "user", "content": "draw a red apple"}]
    message = client.chat.completions.create(model="emu-mini", messages=ask).choices[0].message
    assert message.images, "emu-mini draws where it is asked to"
    again = [*ask, message, {"role": "user", "content": "what is this?"}]
    assert client.chat.completions.create(model="emu-mini", messages=again, max_tokens=8).choices


def test_openai_completes_and_embeds(client, emoji):
    done = client.completions.create(model="emu-mini", prompt=["</s>", "a"], max_tokens=3, logprobs=1, n=2)
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    url = "data:image/png;base64," + base64.b64encode(emoji).decode()
    image, text = client.embeddings.create(model="emu-mini", input=[url, "red apple"]).data
    assert len(image.embedding) == len(text.embedding) == np.prod(image.shape)
    floats = client.embeddings.create(model="emu-mini", input=url, encoding_format="float").data[0]
    np.testing.assert_allclose(image.embedding, floats.embedding, atol=1e-6)


def test_openai_edits_images(client, emoji):
    drawn = client.images.generate(model="emu-mini", prompt="</s> [IMG] <image>", n=2, extra_body=STEPS)
    assert [each.seed for each in drawn.data] == [4294967295, 0]
    files = [("a.png", emoji), ("b.png", emoji)]
    edited = client.images.edit(model="emu-mini", image=files, prompt="in red", extra_body=STEPS)
    varied = client.images.create_variation(model="emu-mini", image=("a.png", emoji), n=2, extra_body=STEPS)
    sizes = {size(each.b64_json) for each in [*drawn.data, *edited.data, *varied.data]}
    assert len(sizes) == 1
    with pytest.raises(openai.BadRequestError, match="mask is a file, and is not supported here") as raised:
        client.images.edit(model="emu-mini", image=files, prompt="a", mask=("m.png", emoji))
    assert raised.value.param == "mask"


LITELLM = """
import json, os, sys
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm
litellm.telemetry = False
url, address = sys.stdin.read().split()
about = {"model": "openai/emu-mini", "api_base": address + "/v1", "api_key": "none"}
parts = [{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": url}}]
answer = litellm.completion(messages=[{"role": "user", "content": parts}], stop=["\\n"], n=1, max_tokens=9, **about)
stream = litellm.completion(messages=[{"role": "user", "content": "hi"}], max_tokens=4, stream=True, **about)
text = litellm.text_completion(prompt="a", max_tokens=3, **{**about, "model": "text-completion-openai/emu-mini"})
embedded = litellm.embedding(input=["a", url], **about)
drawn = litellm.image_generation(prompt="red apple", n=1, **about)
try:
    litellm.completion(messages=[{"role": "user", "content": "a"}], top_p=7, **about)
    error = ""
except litellm.BadRequestError as raised:
    error = str(raised)
print(json.dumps({
    "answer": answer.choices[0].message.content, "chunks": len(list(stream)), "text": text.choices[0].text,
    "embedded": [len(each["embedding"]) for each in embedded.data], "drawn": drawn.data[0].b64_json, "error": error,
}))
"""


def test_litellm(mini, client, emoji):
    """In a process: it replaces settings of the libraries that it imports."""
    pytest.importorskip("litellm")
    url = "data:image/png;base64," + base64.b64encode(emoji).decode()
    command = [sys.executable, "-c", LITELLM]
    environment = {**os.environ, "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        command, input=f"{url} {mini.address}", capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    parts = [{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": url}}]
    same = client.chat.completions.create(
        model="emu-mini", messages=[{"role": "user", "content": parts}], stop=["\n"], max_tokens=9
    )
    assert found["answer"] == same.choices[0].message.content
    assert found["chunks"] > 1
    assert len(set(found["embedded"])) == 1
    assert size(found["drawn"])
    assert "top_p=7" in found["error"]


def test_it_is_healthy_afterwards(mini):
    with urllib.request.urlopen(mini.address + "/healthz", timeout=10) as answer:
        assert json.load(answer)["status"] == "ok"
