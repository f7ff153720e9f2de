"""The API as an OpenAPI 3.1 document, which `GET /openapi.json` serves: every route, its body, answers and errors.

Bodies are the schemas of the requests' pydantic models, with the bounds of this server. A field that such a model does
not have is documented as it is treated: ignored, allowed where it asks for the default, or only null.
"""

from __future__ import annotations

from typing import Any

import pydantic

from emu_jax.generate.decoder import SEEDS
from emu_jax.generate.samplers import sampler_names
from emu_jax.serve.answer_schemas import ANSWERS, ERROR
from emu_jax.serve.continuous_batching import LIKELIEST
from emu_jax.serve.guard import FORMS
from emu_jax.serve.limits import Limits
from emu_jax.serve.openai_json import (
    IGNORED,
    NEUTRAL,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    ImageRequest,
)
from emu_jax.serve.responses import ResponseRequest
from emu_jax.serve.settings import MAX_STOP_CHARACTERS, MAX_STOPS

Schema = dict[str, Any]

SCHEMAS = "#/components/schemas/"
ERRORS = {
    400: "a field is wrong, too large or not supported (`error.param` names its place), or the context is too short",
    401: "no key, or a wrong one",
    403: "a page of another site, or without a key a Host that is not this machine",
    404: "a route or a model that is not served",
    405: "a method that the route does not have",
    408: "the head or the body of the request came too slowly",
    413: "the body is too large",
    414: "the address is too long",
    415: "the body is of another type",
    429: "the queue is full; try again after `Retry-After` seconds",
    500: "the model failed",
    503: "the server stops",
    504: "the request took too long",
}
ALWAYS = (401, 403, 408, 414)  # of every route
POSTED = (400, 404, 413, 415, 429, 500, 503, 504)

# path -> its summary, its request, and the name of its answer; with `stream`, the name of the answer's events
POSTS: dict[str, tuple[str, type[pydantic.BaseModel], str, str | None]] = {
    "/v1/chat/completions": ("Answer a conversation", ChatRequest, "ChatCompletion", "ChatCompletionChunk"),
    "/v1/responses": ("Answer a conversation, by the newer API", ResponseRequest, "Response", "ResponseEvent"),
    "/v1/completions": ("Continue texts", CompletionRequest, "Completion", "Completion"),
    "/v1/embeddings": ("Embed images, and the images that texts ask for", EmbeddingRequest, "EmbeddingList", None),
    "/v1/images/generations": ("Draw", ImageRequest, "ImageList", None),
    "/v1/images/edits": ("Draw what follows images and a prompt", ImageRequest, "ImageList", None),
    "/v1/images/variations": ("Draw what follows images", ImageRequest, "ImageList", None),
}
GETS = {
    "/v1/models": ("The model, as a list", "ModelList"),
    "/v1/models/{model}": ("The model", "Model"),
    "/healthz": ("Whether the engine works, how many requests run and wait", "Health"),
}


def document(name: str, limits: Limits, drawn_size: int | None) -> Schema:
    """The document of a server whose model is called `name` and draws images of `drawn_size` pixels, or none."""
    components: dict[str, Schema] = {"Error": ERROR, **ANSWERS}
    paths: dict[str, Schema] = {}
    for path, (summary, answer) in GETS.items():
        codes = (408, 414) if path == "/healthz" else (*ALWAYS, 404) if "{" in path else ALWAYS
        operation: Schema = {"summary": summary, "responses": {"200": _json(answer), **_errors(*codes)}}
        if "{" in path:
            operation["parameters"] = [
                {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}, "example": name}
            ]
        paths[path] = {"get": operation}
    paths["/healthz"]["get"]["responses"]["503"] = _json("Health", "the engine has failed")
    paths["/metrics"] = {
        "get": {
            "summary": "Counts and times, for Prometheus",
            "responses": {"200": _content("text/plain", {"type": "string"}), **_errors(*ALWAYS)},
        }
    }
    paths["/openapi.json"] = {
        "get": {
            "summary": "This document",
            "responses": {"200": _content("application/json", {"type": "object"}), **_errors(*ALWAYS)},
        }
    }
    for path, (summary, kind, answer, event) in POSTS.items():
        components[kind.__name__] = request_schema(kind, components, name, limits, drawn_size)
        bodies = {"application/json": {"schema": {"$ref": SCHEMAS + kind.__name__}}}
        if path in FORMS:
            bodies["multipart/form-data"] = {"schema": _form(components[kind.__name__])}
        found = _json(answer)
        if event is not None:
            found["content"]["text/event-stream"] = {"schema": _event(event)}
            found["description"] += f"; with `stream`, events whose data are each a {event}"
        paths[path] = {
            "post": {
                "summary": summary,
                "requestBody": {"required": True, "content": bodies},
                "responses": {"200": found, **_errors(*ALWAYS, *POSTED)},
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "emu_jax", "version": "1", "description": f"{name}, served for OpenAI's clients."},
        "security": [{}, {"key": []}],
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _content(kind: str, schema: Schema, description: str = "the answer") -> Schema:
    return {"description": description, "content": {kind: {"schema": schema}}}


def _json(name: str, description: str = "the answer") -> Schema:
    return _content("application/json", {"$ref": SCHEMAS + name}, description)


def _event(name: str) -> Schema:
    """A server-sent event; its data are JSON, but for the "[DONE]" that ends chunks."""
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"$ref": SCHEMAS + name}}
    end = {"type": "string", "const": "[DONE]"}
    events = [
        {"type": "object", "properties": {"event": {"type": "string"}, "data": each}, "required": ["data"]}
        for each in (end, data)
    ]
    return {"anyOf": events}


