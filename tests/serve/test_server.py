"""A real server process and real clients: the `openai` package, streams, errors, metrics, a client that leaves."""

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import select
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from emu_jax import Emu
from emu_jax.generate.chat import UNDRAWN
from emu_jax.serve.engine import Engine
from emu_jax.serve.server import Options, make_app
from tests.pages import blocks
from tests.serve.conftest import KEY, LIMITS, SLOTS, Server
from tests.train import tiny

CAT = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


def data_uri(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


SHOWN = {"type": "image_url", "image_url": {"url": data_uri(CAT)}}
# Without the paper's system message, which is longer than this model's context.
QUESTION = [
    {"role": "system", "content": ""},
    {"role": "user", "content": [SHOWN, {"type": "text", "text": "what is it?"}]},
]


def get(server: Server, path: str) -> tuple[int, str]:
    with urllib.request.urlopen(server.address + path, timeout=10) as answer:
        return answer.status, answer.read().decode()


@pytest.fixture(scope="module")
def client(served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.address + "/v1", api_key="none is asked for", max_retries=0, timeout=60)


@contextlib.contextmanager
def in_process(model: Emu, folder: Path) -> Iterator[Callable[[str], tuple[str, list[str], str | None]]]:
    """An application in this process: how OpenAI's client asks -> text, images and refusal of an answer."""
    engine = Engine(model, LIMITS)
    engine.start()
    app = make_app(engine, Options(checkpoint=Path("tiny"), page=False), folder)
    fields = {"model": "tiny", "extra_body": {"seed": 4}}
    question = [{"role": "user", "content": "a bar"}]

    async def ask(way: str) -> tuple[str, list[str], str | None]:
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app))
        client = openai.AsyncOpenAI(base_url="http://127.0.0.1/v1", api_key="none", http_client=http, max_retries=0)
        if way == "chat":
            answer = await client.chat.completions.create(messages=question, **fields)
            message = answer.choices[0].message
            images = [image["image_url"]["url"] for image in getattr(message, "images", [])]
            return message.content, images, message.refusal
        if way == "streamed chat":
            chunks = await client.chat.completions.create(messages=question, stream=True, **fields)
            deltas = [chunk.choices[0].delta async for chunk in chunks]
            images = [image["image_url"]["url"] for d in deltas for image in getattr(d, "images", None) or []]
            return "".join(d.content or "" for d in deltas), images, "".join(d.refusal or "" for d in deltas) or None
        response = await client.responses.create(input="a bar", **fields, stream=way == "streamed response")
        if way == "streamed response":
            response = [event async for event in response][-1].response
        images = [f"data:,{item.result}" for item in response.output if item.type == "image_generation_call"]
        refusals = [part.refusal for part in response.output[0].content if part.type == "refusal"]
        return response.output_text, images, refusals[0] if refusals else None

    try:
        yield lambda way: asyncio.run(ask(way))
    finally:
        engine.close(0)


WAYS = ("chat", "streamed chat", "response", "streamed response")


def test_an_answer_that_begins_an_image_has_the_image(model, tmp_path):
    """This model begins an image wherever it answers."""
    drawer = tiny.that_draws(model.merged())
    chat = drawer.chat("")
    chat.say("a bar")
    expected = np.asarray(chat.draw(seed=4).image, int)
    with in_process(drawer, tmp_path) as ask:
        for way in WAYS:
            text, images, refusal = ask(way)
            assert (text, len(images), refusal) == ("", 1, None), way
            drawn = Image.open(io.BytesIO(base64.b64decode(images[0].partition(",")[2])))
            np.testing.assert_allclose(np.asarray(drawn, int), expected, atol=1)


def test_without_a_decoder_the_answer_says_that_it_cannot_draw(instructed, tmp_path):
    with in_process(tiny.that_draws(Emu.load(instructed).merged()), tmp_path) as ask:
        assert [ask(way) for way in WAYS] == [("", [], UNDRAWN)] * 4


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "emu_jax"


