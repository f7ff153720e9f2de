"""Chats: turns and images in their places, bad chats left out, files that break off."""

import base64
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.data.document import Text
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.data.raw.readers.chats import Chats
from emu_jax.data.system_messages import IMAGE_SYSTEM, VIDEO_SYSTEM
from emu_jax.errors import UserError
from tests.videos import grey_video


def _turns(*turns: tuple[str, str]) -> list[dict]:
    return [{"from": role, "value": value} for role, value in turns]


def _chat(*turns: tuple[str, str], **fields) -> dict:
    return {"id": "x", "conversations": _turns(*turns), **fields}


def _messages(*contents, role: str = "user", images: list | None = None, **fields) -> dict:
    """Messages of users with the contents, each but the last with an answer, and fields of the last answer."""
    pairs = [({"role": role, "content": each}, {"role": "assistant", "content": "b"}) for each in contents]
    pairs[-1][1].update(fields)
    return {"messages": [message for pair in pairs for message in pair]} | ({"images": images} if images else {})


def _read(path, **settings):
    reader = Chats(**settings)
    found = [item for shard in reader.shards(str(path)) for item in reader.read(shard)]
    return [f for f in found if isinstance(f, RawDocument)], [f for f in found if isinstance(f, Reject)]


def _parts(tmp_path, record, **settings):
    """The parts of the only chat."""
    (tmp_path / "t.json").write_text(json.dumps([record]))
    (document,), rejects = _read(tmp_path / "t.json", **settings)
    assert not rejects and document.kind == "chat" and document.key == "t.json/000000000"
    return list(document.parts)


# ---------------------------------------------------------------- what a chat becomes


