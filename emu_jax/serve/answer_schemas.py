"""JSON schemas of the API's answers, for its OpenAPI document."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT, NUMBER, INTEGER, BOOLEAN = ({"type": kind} for kind in ("string", "number", "integer", "boolean"))
NULL: Schema = {"type": "null"}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def optional(schema: Schema) -> Schema:
    return {"anyOf": [schema, NULL]}


def record(optional: dict[str, Schema] | None = None, /, **fields: Schema) -> Schema:
    """An object with these fields, and perhaps the optional ones."""
    return {"type": "object", "properties": {**fields, **(optional or {})}, "required": list(fields)}


COUNTS = {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0}}
FINISH: Schema = {"enum": ["stop", "length"]}
USAGE = record(prompt_tokens=INTEGER, completion_tokens=INTEGER, total_tokens=INTEGER)
LIKELY = {"token": TEXT, "logprob": NUMBER, "bytes": array(INTEGER)}
TOKENS = record(content=array(record(**LIKELY, top_logprobs=array(record(**LIKELY)))), refusal=NULL)
SCORES = record(
    tokens=array(TEXT),
    token_logprobs=array(NUMBER),
    top_logprobs=array({"type": "object", "additionalProperties": NUMBER}),
    text_offset=array(INTEGER),
)
IMAGE_PART = record(type={"const": "image_url"}, image_url=record(url=TEXT), seed=INTEGER)
IMAGES: dict[str, Schema] = {"images": array(IMAGE_PART), "refusal": optional(TEXT)}
ABOUT: dict[str, Schema] = {"id": TEXT, "created": INTEGER, "model": TEXT}
OUTPUT: Schema = {
    "oneOf": [
        record(
            type={"const": "message"},
            id=TEXT,
            role={"const": "assistant"},
            status=TEXT,
            content=array(
                {
                    "oneOf": [
                        record(type={"const": "output_text"}, text=TEXT, annotations=array({})),
                        record(type={"const": "refusal"}, refusal=TEXT),
                    ]
                }
            ),
        ),
        record(type={"const": "image_generation_call"}, id=TEXT, status=TEXT, result=TEXT, seed=INTEGER),
    ]
}

ERROR = record(error=record(message=TEXT, type=TEXT, param=optional(TEXT), code=optional(TEXT)))
ANSWERS: dict[str, Schema] = {
    "Model": record(id=TEXT, object={"const": "model"}, created=INTEGER, owned_by=TEXT),
    "ModelList": record(object={"const": "list"}, data=array(ref("Model"))),
    "Health": record(status={"enum": ["ok", "broken"]}, waiting=COUNTS, running=COUNTS),
    "ChatCompletion": record(
        **ABOUT,
        object={"const": "chat.completion"},
        choices=array(
            record(
                index=INTEGER,
                message=record(IMAGES, role={"const": "assistant"}, content=TEXT),
                finish_reason=FINISH,
                logprobs=optional(TOKENS),
            )
        ),
        usage=USAGE,
    ),
    "ChatCompletionChunk": record(
        {"usage": USAGE},
        **ABOUT,
        object={"const": "chat.completion.chunk"},
        choices=array(
            record(
                index=INTEGER,
                delta=record({**IMAGES, "role": TEXT, "content": TEXT}),
                finish_reason=optional(FINISH),
                logprobs=optional(TOKENS),
            )
        ),
    ),
    "Completion": record(
        {"usage": USAGE},
        **ABOUT,
        object={"const": "text_completion"},
        choices=array(
            record(index=INTEGER, text=TEXT, finish_reason=optional(FINISH), logprobs=optional(SCORES)),
        ),
    ),
    "Response": record(
        id=TEXT,
        object={"const": "response"},
        created_at=INTEGER,
        status={"enum": ["in_progress", "completed", "incomplete"]},
        incomplete_details=optional(record(reason=TEXT)),
        instructions=optional(TEXT),
        max_output_tokens=optional(INTEGER),
        model=TEXT,
        output=array(OUTPUT),
        temperature=optional(NUMBER),
        top_p=optional(NUMBER),
        usage=optional(record(input_tokens=INTEGER, output_tokens=INTEGER, total_tokens=INTEGER)),
    ),
    "ResponseEvent": record({"response": ref("Response"), "delta": TEXT}, type=TEXT, sequence_number=INTEGER),
    "EmbeddingList": record(
        object={"const": "list"},
        data=array(
            record(
                object={"const": "embedding"},
                index=INTEGER,
                embedding={"anyOf": [array(NUMBER), TEXT]},
                shape=array(INTEGER),
            )
        ),
        model=TEXT,
        usage=record(prompt_tokens=INTEGER, total_tokens=INTEGER),
    ),
    "ImageList": record(created=INTEGER, data=array(record(b64_json=TEXT, seed=INTEGER))),
}