def test_a_question_about_an_image(client, model):
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=12)
    expected = model.merged().chat("").say([CAT, "what is it?"], max_new_tokens=12)
    choice = answer.choices[0]
    assert choice.message.content == expected.text
    assert choice.finish_reason == ("stop" if len(expected.token_ids) < 12 else "length")
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_conversation_with_a_system_message(client, model):
    messages = [
        {"role": "developer", "content": "be brief"},
        *QUESTION[1:],
        {"role": "assistant", "content": "a bar"},
        {"role": "user", "content": "which colour?"},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=10)
    chat = model.merged().chat("be brief")
    chat.add([CAT, "what is it?"], "a bar")
    assert answer.choices[0].message.content == chat.say("which colour?", max_new_tokens=10).text


def test_a_stream(client):
    whole = client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=30, extra_body={"min_length": 99}
    )
    options = {"stream": True, "stream_options": {"include_usage": True}, "extra_body": {"min_length": 99}}
    chunks = list(client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=30, **options))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece or "" for piece in pieces) == whole.choices[0].message.content
    assert sum(bool(piece) for piece in pieces) > 2, "it came in pieces"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage


PARTS = [{"type": "input_image", "image_url": SHOWN["image_url"]["url"]}, {"type": "input_text", "text": "what is it?"}]


def test_responses(client, model):
    """What a chat answers; the whole conversation is sent back, as it came."""
    chat = model.merged().chat("be brief")
    fields = {"model": "tiny", "instructions": "be brief", "max_output_tokens": 12}
    asked = [{"role": "user", "content": PARTS}]
    first = client.responses.create(input=asked, **fields)
    expected = chat.say([CAT, "what is it?"], max_new_tokens=12)
    assert first.output_text == expected.text
    is_cut = len(expected.token_ids) == 12
    assert first.status == ("incomplete" if is_cut else "completed")
    assert (first.incomplete_details is not None) == is_cut
    assert first.usage.output_tokens == len(expected.token_ids)
    second = client.responses.create(input=[*asked, *first.output, {"role": "user", "content": "sure?"}], **fields)
    chat = model.merged().chat("be brief")
    chat.add([CAT, "what is it?"], first.output_text)  # as text: bytes that are no characters are not sent back
    assert second.output_text == chat.say("sure?", max_new_tokens=12).text
    word = client.responses.create(model="tiny", input="a red", max_output_tokens=3, temperature=0.0, top_p=0.5)
    assert word.output_text == model.merged().chat("").say("a red", max_new_tokens=3).text


def test_a_streamed_response(client):
    fields = {"model": "tiny", "input": "a red", "max_output_tokens": 20, "extra_body": {"min_length": 99}}
    whole = client.responses.create(**fields)
    with client.responses.stream(**fields) as stream:  # it accumulates, and checks the order of events
        events = list(stream)
    final = events[-1].response
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(pieces) > 2 and "".join(pieces) == whole.output_text == final.output_text
    assert [event.type for event in events if not event.type.endswith(".delta")] == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == sorted(event.sequence_number for event in events)
    assert final.usage == whole.usage and final.status == whole.status == "incomplete"


@pytest.mark.parametrize(
    ("change", "where", "said"),
    [
        ({"input": 7}, "input", "input is a number; expected a text, or a list of messages"),
        ({"input": []}, "input", "0 messages"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input[0].role", "'robot'; expected one of system"),
        ({"input": [{"type": "function_call_output"}]}, "input[0].type", "expected message or image_generation_call"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type", "input_file"),
        (
            {"input": [{"role": "user", "content": [{**PARTS[0], "image_url": "http://a/b"}]}]},
            "input[0].content[0].image_url",
            "no address is fetched",
        ),
        ({"input": [{"type": "image_generation_call", "result": "AAAA"}]}, "input[0].result", "not a readable image"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "is not supported here"),
        ({"tools": [{"type": "web_search"}]}, "tools", "is not supported here"),
        ({"max_output_tokens": 0}, "max_output_tokens", "expected 1 or more"),
        ({"input": "a red bar " * 50}, "input", "context of 128"),
    ],
)
def test_errors_of_responses(client, change, where, said):
    with pytest.raises(openai.BadRequestError, match=re.escape(said)) as raised:
        client.responses.create(**{"model": "tiny", "input": "a", **change})
    assert raised.value.param == where


def test_images(client, model):
    options = {"sampler": "ddim", "steps": 3, "guidance": 2.0, "seed": 5}
    drawn = client.images.generate(model="tiny", prompt="a red bar", n=2, size="16x16", extra_body=options)
    plain = model.without_adapters()
    for seed, data in zip((5, 6), drawn.data, strict=True):
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data.b64_json))), int)
        expected = plain.generate_image(["a red bar"], sampler="ddim", steps=3, guidance=2.0, seed=seed)
        np.testing.assert_allclose(image, np.asarray(expected.image, int), atol=1)
    blend = client.images.generate(prompt="", extra_body={**options, "images": [data_uri(CAT), data_uri(CAT[::-1])]})
    assert Image.open(io.BytesIO(base64.b64decode(blend.data[0].b64_json))).size == (16, 16)


