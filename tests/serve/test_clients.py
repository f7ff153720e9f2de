"""The clients that people use, against `emu-jax serve` with the model in the box, in a process of its own."""

import base64
import io
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator

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
shown = [{"role": "user", "content": parts}]
answer = litellm.completion(messages=shown, stop=[":"], n=2, logprobs=True, top_logprobs=2, max_tokens=9, **about)
stream = list(litellm.completion(messages=shown, max_tokens=4, stream=True, **about))
text = litellm.text_completion(prompt="a", max_tokens=3, **{**about, "model": "text-completion-openai/emu-mini"})
embedded = litellm.embedding(input=["a", url], **about)
drawn = litellm.image_generation(prompt="red apple", n=1, **about)
items = [{"type": "input_text", "text": "what is this?"}, {"type": "input_image", "image_url": url}]
response = litellm.responses(input=[{"role": "user", "content": items}], max_output_tokens=4, **about)
try:
    litellm.completion(messages=[{"role": "user", "content": "a"}], top_p=7, **about)
    error = ""
except litellm.BadRequestError as raised:
    error = str(raised)
print(json.dumps({
    "answers": [choice.message.content for choice in answer.choices],
    "tokens": [token.token for token in answer.choices[0].logprobs.content],
    "likeliest": [len(token.top_logprobs) for token in answer.choices[0].logprobs.content],
    "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in stream),
    "response": response.output[0].content[0].text, "text": text.choices[0].text,
    "embedded": [len(each["embedding"]) for each in embedded.data], "drawn": drawn.data[0].b64_json, "error": error,
}))
"""

LANGCHAIN = """
import json, sys
import openai
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
url, address = sys.stdin.read().split()
about = {"model": "emu-mini", "base_url": address + "/v1", "api_key": "none", "max_retries": 0, "timeout": 600}
chat = ChatOpenAI(max_tokens=9, stop=[":"], **about)
parts = [{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": url}}]
shown = [HumanMessage(parts)]
answer = chat.bind(logprobs=True, top_logprobs=2).invoke(shown)
standard = [{"type": "text", "text": "what is this?"},
            {"type": "image", "base64": url.partition(",")[2], "mime_type": "image/png"}]
several = ChatOpenAI(n=2, max_tokens=9, stop=[":"], **about).generate([shown]).generations[0]
pieces = list(ChatOpenAI(max_tokens=4, **about).stream(shown))
response = ChatOpenAI(max_tokens=4, use_responses_api=True, **about).invoke(shown)
try:
    chat.invoke("a", top_p=7)
    error = ""
except openai.BadRequestError as raised:
    error = raised.param
tokens = answer.response_metadata["logprobs"]["content"]
print(json.dumps({
    "answers": [answer.content, chat.invoke([HumanMessage(standard)]).content, *(each.text for each in several)],
    "tokens": [token["token"] for token in tokens], "likeliest": [len(token["top_logprobs"]) for token in tokens],
    "streamed": "".join(piece.content for piece in pieces), "usage": answer.usage_metadata["output_tokens"],
    "response": response.content[0]["text"], "error": error,
}))
"""


@pytest.fixture(scope="module")
def ask(mini, client, emoji) -> Callable[[str], dict]:
    """Runs a script in a process, for such a package replaces settings of the libraries that it imports."""
    url = "data:image/png;base64," + base64.b64encode(emoji).decode()
    parts = [{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": url}}]
    shown = {"model": "emu-mini", "messages": [{"role": "user", "content": parts}]}
    stopped = client.chat.completions.create(max_tokens=9, stop=[":"], **shown).choices[0].message.content
    short = client.chat.completions.create(max_tokens=4, **shown).choices[0].message.content
    assert stopped and short and ":" not in stopped

    def ask(script: str) -> dict:
        command = [sys.executable, "-c", script]
        environment = {**os.environ, "OPENAI_API_KEY": "none"}
        done = subprocess.run(
            command, input=f"{url} {mini.address}", capture_output=True, text=True, env=environment, timeout=900
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert set(found["answers"]) == {stopped}, "all are greedy"
        assert "".join(found["tokens"]).startswith(stopped), "the last one may have the stop string, too"
        assert set(found["likeliest"]) == {2}
        assert found["streamed"] == short
        assert found["response"].startswith(short), "LiteLLM asks for 16 tokens at least, whatever is wanted"
        return found

    return ask


def test_litellm(ask):
    pytest.importorskip("litellm")
    found = ask(LITELLM)
    assert len(found["answers"]) == 2
    assert len(set(found["embedded"])) == 1
    assert found["text"] and size(found["drawn"])
    assert "top_p=7" in found["error"]


def test_langchain(ask):
    pytest.importorskip("langchain_openai")
    found = ask(LANGCHAIN)
    assert len(found["answers"]) == 4
    assert (found["error"], found["usage"]) == ("top_p", len(found["tokens"]))


def test_openai_responses(client, emoji):
    """The answer's items are sent back, a drawing among them."""
    asked = [{"role": "user", "content": "draw a red apple"}]
    first = client.responses.create(model="emu-mini", input=asked)
    assert [item.type for item in first.output] == ["message", "image_generation_call"]
    assert size(first.output[1].result)
    again = [*asked, *first.output, {"role": "user", "content": "what is this?"}]
    assert client.responses.create(model="emu-mini", input=again, max_output_tokens=8).output_text


def test_it_is_healthy_afterwards(mini):
    with urllib.request.urlopen(mini.address + "/healthz", timeout=10) as answer:
        assert json.load(answer)["status"] == "ok"
