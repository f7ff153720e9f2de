"""Chats: turns and images in their places, bad chats left out, files that break off."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.data.document import Text
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.data.raw.readers.chats import Chats
from emu_jax.data.system_messages import IMAGE_SYSTEM
from emu_jax.errors import UserError


def _turns(*turns: tuple[str, str]) -> list[dict]:
    return [{"from": role, "value": value} for role, value in turns]


def _chat(*turns: tuple[str, str], **fields) -> dict:
    return {"id": "x", "conversations": _turns(*turns), **fields}


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


# ---------------------------------------------------------------- what is left out

BAD = [
    (_chat(("human", "a"), ("system", "s"), ("gpt", "b")), "misplaced_system"),
    (_chat(("system", "s"), ("human", "a"), ("gpt", "b"), system="t"), "misplaced_system"),
    (_chat(("gpt", "a"), ("system", "s"), ("human", "a"), ("gpt", "b")), "misplaced_system"),
    (_chat(("human", "a"), ("human", "b"), ("gpt", "c")), "repeated_role"),
    (_chat(("human", "a"), ("gpt", "b"), ("gpt", "c")), "repeated_role"),
    (_chat(("human", "<video>\na"), ("gpt", "b"), video="a.mp4"), "unread_field"),
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
