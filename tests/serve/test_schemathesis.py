"""Requests that schemathesis makes of `GET /openapi.json`, valid and not: the server does what the document says."""

import json
import urllib.request

import pytest

from tests.serve.test_server import QUESTION, SHOWN

jsonschema = pytest.importorskip("jsonschema")
schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")
pytestmark = pytest.mark.slow

PATHS = {
    **{path: "GET" for path in ("/v1/models", "/v1/models/{model}", "/healthz", "/metrics", "/openapi.json")},
    **{f"/v1/{name}": "POST" for name in ("chat/completions", "responses", "completions", "embeddings")},
    **{f"/v1/images/{name}": "POST" for name in ("generations", "edits", "variations")},
}


@pytest.fixture(scope="module")
def page(served) -> dict:
    with urllib.request.urlopen(served.address + "/openapi.json", timeout=60) as answer:
        return json.load(answer)


def test_every_route_is_documented(page):
    assert {path: method.upper() for path, each in page["paths"].items() for method in each} == PATHS


DRAWING = {"prompt": "a bar", "steps": 1, "sampler": "ddim"}
WHOLE = [
    ("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 3, "n": 2, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {"messages": QUESTION}),
    ("/v1/responses", {"input": "a bar", "max_output_tokens": 3}),
    ("/v1/responses", {"input": [{"role": "user", "content": [SHOWN]}], "instructions": "be brief"}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 3, "logprobs": 2}),
    ("/v1/completions", {"prompt": "a", "images": [SHOWN]}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 3, "stream": True}),
    ("/v1/responses", {"input": "a bar", "max_output_tokens": 3, "stream": True}),
    ("/v1/embeddings", {"input": ["a", SHOWN, [SHOWN, "a"]]}),
    ("/v1/embeddings", {"input": "a", "encoding_format": "base64", "pooling": "mean"}),
    ("/v1/images/generations", {**DRAWING, "n": 2}),
    ("/v1/images/edits", {**DRAWING, "images": [SHOWN]}),
    ("/v1/images/variations", {"images": [SHOWN["image_url"]], "steps": 1}),
]


@pytest.mark.parametrize(("path", "body"), WHOLE)
def test_answers_are_as_documented(served, page, path, body):
    """Requests that the document allows, as it says of both."""
    body = {"model": "tiny", **body}
    allowed = page["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    jsonschema.Draft202012Validator({**page, **allowed}).validate(body)
    case = schemathesis.openapi.from_dict(page)[path]["POST"].Case(body=body, media_type="application/json")
    assert case.call_and_validate(base_url=served.address, timeout=120).status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_every_request_is_answered_as_documented(served, page, path):
    """Status, type and schema of every answer; what the document forbids is refused, other methods, too."""
    operation = schemathesis.openapi.from_dict(page)[path][PATHS[path]]
    modes = [schemathesis.GenerationMode.POSITIVE]
    if PATHS[path] == "POST":  # any name may be a model's, and there is nothing else that could be wrong
        modes.append(schemathesis.GenerationMode.NEGATIVE)
    # What it allows may be refused nevertheless: roles must alternate, images be images, and all fit the context.
    excluded = [schemathesis.checks.positive_data_acceptance]
    for mode in modes:

        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        @hypothesis.settings(max_examples=100, suppress_health_check=list(hypothesis.HealthCheck))
        def check(case):
            case.call_and_validate(base_url=served.address, excluded_checks=excluded, timeout=120)

        check()
