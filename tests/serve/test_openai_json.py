"""Bodies of clients: shapes of a message's content, fields that ask for the default, errors about the right field."""

import pytest

from emu_jax.serve.encoded_prompt import Message
from emu_jax.serve.limits import LimitError, Limits
from emu_jax.serve.openai_json import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    ImageField,
    ImageRequest,
    to_messages,
)

LIMITS = Limits()
URL = "data:image/png;base64,AAAA"
ASKED = [{"role": "user", "content": "what is it?"}]


def read(messages: list, **fields) -> list:
    return ChatRequest.model_validate({"model": "a", "messages": messages, **fields}).read(LIMITS)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("a", ["a"]),
        ([], []),
        (["a", "b"], ["a", "b"]),
        ([{"type": "text", "text": "a"}], ["a"]),
        ([{"type": "input_text", "text": "a", "cache_control": {"type": "ephemeral"}}], ["a"]),
        ([{"type": "output_text", "text": "a", "annotations": []}], ["a"]),
        ([{"type": "image_url", "image_url": {"url": URL, "detail": "high"}}], ["image_url.url"]),
        ([{"type": "image_url", "image_url": URL}], ["image_url"]),
        ([{"type": "input_image", "image_url": URL, "detail": "auto", "file_id": None}], ["image_url"]),
    ],
)
def test_shapes_of_a_content(content, parts):
    expected = [ImageField(URL, f"messages[0].content[0].{p}") if p.startswith("image") else p for p in parts]
    assert read([{"role": "user", "content": content}]) == [("user", expected)]


@pytest.mark.parametrize(
    ("content", "where", "said"),
    [
        (None, "messages[0].content", "null; expected a text, or a list of parts"),
        (7, "messages[0].content", "a number; expected a text, or a list of parts"),
        ({"type": "text"}, "messages[0].content", "an object; expected a text, or a list of parts"),
        ([7], "messages[0].content[0]", "a number; expected an object such as"),
        ([{"text": "a"}], "messages[0].content[0].type", "null; expected text, input_text, image_url or input_image"),
        ([{"type": "input_audio"}], "messages[0].content[0].type", "'input_audio'; expected text"),
        ([{"type": ["text"]}], "messages[0].content[0].type", "a list; expected text"),
        (["a", {"type": "text"}], "messages[0].content[1].text", "null; expected a text"),
        ([{"type": "text", "text": 7}], "messages[0].content[0].text", "a number; expected a text"),
        ([{"type": "image_url"}], "messages[0].content[0].image_url", "null; expected a data URL"),
        ([{"type": "image_url", "image_url": {}}], "messages[0].content[0].image_url.url", "null; expected a data URL"),
        ([{"type": "input_image", "file_id": "f"}], "messages[0].content[0].file_id", "not supported here"),
        ([{"type": "text", "text": "a", "image": URL}], "messages[0].content[0].image", "not supported here"),
    ],
)
def test_contents_that_cannot_be_read(content, where, said):
    with pytest.raises(LimitError) as raised:
        read([{"role": "user", "content": content}])
    assert (raised.value.parameter, said in str(raised.value)) == (where, True), raised.value
    assert str(raised.value).startswith(where)


@pytest.mark.parametrize("message", [{"content": None}, {}, {"content": []}, {"content": ""}])
def test_an_assistant_may_have_said_nothing(message):
    history = [*ASKED, {"role": "assistant", "tool_calls": [], "refusal": None, **message}, *ASKED]
    assert to_messages(*zip(*read(history), strict=True))[1] == Message("assistant", ("",))