def test_the_cauldron(tmp_path):
    """Questions and answers beside images, which come before the first question; from Parquet as it is published."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [{"user": "What?", "assistant": "Two cats.", "source": "vqav2"}]
    texts.append({"user": "Sure?", "assistant": "Yes.", "source": "vqav2"})
    images = [{"bytes": b"A", "path": None}, {"bytes": b"B", "path": None}]
    expected = [
        RawImage(b"A"),
        RawImage(b"B"),
        Text("What?", "user"),
        Text("Two cats.", "assistant"),
        Text("Sure?", "user"),
        Text("Yes.", "assistant"),
    ]
    pq.write_table(pa.Table.from_pylist([{"images": images, "texts": texts}]), tmp_path / "t.parquet")
    (document,), rejects = _read(tmp_path / "t.parquet", system=False)
    assert not rejects and list(document.parts) == expected
    texts[1]["user"] = "<image>Sure? <image>"  # where texts have marks, the images are there
    (tmp_path / "a.jpg").write_bytes(b"A")
    (tmp_path / "b.jpg").write_bytes(b"B")
    parts = _parts(tmp_path, {"images": ["a.jpg", "b.jpg"], "texts": texts}, system=False)
    assert parts == [*expected[2:4], expected[0], Text("Sure?", "user"), expected[1], Text("", "user"), expected[5]]


def test_llava(tmp_path):
    (tmp_path / "images" / "coco").mkdir(parents=True)
    (tmp_path / "images" / "coco" / "a.jpg").write_bytes(b"A")
    chat = _chat(
        ("human", "<image>\nWhat is it?"), ("gpt", "A cat."), ("human", "Sure?"), ("gpt", "Yes."), image="coco/a.jpg"
    )
    expected = [
        RawImage(b"A"),
        Text("What is it?", "user"),
        Text("A cat.", "assistant"),
        Text("Sure?", "user"),
        Text("Yes.", "assistant"),
    ]
    assert _parts(tmp_path, chat, images="images") == [Text(IMAGE_SYSTEM, "system"), *expected]
    assert _parts(tmp_path, chat, images="images", system=False) == expected


def test_images_stand_where_their_places_are(tmp_path):
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
    chat = _chat(
        ("system", "Be brief."),
        ("user", "Compare <image> and <image>"),
        ("assistant", "One is <image>"),
        image=["a", "b", "c"],
    )
    assert _parts(tmp_path, chat) == [
        Text("Be brief.", "system"),
        Text("Compare", "user"),
        RawImage(b"a"),
        Text("and", "user"),
        RawImage(b"b"),
        Text("", "user"),  # so b is the user's, not the answer's
        Text("One is", "assistant"),
        RawImage(b"c"),
        Text("", "assistant"),
    ]


def test_sharegpt_with_its_system_message(tmp_path):
    chat = _chat(("human", " Hi\0 "), ("gpt", "Hello\n\nthere"), system="Be kind.")
    assert _parts(tmp_path, chat) == [
        Text("Be kind.", "system"),
        Text("Hi", "user"),
        Text("Hello\n\nthere", "assistant"),
    ]


def test_alpaca(tmp_path):
    record = {"instruction": "Translate.", "input": "Hund", "output": "dog"}
    assert _parts(tmp_path, record) == [Text("Translate.\nHund", "user"), Text("dog", "assistant")]
    assert _parts(tmp_path, {**record, "input": ""})[0] == Text("Translate.", "user")


def test_alpaca_with_history_and_system_message(tmp_path):
    record = {"instruction": "And now?", "output": "c", "system": "Be brief.", "history": [["a?", "a"], ["b?", "b"]]}
    assert [f"{part.role}: {part.text}" for part in _parts(tmp_path, record)] == [
        "system: Be brief.",
        "user: a?",
        "assistant: a",
        "user: b?",
        "assistant: b",
        "user: And now?",
        "assistant: c",
    ]


@pytest.mark.parametrize("fields", [{"image": ""}, {"image": None}, {"images": []}, {"image": [""]}, {"tools": "[]"}])
def test_fields_that_say_nothing(tmp_path, fields):
    assert _parts(tmp_path, _chat(("human", "a"), ("gpt", "b"), **fields)) == [
        Text("a", "user"),
        Text("b", "assistant"),
    ]


def test_images_in_the_plural(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"A")
    chat = _chat(("human", "<image>What?"), ("gpt", "A cat."))
    for fields in ({"images": ["a.jpg"]}, {"images": "a.jpg"}, {"image": "a.jpg", "images": ["a.jpg"]}):
        assert RawImage(b"A") in _parts(tmp_path, chat | fields)


def test_answers_before_the_first_question_are_left_out_and_counted(tmp_path):
    chats = [
        _chat(("gpt", "Hello"), ("gpt", "Hi"), ("human", "a"), ("gpt", "b")),
        _chat(("system", "s"), ("gpt", "Hello"), ("human", "a"), ("gpt", "b")),
        _chat(("gpt", "Hello")),
        _chat(("gpt", "<image>"), ("human", "a"), ("gpt", "b"), image="a.jpg"),
    ]
    (tmp_path / "t.json").write_text(json.dumps(chats))
    documents, rejects = _read(tmp_path / "t.json")
    end = (Text("a", "user"), Text("b", "assistant"))
    assert [document.parts for document in documents] == [end, (Text("s", "system"), *end)]
    assert [(r.key.partition("/")[2], r.reason, r.whole, r.detail) for r in rejects] == [
        ("000000000#leading", "leading_answer", False, "2 answers before the first question"),
        ("000000001#leading", "leading_answer", False, "1 answers before the first question"),
        ("000000002", "no_answer", True, "the assistant has no turn after a question"),
        ("000000003", "leading_answer", True, "an answer before the first question shows an image"),
    ]


def test_html_that_speaks_of_videos_is_text(tmp_path):
    text = "Use the <video> tag, as in <video src='a.mp4'>."
    assert _parts(tmp_path, _chat(("human", "How?"), ("gpt", text)))[1] == Text(text, "assistant")


def test_openai_messages_with_parts(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    parts = [
        {"type": "text", "text": "What is"},
        {"type": "input_text", "text": " this? "},
        {"type": "image_url", "image_url": {"url": "a.jpg", "detail": "low"}},
        {"type": "input_image", "image_url": "data:;base64,Yg"},
        {"type": "image", "image": {"path": "a.jpg", "bytes": None}},
        {"type": "image", "text": None, "index": 0},
        "Well?",
    ]
    record = _messages(parts, images=["b.jpg"])
    record["messages"].insert(0, {"role": "developer", "content": "Be brief.", "tool_calls": None, "weight": None})
    shown = [RawImage(name) for name in (b"a", b"b", b"a", b"b")]
    assert _parts(tmp_path, record) == [
        Text("Be brief.", "system"),
        Text("What is\nthis?", "user"),
        *shown,
        Text("Well?", "user"),
        Text("b", "assistant"),
    ]


def test_columns_of_lists_are_turns(tmp_path):
    record = {"conversations": {"from": ["human", "gpt"], "value": ["a", "b"]}, "messages": None, "instruction": None}
    assert _parts(tmp_path, record) == [Text("a", "user"), Text("b", "assistant")]


@pytest.mark.parametrize("value", ["<video>\nWhat?", "What?\n<video>", "<image>\nWhat?"])
def test_a_chat_about_a_video(tmp_path, value):
    (tmp_path / "v").mkdir()
    grey_video(tmp_path / "v" / "a.mp4")
    for turns in ([("human", value)], [("system", "s"), ("human", value)]):
        record = _chat(*turns, ("gpt", "b"), ("human", "c"), ("gpt", "d"), video="a.mp4")
        (tmp_path / "t.json").write_text(json.dumps([record]))
        (document,), rejects = _read(tmp_path / "t.json", videos="v", frames=5)
        first, *frames = document.parts[:6]
        assert not rejects and document.kind == "video_chat"
        assert first == Text("s" if len(turns) > 1 else VIDEO_SYSTEM, "system")
        assert all(isinstance(frame, RawImage) and frame.data.shape == (32, 48, 3) for frame in frames)
        assert [part.text for part in document.parts[6:]] == ["What?", "b", "c", "d"]


def test_a_video_in_a_part(tmp_path):
    grey_video(tmp_path / "a.mp4")
    record = _messages([{"type": "video_url", "video_url": {"url": "a.mp4"}}, {"type": "text", "text": "What?"}])
    (tmp_path / "t.json").write_text(json.dumps([record]))
    (document,), _ = _read(tmp_path / "t.json", frames=3)
    assert document.kind == "video_chat" and len(document.parts) == 6


# ---------------------------------------------------------------- every form, against plain Python

WORDS = st.sampled_from(["a", "b c", "猫", "the <video> tag", "2 < 3", "image"])
IMAGES = st.integers(0, 3)
# Of a turn: texts, and numbers of image files; no text beside another, which forms join differently.
PIECES = st.lists(WORDS | IMAGES, min_size=1, max_size=5).filter(
    lambda pieces: not any(isinstance(a, str) and isinstance(b, str) for a, b in itertools.pairwise(pieces))
)
CHATS = st.tuples(st.none() | WORDS, st.lists(st.tuples(PIECES, WORDS), min_size=1, max_size=3))
FORMS = ("llava", "string", "parts", "places", "data", "columns")


def _in_form(form: str, system: str | None, rounds: list) -> dict:
    """A chat as a data set of that form would write it."""
    turns = [("system", [system])] if system is not None else []
    turns += [turn for asked, answer in rounds for turn in (("user", asked), ("assistant", [answer]))]
    images = [f"{n}.jpg" for _, pieces in turns for n in pieces if isinstance(n, int)]

    def joined(pieces):
        return " ".join("<image>" if isinstance(piece, int) else piece for piece in pieces)

    def part(piece):
        if isinstance(piece, str):
            return {"type": "text", "text": piece}
        if form == "places":
            return {"type": "image"}
        if form == "data":
            data = base64.b64encode(f"image {piece}".encode()).decode().rstrip("=")
            return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
        return {"type": "image_url", "image_url": {"url": f"{piece}.jpg"}}

    if form == "llava":
        own = {"user": "human", "assistant": "gpt", "system": "system"}
        return {"conversations": [{"from": own[r], "value": joined(p)} for r, p in turns], "image": images}
    if form == "columns":
        return {"conversations": {"role": [r for r, _ in turns], "content": [joined(p) for _, p in turns]}} | (
            {"images": images}
        )
    if form == "string":
        return {"messages": [{"role": r, "content": joined(p)} for r, p in turns], "images": images}
    messages = [{"role": r, "content": [part(piece) for piece in p]} for r, p in turns]
    return {"messages": messages} | ({"images": images} if form == "places" else {})


@given(chat=CHATS, form=st.sampled_from(FORMS))
def test_every_form_of_a_chat_becomes_the_same(tmp_path_factory, chat, form):
    folder = tmp_path_factory.getbasetemp()
    for n in range(4):
        (folder / f"{n}.jpg").write_bytes(f"image {n}".encode())
    system, rounds = chat
    expected = [Text(system, "system")] if system is not None else []
    if system is None and any(isinstance(piece, int) for asked, _ in rounds for piece in asked):
        expected = [Text(IMAGE_SYSTEM, "system")]
    for asked, answer in rounds:
        for piece in asked:
            expected.append(Text(piece, "user") if isinstance(piece, str) else RawImage(f"image {piece}".encode()))
        expected += [Text("", "user")] if isinstance(asked[-1], int) else []
        expected.append(Text(answer, "assistant"))
    assert _parts(folder, _in_form(form, system, rounds)) == expected


# ---------------------------------------------------------------- what is left out

BAD = [
    (_chat(("human", "a"), ("system", "s"), ("gpt", "b")), "misplaced_system"),
    (_chat(("system", "s"), ("human", "a"), ("gpt", "b"), system="t"), "misplaced_system"),
    (_chat(("gpt", "a"), ("system", "s"), ("human", "a"), ("gpt", "b")), "misplaced_system"),
    (_chat(("human", "a"), ("human", "b"), ("gpt", "c")), "repeated_role"),
    (_chat(("human", "a"), ("gpt", "b"), ("gpt", "c")), "repeated_role"),
    (_chat(("human", "<video>\na"), ("gpt", "b"), video="a.mp4"), "missing_video"),
    (_chat(("human", "<video>\na"), ("gpt", "b"), video="../a.mp4"), "unsafe_path"),
    (_chat(("human", "<video>\na"), ("gpt", "b"), video="https://a.example/a.mp4"), "missing_video"),
    (_chat(("human", "a"), ("gpt", "b"), video="a.mp4"), "images_differ"),
    (_chat(("human", "<video>\na"), ("gpt", "b"), videos=["a.mp4", "b.mp4"]), "images_differ"),
    (_chat(("human", "<video>a<video>"), ("gpt", "b"), videos=["a.mp4", "b.mp4"]), "unread_field"),
    (_chat(("human", "<video><image>a"), ("gpt", "b"), video="a.mp4", image="a.jpg"), "unread_field"),
    (_chat(("human", "a<image>b"), ("gpt", "c"), video="a.mp4"), "unread_field"),
    (_chat(("human", "a"), ("gpt", "b"), ("human", "<video>"), ("gpt", "c"), video="a.mp4"), "unread_field"),
    (_chat(("human", "<image>a"), ("gpt", "b"), image="https://a.example/a.jpg"), "missing_image"),
    (_chat(("human", "<image>a"), ("gpt", "b"), image="data:text/html,x"), "unreadable_image"),
    (_chat(("human", "<image>a"), ("gpt", "b"), image="data:image/png;base64,!"), "unreadable_image"),
    (_messages("a", [{"type": "image_url", "image_url": {"url": "a.jpg"}}, "<image>"]), "images_differ"),
    (_messages("a", [{"type": "image"}]), "images_differ"),
    (_messages([{"type": "image", "index": 1}, {"type": "image", "index": 0}], images=["a.jpg"] * 2), "images_differ"),
    (_messages([{"type": "input_audio", "input_audio": {}}]), "unread_field"),
    (_messages([{"type": "video", "video": "a.mp4"}, {"type": "video", "video": "b.mp4"}]), "unread_field"),
    (_messages([{"type": "text", "text": None}]), "not_a_chat"),
    (_messages([7]), "not_a_chat"),
    (_messages([]), "empty_turn"),
    (_messages("a", {"text": "b"}), "empty_turn"),
    (_messages("a", role="tool"), "unknown_role"),
    (_messages("a", tool_calls=[{"id": "1"}]), "unread_field"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "refusal": "no"}]},
        "unread_field",
    ),
    (_messages("a") | {"conversations": _turns(("human", "b"), ("gpt", "c"))}, "not_a_chat"),
    ({"messages": None}, "no_turns"),
    ({"conversations": {"from": ["human"], "value": []}}, "no_turns"),
    (_chat(("human", "<video>\na"), ("gpt", "b")), "unread_field"),
    (_chat(("human", "a"), ("gpt", "b"), tools='[{"name": "f"}]'), "unread_field"),
    ({"conversations": [*_turns(("human", "a")), {"from": "gpt", "value": "b", "weight": 0}]}, "unread_field"),
    (_chat(("human", "<image>a"), ("gpt", "b"), image="a.jpg", images=["b.jpg"]), "images_differ"),
    ({"instruction": "a", "output": "b", "history": "c"}, "not_a_chat"),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, "not_a_chat"),
    ({"instruction": "a", "output": "b", "history": [["c", None]]}, "not_a_chat"),
    (_chat(("human", " "), ("gpt", "a")), "empty_turn"),
    (_chat(("human", "a"), ("gpt", None)), "empty_turn"),
    ({"conversations": ["a"]}, "empty_turn"),
    (_chat(("human", "a"), ("bing", "b")), "unknown_role"),
    (_chat(("human", "a"), (["gpt"], "b")), "unknown_role"),
    (_chat(("human", "<image>a"), ("gpt", "b")), "images_differ"),
    (_chat(("human", "a"), ("gpt", "b"), image="a.jpg"), "images_differ"),
    (_chat(("human", "<image>a"), ("gpt", "b"), image=["a.jpg", "b.jpg"]), "images_differ"),
    (_chat(("human", "<image>a"), ("gpt", "b"), image="none.jpg"), "missing_image"),
    (_chat(("human", "<image>a"), ("gpt", "b"), image=7), "missing_image"),
    (_chat(("human", "<image>a"), ("gpt", "b"), image="n" * 5000), "missing_image"),
    (_chat(("human", "<image>a"), ("gpt", "b"), image="../a.jpg"), "unsafe_path"),
    (_chat(("human", "<image>a"), ("gpt", "b"), image="/a.jpg"), "unsafe_path"),
    (_chat(("human", "<image>a"), ("gpt", "b"), image="a\0.jpg"), "unsafe_path"),
    (_chat(("human", "a")), "no_answer"),
    (_chat(), "no_turns"),
    ({"conversations": "a"}, "no_turns"),
    (_chat(("human", "a" * 11), ("gpt", "b")), "text_too_long"),
    (_chat(("human", "\ud800"), ("gpt", "b")), "unreadable_text"),
    ({"instruction": "", "input": "a", "output": "b"}, "empty_turn"),
    ({"texts": []}, "no_turns"),
    ({"texts": ["a"]}, "not_a_chat"),
    ({"texts": [{"user": "a", "source": "vqav2"}]}, "not_a_chat"),
    ({"texts": [{"user": "<image> a", "assistant": "b"}], "images": ["x.jpg", "y.jpg"]}, "images_differ"),
    ({"instruction": "a", "output": 1}, "not_a_chat"),
    ({"text": "a"}, "not_a_chat"),
    ("a", "not_a_chat"),
]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_bad_chats(tmp_path, suffix):
    (tmp_path / "a.jpg").write_bytes(b"A")
    good = _chat(("human", "a"), ("gpt", "b"))
    records = [record for record, _ in BAD] + [good]
    text = json.dumps(records) if suffix == "json" else "".join(f"{json.dumps(record)}\n" for record in records)
    (tmp_path / f"t.{suffix}").write_text(text)
    documents, rejects = _read(tmp_path, max_characters=10)
    assert len(documents) == 1
    for reject, (record, reason) in zip(rejects, BAD, strict=True):
        print(reject.detail)
        assert (reject.reason, reject.whole) == (reason, True), record
        assert "\n" not in reject.detail and len(reject.detail) < 300


def test_wrong_paths_are_user_errors(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(UserError, match="expected chats in JSON or JSONL"):
            Chats().shards(str(path))

    (tmp_path / "t.json").write_text("[]")
    with pytest.raises(UserError, match=r"Chats\.images='none': no folder"):
        Chats(images="none").shards(str(tmp_path))


# ---------------------------------------------------------------- files


def _records(count: int) -> list[dict]:
    return [_chat(("human", f"question {n} ☃"), ("gpt", "x" * (n % 7 * 40 + 1))) for n in range(count)]


@given(st.integers(1, 3000), st.booleans())
def test_pieces_of_any_size_give_the_same_chats(tmp_path_factory, piece, last_newline):
    path = tmp_path_factory.getbasetemp() / "t.jsonl"
    text = "\n".join(json.dumps(record, ensure_ascii=False) for record in _records(12)) + "\n" * last_newline
    path.write_text(text.replace("\n", "\n\n", 1))  # and an empty line
    expected, rejects = _read(path)
    assert len(expected) == 12 and not rejects
    shards = Chats(piece_bytes=piece).shards(str(path))
    assert len(shards) == -(-path.stat().st_size // piece)
    assert _read(path, piece_bytes=piece) == (expected, [])


def test_every_cut_of_a_jsonl_is_told_unless_it_ends_with_a_line(tmp_path):
    path = tmp_path / "t.jsonl"
    data = "".join(f"{json.dumps(record)}\n" for record in _records(3)).encode()
    ends = [n for n, byte in enumerate(data) if byte == ord("\n")]
    for length in range(1, len(data)):
        path.write_bytes(data[:length])
        documents, rejects = _read(path)
        whole = length in ends or length - 1 in ends
        assert len(documents) == sum(end <= length for end in ends)
        assert [(r.key, r.reason) for r in rejects] == ([] if whole else [("t.jsonl", "cut_shard")]), length


def test_every_cut_of_an_array_is_told(tmp_path):
    path = tmp_path / "t.json"
    records = _records(3)
    data = json.dumps(records).encode()
    ends = [len(json.dumps(records[: n + 1])) - 1 for n in range(3)]
    for length in range(len(data)):
        path.write_bytes(data[:length])
        documents, rejects = _read(path)
        assert len(documents) == sum(end <= length for end in ends)
        assert [(r.key, r.reason) for r in rejects] == [("t.json", "cut_shard")], length


def test_broken_json_in_the_middle(tmp_path):
    good = [json.dumps(record) for record in _records(4)]
    (tmp_path / "a.json").write_text(f"[{good[0]}, {good[1]} {good[2]}]")
    (tmp_path / "b.json").write_text('{"conversations": []}')
    (tmp_path / "c.jsonl").write_text(f"{good[0]}\n{{\n{good[1]}\n")
    (tmp_path / "d.jsonl").write_bytes(good[0].encode().replace(b"question", b"\xff") + b"\n")
    (tmp_path / "e.jsonl").write_text("[" * 100_000 + "\n")
    documents, rejects = _read(tmp_path)
    assert [d.key for d in documents] == [
        "a.json/000000000",
        "a.json/000000001",
        "c.jsonl/000000000000",
        f"c.jsonl/{len(good[0]) + 3:012d}",
    ]
    assert [(r.key, r.reason) for r in rejects] == [
        ("a.json", "unreadable_json"),
        ("b.json", "unreadable_json"),
        (f"c.jsonl/{len(good[0]) + 1:012d}", "unreadable_json"),
        ("d.jsonl/000000000000", "unreadable_text"),
        ("e.jsonl/000000000000", "unreadable_json"),
    ]
