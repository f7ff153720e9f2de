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


# ---------------------------------------------------------------- what is left out

BAD = [
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
