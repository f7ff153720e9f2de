"""The API over an engine in this process: what each route returns, and that no body whatever is answered by a 5xx."""

import asyncio
import base64
import copy
import io
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from emu_jax import Emu
from emu_jax.serve.engine import Engine
from emu_jax.serve.server import Options, make_app
from tests.serve.conftest import LIMITS
from tests.serve.test_encoded_prompt import SPELT

CAT, DOG = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
FAST = {"sampler": "ddim", "steps": 2, "guidance": 2.0}


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def data_url(image: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


SHOWN = {"type": "image_url", "image_url": {"url": data_url(CAT)}}
# Without the paper's system message, which is longer than this model's context.
QUESTION = [
    {"role": "system", "content": ""},
    {"role": "user", "content": [SHOWN, {"type": "text", "text": "what is it?"}]},
]


@pytest.fixture(scope="module")
def app(engine: Engine, tmp_path_factory):
    return make_app(engine, Options(checkpoint=Path("tiny"), page=False, limits=LIMITS), tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def post(app):
    """(path, JSON or a form's `data` and `files`) -> status and JSON, or the events of a stream."""

    def post(path: str, body: object = None, **form):
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=120) as client:
                return await client.post(path, **(form or {"json": body}))

        answer = asyncio.run(send())
        if answer.headers["content-type"].startswith("text/event-stream"):
            events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
            assert events[-1] == "[DONE]"
            return answer.status_code, [json.loads(event) for event in events[:-1]]
        return answer.status_code, answer.json()

    return post


def chat(post, **fields) -> dict:
    status, answer = post("/v1/chat/completions", {"model": "tiny", "messages": QUESTION, "max_tokens": 12, **fields})
    assert status == 200, answer
    return answer


def test_stop_strings(post):
    """The text ends before the first one, also in a stream, and says "stop"."""
    fields = {"min_length": 99, "temperature": 1.5, "seed": 3}
    whole = chat(post, **fields)["choices"][0]["message"]["content"]
    stop = whole[len(whole) // 2 :][:3]
    expected = whole[: whole.index(stop)]
    (choice,) = chat(post, **fields, stop=["never this", stop])["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")
    chunks = chat(post, **fields, stop=stop, stream=True)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chat(post, **fields, stop="")["choices"][0]["message"]["content"] == whole


def test_several_answers(post):
    """Those of consecutive seeds, the highest one's successor being 0."""
    fields = {"temperature": 1.5, "min_length": 99}
    last = 2**32 - 1
    alone = [chat(post, **fields, seed=seed) for seed in (last, 0)]
    both = chat(post, **fields, seed=last, n=2)
    expected = [answer["choices"][0]["message"]["content"] for answer in alone]
    assert [choice["message"]["content"] for choice in both["choices"]] == expected
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    assert both["usage"]["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]
    assert both["usage"]["completion_tokens"] == 24
    chunks = chat(post, **fields, seed=last, n=2, stream=True, stream_options={"include_usage": True})
    texts = ["", ""]
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == expected
    assert chunks[-1]["usage"] == both["usage"]


def joined(tokens: Iterable[str]) -> str:
    """Tokens as a text, to which special ones add nothing; this small model writes bytes that are no characters."""
    return re.sub(r"\\x[0-9a-f]{2}", "\ufffd", "".join(token for token in tokens if token not in ("<s>", "</s>")))


def byte_of(token: str) -> bytes:
    """The byte that a token such as "\\xe7" is."""
    return bytes.fromhex(token[2:]) if re.fullmatch(r"\\x[0-9a-f]{2}", token) else b""


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_log_probabilities_are_the_models_own(post, model, temperature):
    """They are those of scoring the answer after the prompt, whatever the temperature."""
    fields = {"prompt": "a red", "max_tokens": 5, "min_length": 99, "temperature": temperature, "logprobs": 3}
    status, answer = post("/v1/completions", {"model": "tiny", **fields})
    assert status == 200, answer
    (choice,) = answer["choices"]
    found = choice["logprobs"]
    assert joined(found["tokens"]) == choice["text"]
    assert found["text_offset"] == [0, *np.cumsum([len(token) for token in found["tokens"]]).tolist()[:-1]]
    plain = model.without_adapters()
    text = plain.generate_text([["a red"]], max_new_tokens=5, min_length=99, temperature=temperature)[0]
    assert len(found["token_logprobs"]) == len(text.token_ids) == 5
    for count in range(1, 6):  # candidates of ids, not of a text that may be encoded otherwise
        tokenizer = copy.copy(plain.tokenizer)
        tokenizer.encode = lambda text, *, add_bos, ids=text.token_ids[:count]: ids
        own = Emu(plain.config, plain.params, plain.statistics, tokenizer)
        scored = own.score_candidates(["a red"], ["its ids"])[0]
        assert sum(found["token_logprobs"][:count]) == pytest.approx(-scored, abs=1e-3)
    for log_p, top in zip(found["token_logprobs"], found["top_logprobs"], strict=True):
        assert len(top) == 3 and list(top.values()) == sorted(top.values(), reverse=True)
        if temperature == 0:
            assert max(top.values()) == log_p


def test_log_probabilities_of_a_chat(post):
    answer = chat(post, logprobs=True, top_logprobs=2, min_length=99)
    (choice,) = answer["choices"]
    tokens = choice["logprobs"]["content"]
    assert len(tokens) == 12 == answer["usage"]["completion_tokens"]
    assert joined(token["token"] for token in tokens) == choice["message"]["content"]
    assert all(bytes(token["bytes"]) in (token["token"].encode(), byte_of(token["token"])) for token in tokens)
    for token in tokens:
        assert token["logprob"] == token["top_logprobs"][0]["logprob"] >= token["top_logprobs"][1]["logprob"]
        assert token["logprob"] <= 0 and math.isfinite(token["logprob"])
    last = chat(post, logprobs=True, top_logprobs=2, min_length=99, stream=True)[-1]["choices"][0]
    assert last["logprobs"]["content"] == tokens
    assert chat(post, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert chat(post)["choices"][0]["logprobs"] is None


def test_completions(post, model):
    """Continued by the model without adapters; every prompt has `n` choices."""
    fields = {"model": "tiny", "max_tokens": 6, "temperature": 1.5, "n": 2, "seed": 4}
    status, answer = post("/v1/completions", {"prompt": ["a red", SPELT], **fields})
    assert (status, answer["object"]) == (200, "text_completion")
    plain = model.without_adapters()
    expected = [plain.generate_text([["a red"]], max_new_tokens=6, temperature=1.5, seed=s)[0].text for s in (4, 5)]
    assert [choice["text"] for choice in answer["choices"]][:2] == expected
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    status, chunks = post("/v1/completions", {"prompt": "a red", **fields, "n": 1, "stream": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected[0]
    caption = {"prompt": "", "images": [data_url(CAT)], "model": "tiny", "max_tokens": 6}
    status, answer = post("/v1/completions", caption)
    assert answer["choices"][0]["text"] == plain.generate_text([[CAT]], max_new_tokens=6)[0].text


def test_embeddings(post, model):
    """Of an image what the model sees, of a text the image that it imagines; by default all of an image's vectors."""
    plain = model.without_adapters()
    (seen,), (imagined,) = plain.encode_images(CAT[None]), plain.generate_embeddings([["a red bar"]])
    fields = {"model": "tiny", "input": [SHOWN, "a red bar", data_url(CAT)]}
    status, answer = post("/v1/embeddings", fields)
    assert status == 200, answer
    for found, expected in zip(answer["data"], (seen, imagined, seen), strict=True):
        assert found["shape"] == list(expected.shape)
        np.testing.assert_allclose(found["embedding"], expected.reshape(-1), atol=1e-4)
    status, answer = post("/v1/embeddings", {**fields, "encoding_format": "base64", "pooling": "mean"})
    for found, expected in zip(answer["data"], (seen, imagined, seen), strict=True):
        vector = np.frombuffer(base64.b64decode(found["embedding"]), "<f4")
        np.testing.assert_allclose(vector, expected.mean(0), atol=1e-4)


def drawn(answer: dict) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each["b64_json"]))), int) for each in answer["data"]]


def test_edits_and_variations(post, model):
    """Forms with images and a prompt: what is drawn follows the images, then the prompt."""
    files = [("image[]", ("a.png", png(CAT), "image/png")), ("image[]", ("b.png", png(DOG), "image/png"))]
    data = {"prompt": SPELT, "model": "tiny", "seed": "4294967295", "n": "2", "size": "16x16", "user": ""}
    status, answer = post("/v1/images/edits", data={**data, **FAST}, files=files)
    assert status == 200, answer
    assert [each["seed"] for each in answer["data"]] == [2**32 - 1, 0]
    same = {"images": [data_url(CAT), data_url(DOG)], "prompt": SPELT, "n": 2, "seed": 2**32 - 1, **FAST}
    for path in ("generations", "edits"):
        status, other = post(f"/v1/images/{path}", same)
        assert other["data"] == answer["data"]
    status, answer = post("/v1/images/variations", data=FAST, files={"image": ("a.png", png(CAT), "image/png")})
    assert status == 200, answer
    expected = model.without_adapters().generate_image([CAT], seed=0, **FAST)
    np.testing.assert_allclose(drawn(answer)[0], np.asarray(expected.image, int), atol=1)


@pytest.mark.parametrize(
    ("form", "where", "said"),
    [
        ({"files": {"prompt": (None, "a")}}, "image", "there is no image"),
        ({"files": {"image": ("a.png", b"x", "image/png")}}, "image[0]", "not a readable image"),
        ({"data": {"image": "http://a/b.png"}, "files": {"image": ("a", png(CAT))}}, "image[0]", "no address"),
        (
            {"files": {"image": ("a", png(CAT)), "mask": ("b", png(CAT))}},
            "mask",
            "mask is a file, and is not supported",
        ),
        ({"data": {"n": "many"}, "files": {"image": ("a", png(CAT))}}, "n", "n: Input should be a valid integer"),
        ({"data": {"steps": "201"}, "files": {"image": ("a", png(CAT))}}, "steps", "expected 1 to 200"),
        ({"data": {"sampler": "x"}, "files": {"image": ("a", png(CAT))}}, "sampler", "sampler='x' is unknown"),
        ({"files": [("image", ("a", png(CAT)))] * 33}, "image", "33 images; expected at most 32"),
        (
            {"content": b"no", "headers": {"content-type": "multipart/form-data; boundary=x"}},
            "body",
            "not multi",
        ),
        ({"content": b"", "headers": {"content-type": "multipart/form-data"}}, "body", "not multipart/form-data"),
    ],
)
def test_forms_that_cannot_be_read(post, form, where, said):
    status, answer = post("/v1/images/edits", **form)
    assert (status, answer["error"]["param"]) == (400, where), answer
    assert said in answer["error"]["message"]


def test_errors_name_the_place(post):
    def error(path: str, body: object) -> tuple:
        status, answer = post(path, body)
        assert status == 400, answer
        return answer["error"]["param"], answer["error"]["message"]

    long = "a red bar " * 50
    asked = {"model": "tiny", "messages": [{"role": "user", "content": long}]}
    assert error("/v1/chat/completions", asked)[0] == "messages"
    assert error("/v1/chat/completions", {"model": "tiny"}) == ("messages", "messages is missing")
    robot = {"model": "tiny", "messages": [{"role": "robot"}]}
    assert error("/v1/chat/completions", robot)[0] == "messages[0].role"
    assert error("/v1/completions", {"model": "tiny", "prompt": long})[0] == "prompt"
    assert error("/v1/completions", {"model": "tiny", "prompt": ""})[0] == "prompt"
    assert error("/v1/embeddings", {"model": "tiny", "input": long})[0] == "input"
    assert error("/v1/images/generations", {"prompt": long})[0] == "prompt"
    assert error("/v1/chat/completions", [])[1].startswith("the body: ")


# ---- any body --------------------------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=9)
ODD = st.sampled_from(
    ["", "a", "data:", "data:,", "data:;base64,AA", "http://a", data_url(CAT), "text", "user", "[IMG]", "\0", "\ud800"]
)
VALUES = st.recursive(
    SCALARS | ODD,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "image_url", "url", "role", "content", "a"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "input_text", "image_url", "input_image", "refusal"])},
    optional={"text": VALUES, "image_url": VALUES, "refusal": VALUES, "detail": VALUES},
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "developer", "tool"])},
        optional={"content": st.lists(PARTS | ODD, max_size=3) | VALUES, "images": VALUES, "name": VALUES},
    ),
    max_size=4,
)
ANY = ["n", "seed", "stop", "stream", "temperature", "top_p", "top_k", "min_p", "logprobs", "top_logprobs", "tools"]
ANY += ["response_format", "size", "steps", "sampler", "guidance", "images", "user", "stream_options", "best_of"]
ANY += ["min_length", "max_completion_tokens", "modalities", "tool_choice", "encoding_format", "pooling", "x"]
BODIES = {
    "/v1/chat/completions": ({"model": "tiny", "messages": QUESTION, "max_tokens": 1}, {"messages": MESSAGES | VALUES}),
    "/v1/completions": ({"model": "tiny", "prompt": "a", "max_tokens": 1}, {"prompt": VALUES}),
    "/v1/embeddings": ({"model": "tiny", "input": "a"}, {"input": VALUES | st.lists(PARTS, max_size=2)}),
    "/v1/images/generations": ({"prompt": "a", "steps": 1}, {"prompt": VALUES, "images": VALUES}),
    "/v1/images/edits": ({"images": [data_url(CAT)], "steps": 1}, {"prompt": VALUES, "images": VALUES}),
}


