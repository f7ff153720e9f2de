"""Requests that schemathesis makes of the schemas of the API, valid and not: none is answered by a 5xx."""

import pytest

from emu_jax.serve.openai_json import ChatRequest, CompletionRequest, EmbeddingRequest, ImageRequest

schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")
pytestmark = pytest.mark.slow

BODIES = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/images/generations": ImageRequest,
    "/v1/images/edits": ImageRequest,
}


def operation(kind: type) -> dict:
    """An operation whose body the pydantic model of a request describes."""
    body = kind.model_json_schema(ref_template=f"#/components/schemas/{kind.__name__}-{{model}}")
    body.pop("$defs", None)
    content = {"application/json": {"schema": body}}
    answers = {status: {"description": "answered"} for status in ("200", "400", "404", "415", "429")}
    return {"post": {"requestBody": {"required": True, "content": content}, "responses": answers}}


def parts(kind: type) -> dict:
    whole = kind.model_json_schema(ref_template=f"#/components/schemas/{kind.__name__}-{{model}}")
    return {f"{kind.__name__}-{name}": part for name, part in whole.get("$defs", {}).items()}


PAGE = {
    "openapi": "3.1.0",
    "info": {"title": "emu_jax", "version": "1"},
    "paths": {path: operation(kind) for path, kind in BODIES.items()},
    "components": {"schemas": {name: part for kind in {*BODIES.values()} for name, part in parts(kind).items()}},
}


@pytest.mark.parametrize("path", BODIES)
def test_every_request_is_answered(served, path):
    asked = schemathesis.openapi.from_dict(PAGE)[path]["POST"]

    @hypothesis.given(case=asked.as_strategy())
    @hypothesis.settings(max_examples=100, suppress_health_check=list(hypothesis.HealthCheck))
    def check(case):
        answer = case.call(base_url=served.address)
        assert answer.status_code in (200, 400, 404, 415, 429), answer.text
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]

    check()