def test_more_tokens_than_fit_end_by_length(client):
    """As evaluation harnesses ask: a maximum beyond the context, and beyond the server's limit."""
    for wanted in (1000, 10**9):
        answer = client.chat.completions.create(
            model="tiny", messages=QUESTION, max_tokens=wanted, extra_body={"min_length": 1000}
        )
        usage = answer.usage
        assert answer.choices[0].finish_reason == "length"
        assert usage.prompt_tokens + usage.completion_tokens == 128, usage


@pytest.mark.parametrize(
    ("change", "error", "code", "said"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "model_not_found", "there is 'tiny'"),
        ({"max_tokens": 0}, openai.BadRequestError, "invalid_value", "max_tokens=0; expected 1 or more"),
        (
            {"messages": [{"role": "user", "content": "a red bar " * 50}]},
            openai.BadRequestError,
            "context_length_exceeded",
            "context of 128",
        ),
        ({"messages": []}, openai.BadRequestError, "invalid_value", "0 messages"),
        ({"temperature": -1}, openai.BadRequestError, "invalid_value", "temperature=-1"),
        ({"temperature": "hot"}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"n": 65}, openai.BadRequestError, "invalid_value", "n=65; expected 1 to 64"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "invalid_value", "tools is not supported"),
        ({"messages": [{"role": "robot", "content": "a"}]}, openai.BadRequestError, "invalid_value", "role"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}
                ]
            },
            openai.BadRequestError,
            "invalid_value",
            "no address is fetched",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{**SHOWN, "image_url": {"url": "data:image/png;base64,AAAA"}}]}
                ]
            },
            openai.BadRequestError,
            "invalid_value",
            "not a readable image",
        ),
    ],
)
def test_errors(client, change, error, code, said):
    with pytest.raises(error, match=said) as raised:
        client.chat.completions.create(**{"model": "tiny", "messages": QUESTION, "max_tokens": 4, **change})
    assert raised.value.code == code


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": "1024x1024"}, "draws 16x16"),
        ({"n": 100}, "n=100; expected 1 to 4"),
        ({"response_format": "url"}, "expected b64_json"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"extra_body": {"steps": 10**9}}, "expected 1 to 200"),
        ({"extra_body": {"sampler": "../../x"}}, "unknown"),
    ],
)
def test_errors_of_images(client, change, said):
    with pytest.raises(openai.BadRequestError, match=said):
        client.images.generate(**{"model": "tiny", "prompt": "a bar", **change})


def test_what_is_not_there(client, served):
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.moderations.create(model="tiny", input="a")
    assert json.loads(get(served, "/healthz")[1])["status"] == "ok"


def test_the_pages_example(served, capsys):
    """The one in docs/serving.md, with this server's address, name and size of context."""
    (text,) = (block.text for block in blocks(Path("docs/serving.md")) if "from openai" in block.text)
    changes = {
        "http://127.0.0.1:7860": served.address,
        'model="emu-mini"': 'model="tiny"',
        'question = [{"role"': 'question = [{"role": "system", "content": ""}, {"role"',
        "stream=True": "stream=True, max_tokens=5",
    }
    for written, here in changes.items():
        assert written in text
        text = text.replace(written, here)
    lines = text.splitlines()
    assert lines[-1].startswith("base64.b64decode(")
    file = io.BytesIO()
    Image.fromarray(CAT).save(file, "PNG")
    found = {"png": file.getvalue()}
    exec("\n".join([*lines[:-1], f"drawn_png = {lines[-1]}"]), found)
    assert capsys.readouterr().out
    assert Image.open(io.BytesIO(found["drawn_png"])).size == (16, 16)