@st.composite
def bodies(draw) -> tuple[str, bytes]:
    """A route, and a body that is near what it takes."""
    path = draw(st.sampled_from(sorted(BODIES)))
    whole, own = BODIES[path]
    body = dict(whole)
    for name in draw(st.lists(st.sampled_from([*own, *own, *whole, *ANY]), max_size=3)):
        body[name] = draw(own.get(name, VALUES))
    if draw(st.booleans()) and body:
        body.pop(draw(st.sampled_from(sorted(body))), None)
    body.setdefault("steps" if "images" in path else "max_tokens", 1)
    text = json.dumps(body if draw(st.integers(0, 9)) else draw(VALUES))
    return path, text.encode() if draw(st.integers(0, 9)) else text.encode()[: draw(st.integers(0, 40))]


def check_body(app, path: str, body: bytes) -> None:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=120) as client:
            return await client.post(path, content=body, headers={"content-type": "application/json"})

    answer = asyncio.run(send())
    if answer.status_code // 100 == 2:
        return
    assert answer.status_code // 100 == 4, (path, body, answer.text)
    error = answer.json()["error"]
    assert error["message"] and "param" in error, error
    try:
        is_object = isinstance(json.loads(body), dict)
    except ValueError:
        is_object = False
    if is_object and answer.status_code == 400 and "not JSON" not in error["message"]:
        assert error["param"], (path, body, error)


@given(bodies())
@settings(max_examples=40)
def test_no_body_is_a_servers_error(app, body):
    check_body(app, *body)


@pytest.mark.slow
@given(bodies())
@settings(max_examples=2000)
def test_no_body_of_many_is_a_servers_error(app, body):
    check_body(app, *body)