def _errors(*statuses: int) -> dict[str, Schema]:
    return {str(status): _json("Error", ERRORS[status]) for status in sorted(statuses)}


# ---------------------------------------------------------------- requests


def request_schema(
    kind: type[pydantic.BaseModel],
    components: dict[str, Schema],
    name: str,
    limits: Limits,
    drawn_size: int | None,
) -> Schema:
    """The schema of a request; those of its parts are added to `components`."""
    schema = kind.model_json_schema(ref_template=SCHEMAS + "{model}")
    for part, each in schema.pop("$defs", {}).items():
        components[part] = _plain(each)
    schema = _plain(schema)
    properties = schema["properties"]
    bounded = _bounds(limits, drawn_size)
    if issubclass(kind, ImageRequest):
        bounded |= {"n": {"minimum": 1, "maximum": limits.drawings}, "response_format": {"enum": ["b64_json"]}}
    for field, bounds in bounded.items():
        if field in properties:
            _bound(properties[field], bounds)
    properties["model"] = {"const": name} if "model" in schema.get("required", ()) else {"enum": [name, None]}
    for field, values in sorted(NEUTRAL.items()):
        properties.setdefault(field, {"enum": [*values, None], "description": "Only as what is done anyway."})
    for field in sorted(IGNORED):
        properties.setdefault(field, {"description": "Ignored."})
    return schema


def _plain(schema: Schema) -> Schema:
    """A schema without the titles that pydantic derives from names; a field that it does not have must be null."""
    schema.pop("title", None)
    for each in schema.get("properties", {}).values():
        each.pop("title", None)
    return {**schema, "additionalProperties": {"type": "null"}}


def _bounds(limits: Limits, drawn_size: int | None) -> dict[str, Schema]:
    """What a field's number, text or list has to keep to at this server."""
    size = f"{drawn_size}x{drawn_size}"
    return {
        "max_tokens": {"minimum": 1},
        "max_completion_tokens": {"minimum": 1},
        "max_output_tokens": {"minimum": 1},
        "temperature": {"minimum": 0, "maximum": 100},
        "top_p": {"minimum": 0, "maximum": 1},
        "top_k": {"minimum": -1, "maximum": 1_000_000},
        "min_length": {"minimum": 0, "maximum": limits.new_tokens},
        "seed": {"minimum": 0, "maximum": SEEDS - 1},
        "top_logprobs": {"minimum": 0, "maximum": LIKELIEST},
        "logprobs": {"minimum": 0, "maximum": LIKELIEST},
        "messages": {"minItems": 1, "maxItems": limits.messages},
        "stop": {"maxItems": MAX_STOPS, "maxLength": MAX_STOP_CHARACTERS},
        "steps": {"minimum": 1, "maximum": limits.steps},
        "guidance": {"minimum": -limits.guidance, "maximum": limits.guidance},
        "n": {"minimum": 1, "maximum": limits.choices},
        "size": {"enum": [size, "auto"]},
        "sampler": {"enum": list(sampler_names())},
    }


def _bound(schema: Schema, bounds: Schema) -> None:
    """Adds bounds to those of a field's types that they apply to."""
    kinds: dict[str, tuple[str, ...]] = {"minimum": ("integer", "number"), "maximum": ("integer", "number")}
    kinds |= {"minItems": ("array",), "maxItems": ("array",), "maxLength": ("string",), "enum": ("string",)}
    for each in [*schema.get("anyOf", []), schema]:
        for word, value in bounds.items():
            if each.get("type") in kinds[word]:
                each[word] = value


def _form(schema: Schema) -> Schema:
    """The same request as a form: its fields, and files named image or image[]."""
    files = {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}
    fields = {name: each for name, each in schema["properties"].items() if name != "images"}
    return {"type": "object", "properties": {"image": files, **fields}, "required": ["image"]}