def test_a_client_that_leaves_frees_its_place(client, served):
    def running() -> dict:
        return json.loads(get(served, "/healthz")[1])

    def cancelled() -> float:
        lines = get(served, "/metrics")[1].splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("emu_cancelled_total"))

    before = cancelled()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).images.generate(prompt="a", n=4, extra_body={"steps": 200})
    end = time.monotonic() + 30
    while cancelled() == before and time.monotonic() < end:
        time.sleep(0.05)
    assert cancelled() > before
    assert not any(running()["running"].values()) and not any(running()["waiting"].values())
    assert client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=2).choices


def test_metrics(client, served):
    from prometheus_client.parser import text_string_to_metric_families

    client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=2)
    families = {family.name: family for family in text_string_to_metric_families(get(served, "/metrics")[1])}
    counted = {
        (sample.labels["route"], sample.labels["status"]): sample.value
        for sample in families["emu_requests"].samples
        if sample.name == "emu_requests_total"
    }
    assert counted["/v1/chat/completions", "200"] >= 1
    assert {"emu_texts", "emu_tokens", "emu_waiting", "emu_running", "emu_request_seconds"} <= set(families)


def test_a_key(instructed):
    server = Server("--checkpoint", str(instructed), "--no-page", "--host", "0.0.0.0", *SLOTS, key=KEY)
    server.address = server.address.replace("0.0.0.0", "127.0.0.1")
    try:
        base = {"base_url": server.address + "/v1", "max_retries": 0, "timeout": 60}
        assert [model.id for model in openai.OpenAI(api_key=KEY, **base).models.list()] == [instructed.name]
        with pytest.raises(openai.AuthenticationError, match="no key, or a wrong one") as raised:
            openai.OpenAI(api_key=KEY[:-1], **base).models.list()
        assert raised.value.code == "invalid_api_key"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(server, "/metrics")
        assert get(server, "/healthz")[0] == 200
        with pytest.raises(openai.BadRequestError, match="no visual decoder"):
            openai.OpenAI(api_key=KEY, **base).images.generate(prompt="a")
    finally:
        assert server.stop() == 0, server.lines


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host", "0.0.0.0"), "a key is needed"),
        (("--checkpoint", "nowhere"), "nowhere: no such file or folder"),
        (("--text-slots", "0"), "limit text_slots=0; expected more than 0"),
        (("--name", "../x y"), "name='../x y'; expected"),
        (("--port", "99999"), "port=99999; expected 0 to 65535"),
    ],
)
def test_what_cannot_be_started(arguments, said, tmp_path):
    command = [sys.executable, "-m", "emu_jax.cli", "serve", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert said in line


@pytest.mark.parametrize(
    "when, code, line",
    [("serving ", 130, "interrupted"), ("http://127.0.0.1:", 0, "")],
    ids=["it loads", "programs compile"],
)
def test_sigterm_at_the_start_leaves_nothing(instructed, tmp_path, when, code, line):
    command = [sys.executable, "-u", "-m", "emu_jax.cli", "serve", "--checkpoint", str(instructed), "--port", "0"]
    environment = os.environ | {"TMPDIR": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def folders() -> list[Path]:
        return [path for path in tmp_path.iterdir() if path.name.startswith("emu-jax-")]

    said = ""
    while when not in said or not folders():
        if when not in said:
            assert select.select([process.stdout], [], [], 120)[0], f"two minutes of silence after: {said}"
            said += process.stdout.readline()
        time.sleep(0.01)  # until the folder is there
        assert process.poll() is None, said
    process.terminate()
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == code, said + rest
    assert line in rest and "all programs are compiled" not in said + rest
    assert not folders()


def test_a_port_in_use(served, instructed, capsys):
    from emu_jax.cli import main

    assert main(["serve", "--checkpoint", str(instructed), "--port", str(served.port)]) == 2
    assert f"port={served.port}: cannot listen at 127.0.0.1" in capsys.readouterr().err


def test_other_pages_may_not_ask(served):
    for header in ("Host: evil.example", f"Host: 127.0.0.1:{served.port}\r\nOrigin: http://evil.example"):
        with socket.create_connection(("127.0.0.1", served.port), 10) as plug:
            plug.sendall(f"GET /v1/models HTTP/1.1\r\n{header}\r\n\r\n".encode())
            assert plug.recv(1000).startswith(b"HTTP/1.1 403")