def test_images_of_our_answers_come_back():
    """A client sends the message that it got, and the model sees what it drew."""
    drawn = {"type": "image_url", "image_url": {"url": URL}, "seed": 3}
    answer = {"role": "assistant", "content": "here", "refusal": None, "images": [drawn]}
    images = ["here", ImageField(URL, "messages[1].images[0].image_url.url")]
    assert read([*ASKED, answer, *ASKED])[1] == ("assistant", images)
    with pytest.raises(LimitError, match=r"messages\[0\].tool_calls is not supported here"):
        read([{"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}])


@pytest.mark.parametrize(
    "fields",
    [
        {"modalities": ["text"]},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"logprobs": False, "top_logprobs": 0},
        {"logprobs": None, "top_logprobs": None},
        {"stop": ""},
        {"stop": []},
        {"stop": [""]},
        {"min_p": 0, "top_k": -1, "repetition_penalty": 1.0, "frequency_penalty": 0, "logit_bias": {}},
        {"n": 1, "stream": False, "stream_options": None, "response_format": {"type": "text"}},
        {"user": "a", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"stream": True, "stream_options": {"include_usage": None}},
    ],
    ids=str,
)
def test_fields_of_a_chat_that_ask_for_the_default(fields):
    body = ChatRequest.model_validate({"model": "a", "messages": ASKED, **fields})
    body.read(LIMITS)
    assert body.settings() == ChatRequest(model="a", messages=[]).settings()


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": False, "background": "auto", "output_format": "png", "quality": "auto", "partial_images": 0},
        {"response_format": "b64_json", "size": "auto", "n": None, "user": "a", "moderation": "auto"},
        {"size": "16x16", "style": "vivid", "output_compression": 100, "images": []},
    ],
    ids=str,
)
def test_fields_of_an_image_that_ask_for_the_default(fields):
    assert ImageRequest.model_validate({"prompt": "a", **fields}).read(LIMITS, 16) == []


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"min_p": 0.1}, "min_p"),
        ({"logit_bias": {"7": 1}}, "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stop": 7}, "stop"),
        ({"stop": ["a", None]}, "stop[1]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": float("nan")}, "top_p"),
        ({"seed": 2**32}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 10**400}, "temperature"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_by_name(fields, where):
    with pytest.raises(ValueError) as raised:
        read(ASKED, **fields)
    found = raised.value.parameter if isinstance(raised.value, LimitError) else raised.value.errors()[0]["loc"][0]
    assert found == where


def test_settings():
    def settings(**fields):
        return ChatRequest.model_validate({"model": "a", "messages": ASKED, **fields}).settings()

    found = settings(max_tokens=5, max_completion_tokens=7, stop=["\n", ""], logprobs=True, top_p=0, temperature=1.0)
    assert (found.max_new_tokens, found.stop, found.scored) == (7, ("\n",), True)
    assert (found.temperature, found.top_p) == (0.0, 1.0), "the likeliest token"
    assert settings(stop="end").stop == ("end",)
    assert [settings(seed=2**32 - 1).following(number).seed for number in (0, 1, 2)] == [2**32 - 1, 0, 1]


def test_seeds_of_several_images_wrap():
    body = ImageRequest.model_validate({"prompt": "a", "n": 3, "seed": 2**32 - 1})
    body.read(LIMITS, 16)
    assert [each.seed for each in body.settings()] == [2**32 - 1, 0, 1]


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused_by_its_number(seed):
    body = ImageRequest.model_validate({"prompt": "a", "n": 2, "seed": seed})
    with pytest.raises(LimitError, match=f"^seed={seed}; expected 0 to 4294967295$"):
        for settings in body.settings():
            LIMITS.check("seed", settings.seed, 0, 2**32 - 1)


def test_prompts_of_completions():
    def prompts(prompt, **fields):
        return CompletionRequest.model_validate({"model": "a", "prompt": prompt, **fields}).read(LIMITS)

    assert prompts("a", echo=False, suffix="", best_of=1, logprobs=0) == [["a"]]
    assert prompts(["a", "b"], images=[URL]) == [[ImageField(URL, "images[0]"), text] for text in "ab"]
    for prompt, where in (([1, 2], "prompt[0]"), ([[1]], "prompt[0]"), (None, "prompt"), ([], "prompt")):
        with pytest.raises(LimitError) as raised:
            prompts(prompt)
        assert raised.value.parameter == where
    for fields in ({"echo": True}, {"best_of": 2}, {"suffix": "b"}, {"n": 65}, {"logprobs": 21}):
        with pytest.raises(LimitError) as raised:
            prompts("a", **fields)
        assert [raised.value.parameter] == list(fields)


def test_inputs_of_embeddings():
    def inputs(given):
        return EmbeddingRequest.model_validate({"model": "a", "input": given}).read(LIMITS)

    part = {"type": "image_url", "image_url": URL}
    image = ImageField(URL, "input[1].image_url")
    assert inputs("a") == [["a"]]
    assert inputs(["a", part, [part, "b"]]) == [["a"], [image], [ImageField(URL, "input[2][0].image_url"), "b"]]
    assert inputs(URL) == [[ImageField(URL, "input")]]
    for given, where in (([1], "input[0]"), ([], "input"), ("", "input"), (["a", []], "input[1]"), (7, "input")):
        with pytest.raises(LimitError) as raised:
            inputs(given)
        assert raised.value.parameter == where


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_options_of_a_stream(kind):
    body = {"model": "a", "messages": ASKED, "prompt": "a", "stream": True}
    del body["prompt" if kind is ChatRequest else "messages"]
    kind.model_validate({**body, "stream_options": {"include_usage": True, "include_obfuscation": False}}).read(LIMITS)
    with pytest.raises(LimitError) as raised:
        kind.model_validate({**body, "stream_options": {"include_all": True}}).read(LIMITS)
    assert raised.value.parameter == "stream_options.include_all"
