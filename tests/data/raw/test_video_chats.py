"""Chats about videos: both published files, videos with and without their suffix, parts, and what is left out."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.data.document import Text
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.data.raw.readers import make_reader
from emu_jax.data.raw.readers.video_chatgpt import VideoChatGPT
from emu_jax.data.raw.readers.videochat import VideoChat
from emu_jax.data.raw.video_files import SUFFIXES
from emu_jax.data.system_messages import VIDEO_SYSTEM
from emu_jax.errors import UserError
from tests.videos import grey_animation, grey_video

ALL = [*range(16)]  # frames of a short video


def _read(reader, path) -> list[RawDocument | Reject]:
    return [item for shard in reader.shards(str(path)) for item in reader.read(shard)]


def _brief(item: RawDocument | Reject) -> tuple:
    """A chat as (key, its frames' numbers, its turns), a reject as (key, reason, whether a chat is lost)."""
    if isinstance(item, Reject):
        print(item.detail)
        assert item.detail and "\n" not in item.detail and len(item.detail) < 400
        return item.key, item.reason, item.whole
    assert item.kind == "video_chat"
    system, *rest = item.parts
    assert system == Text(VIDEO_SYSTEM, "system")
    frames = [part for part in rest if isinstance(part, RawImage)]
    assert rest[: len(frames)] == frames, "the frames stand in front"
    turns = rest[len(frames) :]
    assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    return item.key, [round((float(f.data.mean()) - 40) / 8) for f in frames], " | ".join(turn.text for turn in turns)


def test_videochat(tmp_path):
    grey_video(tmp_path / "WebVid" / "050951_051000" / "1022713978.mp4")
    grey_video(tmp_path / "WebVid" / "7.mp4", 1)
    records = [
        {
            "video": "050951_051000/1022713978.mp4",
            "QA": [
                {"i": "Watch the video.", "q": " What happens?", "a": "A bee flies."},
                {"q": "Where?", "a": "Here."},
            ],
        },
        {"video": "050951_051000/7.mp4", "QA": [{"i": "Describe the video in detail.", "q": "", "a": "A bee."}]},
    ]
    (tmp_path / "videochat_instruct_11k.json").write_text(json.dumps(records))
    reader = make_reader("videochat", ["videos=WebVid"])
    assert [_brief(item) for item in _read(reader, tmp_path)] == [
        (
            "videochat_instruct_11k.json/000000000",
            ALL,
            "Watch the video.\nWhat happens? | A bee flies. | Where? | Here.",
        ),
        ("videochat_instruct_11k.json/000000001", [0], "Describe the video in detail. | A bee."),
    ]


def test_video_chatgpt_s_questions_about_one_video_are_one_chat(tmp_path):
    """Also where others stand between them; the videos are named without a suffix."""
    grey_video(tmp_path / "v_k_ZXmr8pmrs.mp4")
    grey_animation(tmp_path / "v_b.webp")
    records = [
        {"q": "What happens?", "a": "A bee flies.", "video_id": "v_k_ZXmr8pmrs"},
        {"q": "Who?", "a": "A cat.", "video_id": "v_b"},
        {"q": "Where?", "a": "Over a flower.", "video_id": "v_k_ZXmr8pmrs"},
    ]
    (tmp_path / "t.json").write_text(json.dumps(records))
    reader = make_reader("video_chatgpt")
    assert [_brief(item) for item in _read(reader, tmp_path)] == [
        ("t.json/000000000", ALL, "What happens? | A bee flies. | Where? | Over a flower."),
        ("t.json/000000001", ALL, "Who? | A cat."),
    ]
    (tmp_path / "v_b.webp").unlink()
    some = [_brief(item) for item in _read(make_reader("video_chatgpt", ["turns=1", "frames=3"]), tmp_path)]
    assert some == [
        ("t.json/000000000", [2, 7, 12], "What happens? | A bee flies."),
        ("t.json/000000000+1", [2, 7, 12], "Where? | Over a flower."),
        ("t.json/000000001", "missing_video", True),
    ]
    plain = _read(make_reader("video_chatgpt", ["system=false"]), tmp_path)[0]
    assert isinstance(plain.parts[0], RawImage)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_is_tried(tmp_path, suffix):
    if suffix in (".gif", ".webp"):
        grey_animation(tmp_path / "videos" / f"v_x{suffix}", 2)
    else:
        grey_video(tmp_path / "videos" / f"v_x{suffix}", 2)
    (tmp_path / "t.json").write_text(json.dumps([{"q": "a", "a": "b", "video_id": "v_x"}]))
    (item,) = _read(VideoChatGPT(videos="videos"), tmp_path / "t.json")
    assert isinstance(item, RawDocument) and len(item.parts) == 1 + 2 + 2


GOOD = [{"q": "a", "a": "b"}]
BAD = [
    ({"video": "gone.mp4", "QA": GOOD}, "missing_video"),
    ({"video": 7, "QA": GOOD}, "missing_video"),
    ({"QA": GOOD}, "missing_video"),
    ({"video": "n" * 5000, "QA": GOOD}, "missing_video"),
    ({"video": "../a.mp4", "QA": GOOD}, "unsafe_path"),
    ({"video": "/a.mp4", "QA": GOOD}, "unsafe_path"),
    ({"video": "a\0.mp4", "QA": GOOD}, "unsafe_path"),
    ({"video": "cut.mp4", "QA": GOOD}, "cut_video"),
    ({"video": "text.mp4", "QA": GOOD}, "unreadable_video"),
    ({"video": "a.mp4"}, "no_turns"),
    ({"video": "a.mp4", "QA": []}, "no_turns"),
    ({"video": "a.mp4", "QA": ["a"]}, "empty_turn"),
    ({"video": "a.mp4", "QA": [{"q": "a"}]}, "empty_turn"),
    ({"video": "a.mp4", "QA": [{"q": "a", "a": " "}]}, "empty_turn"),
    ({"video": "a.mp4", "QA": [{"i": "", "q": "", "a": "b"}]}, "empty_turn"),
    ({"video": "a.mp4", "QA": [{"q": 1, "a": "b"}]}, "empty_turn"),
    ({"video": "a.mp4", "QA": [*GOOD, {"q": "a", "a": "b" * 11}]}, "text_too_long"),
    ({"video": "a.mp4", "QA": [{"q": "\ud800", "a": "b"}]}, "unreadable_text"),
    ("a", "not_a_chat"),
]


def test_bad_chats(tmp_path):
    grey_video(tmp_path / "a.mp4")
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.mp4").write_bytes(b"no video")
    records = [record for record, _ in BAD] + [{"video": "a", "QA": GOOD}]
    (tmp_path / "t.json").write_text(json.dumps(records))
    *bad, good = [_brief(item) for item in _read(VideoChat(max_characters=10), tmp_path)]
    assert bad == [(f"t.json/{n:09d}", reason, True) for n, (_, reason) in enumerate(BAD)]
    assert good == (f"t.json/{len(BAD):09d}", ALL, "a | b")


def test_a_bad_question_leaves_the_others_of_itsgrey_video(tmp_path):
    grey_video(tmp_path / "v.mp4")
    records = [{"q": "one", "a": "1"}, {"q": "two", "a": None}, {"q": "three", "a": "3"}]
    (tmp_path / "t.json").write_text(json.dumps([record | {"video_id": "v"} for record in records]))
    assert [_brief(item) for item in _read(VideoChatGPT(), tmp_path)] == [
        ("t.json/000000001", "empty_turn", False),
        ("t.json/000000000", ALL, "one | 1 | three | 3"),
    ]


@given(videos=st.lists(st.sampled_from("abcdefgh"), max_size=20), shard_bytes=st.integers(1, 2000))
def test_parts_hold_every_chat_once(tmp_path_factory, videos, shard_bytes):
    """Whatever their number; the videos are missing, which the readers tell by chat."""
    path = tmp_path_factory.getbasetemp() / "t.json"
    path.write_text(json.dumps([{"q": "a", "a": "b", "video_id": video} for video in videos]))
    reader = pickle.loads(pickle.dumps(VideoChatGPT(shard_bytes=shard_bytes)))
    shards = reader.shards(str(path))
    assert len(shards) == -(-path.stat().st_size // shard_bytes)
    found = sorted(item.key for shard in shards for item in reader.read(shard))
    assert found == sorted(f"t.json/{videos.index(video):09d}" for video in set(videos))


def test_a_file_that_breaks_off_is_told_once(tmp_path):
    path = tmp_path / "t.json"
    records = [{"q": "a", "a": "b", "video_id": f"v{n}"} for n in range(4)]
    path.write_text(json.dumps(records)[:-10])
    found = _read(VideoChatGPT(shard_bytes=50), path)
    assert sorted((item.key, item.reason) for item in found) == [
        ("t.json", "cut_shard"),
        *((f"t.json/{n:09d}", "missing_video") for n in range(3)),
    ]


def test_wrong_paths_and_settings(tmp_path):
    with pytest.raises(UserError, match=r"expected a JSON array of questions and answers, as VideoChat's"):
        VideoChat().shards(str(tmp_path))
    (tmp_path / "t.json").write_text("[]")
    with pytest.raises(UserError, match=r"VideoChatGPT\.videos='none': no folder"):
        VideoChatGPT(videos="none").shards(str(tmp_path))
    with pytest.raises(UserError, match=r"VideoChat\.turns=0; expected at least 1"):
        VideoChat(turns=0)
