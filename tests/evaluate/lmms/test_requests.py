"""Requests of lmms-eval: the prompts are those of our own harness, settings are read as transformers means them."""

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.data.system_messages import IMAGE_SYSTEM, VIDEO_SYSTEM
from emu_jax.errors import UserError
from emu_jax.evaluate import prompts
from emu_jax.evaluate.lmms.requests import (
    Settings,
    Turn,
    prompt,
    read_messages,
    read_settings,
    read_turns,
    read_visuals,
)
from emu_jax.evaluate.question import Question
from tests.videos import grey_video

ONE, TWO = (np.full((4, 4, 3), value, np.uint8) for value in (1, 2))
TASK = "task vqa, question 3"


def spelt(parts) -> str:
    """Parts as one line; images by their first value."""
    return "".join(part if isinstance(part, str) else f"<{part.flat[0]}>" for part in parts)


def asked(text, visuals, *, chat=True, begins="", has_video=False) -> str:
    """The prompt of a simple task."""
    turns = read_visuals(text, visuals, 8, TASK)
    return spelt(prompt(turns, has_video=has_video, chat=chat, begins=begins))


# ---------------------------------------------------------------- prompts


def ours(form, question: Question, chat: bool) -> str:
    """The first prompt of our own harness."""
    return spelt(next(form(question, list(question.images), [], chat)).parts)


@pytest.mark.parametrize("chat", [True, False], ids=["tuned", "pretrained"])
def test_the_embedded_questions_prompt(chat):
    question = Question("1", (ONE,), text="is this a cat")
    expected = f"{IMAGE_SYSTEM} [USER]: <1> is this a cat [ASSISTANT]:" if chat else "<1> is this a cat"
    assert asked("is this a cat", [ONE], chat=chat) == ours(prompts.embedded, question, chat) == expected


def test_the_references_prompt_for_short_answers():
    """`begins` is the model's argument, and what precedes the question is a task's `pre_prompt`."""
    question = Question("1", (ONE,), text="what is it?")
    text = prompts.ONE_PHRASE.format("image").strip() + " what is it?"
    assert asked(text, [ONE], begins="the answer is:") == ours(prompts.vqa, question, True)


def test_images_come_first_or_where_the_text_says_image():
    assert asked("which is red?", [ONE, TWO], chat=False) == "<1><2> which is red?"
    assert asked("<image> or <image>: which is red?", [ONE, TWO], chat=False) == "<1> or <2> : which is red?"
    assert asked("say 3", None) == " [USER]: say 3 [ASSISTANT]:"
    assert asked("", [ONE], chat=False) == "<1>"
    with pytest.raises(UserError, match=f"^{TASK}: the text says <image> 1 times; expected one for each of its 2 imag"):
        asked("an <image>", [ONE, TWO])


def test_messages_keep_their_order_and_their_system_message():
    def message(role, *content):
        items = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "url": c} for c in content]
        return {"role": role, "content": items}

    talk = [message("user", "here", ONE, "is red?"), message("assistant", "yes"), message("user", TWO, "and this?")]
    turns = read_messages(talk, 8, TASK)
    said = " [USER]: here<1> is red? [ASSISTANT]: yes</s> [USER]: <2> and this? [ASSISTANT]:"
    assert spelt(prompt(turns, has_video=False, chat=True)) == IMAGE_SYSTEM + said
    turns = read_messages([{"role": "system", "content": "be brief"}, *talk], 8, TASK)
    assert spelt(prompt(turns, has_video=False, chat=True)) == "be brief" + said


def test_a_videos_frames_are_our_readers(tmp_path):
    """8 of 16 frames, by the reference's rule, with the system message for videos."""
    grey_video(tmp_path / "grey.mp4")
    file = str(tmp_path / "grey.mp4")
    for turns in (
        read_visuals("what?", [file], 8, TASK),
        read_messages(
            [{"role": "user", "content": [{"type": "video", "url": file}, {"type": "text", "text": "what?"}]}], 8, TASK
        ),
    ):
        read, has_video = read_turns(turns, 4, TASK)
        *frames, text = read[0].content
        assert text == "what?" and has_video
        greys = [int(frame.mean().round()) for frame in frames]
        np.testing.assert_allclose(greys, [40 + 8 * index for index in (0, 2, 4, 6, 8, 9, 11, 13)], atol=3)
        assert spelt(prompt(read, has_video=True, chat=True)).startswith(f"{VIDEO_SYSTEM} [USER]: <")


def test_image_files_are_images(tmp_path):
    file = tmp_path / "one.png"
    PIL.Image.fromarray(ONE).save(file)
    for visual in (str(file), file, PIL.Image.fromarray(ONE), {"bytes": file.read_bytes(), "path": None}):
        ((turn,), has_video) = read_turns(read_visuals("what?", [visual], 8, TASK), 4, TASK)
        assert turn.content[0].tolist() == ONE.tolist() and turn.content[1:] == ("what?",) and not has_video
    assert read_turns([Turn("user", ("what?",))], 4, TASK) == ([Turn("user", ("what?",))], False)


@pytest.mark.parametrize(
    ("visual", "said"),
    [
        ({"array": [0.0], "sampling_rate": 16000}, "cannot show NoneType; expected images"),
        ({"type": "audio", "url": "a.wav"}, "cannot show dict; expected images"),
        ({"type": "video", "url": "a.mp4", "video_start": 3}, "from one second to another; emu_jax shows whole videos"),
        (7, "cannot show int; expected images"),
    ],
)
def test_what_cannot_be_shown(visual, said):
    with pytest.raises(UserError, match=f"^{TASK}: .*{said}"):
        read_visuals("what?", [visual], 8, TASK)


def test_messages_that_cannot_be_read():
    with pytest.raises(UserError, match="a message's role is 'tool'; expected system, user or assistant"):
        read_messages([{"role": "tool", "content": "a"}], 8, TASK)
    with pytest.raises(UserError, match="cannot show audio str; expected images"):
        read_messages([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}], 8, TASK)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("asks", "expected"),
    [
        ({}, Settings((), 256, 0, ())),
        ({"until": ["\n\n", ""], "max_new_tokens": 16, "do_sample": False}, Settings(("\n\n",), 16, 0, ())),
        ({"temperature": 0, "top_p": 0, "num_beams": 1, "top_k": None}, Settings((), 256, 0, (("num_beams", 1),))),
        ({"temperature": 0.7, "do_sample": False}, Settings((), 256, 0, ())),
        ({"temperature": 0, "do_sample": True}, Settings((), 256, 0, ())),
        ({"do_sample": True, "seed": 4}, Settings((), 256, 4, (("temperature", 1.0),))),
        ({"temperature": 1, "top_p": 0.9}, Settings((), 256, 0, (("temperature", 1.0), ("top_p", 0.9)))),
        ({"until": "Q:", "repetition_penalty": 1.0, "image_aspect_ratio": "pad"}, Settings(("Q:",), 256, 0, ())),
        (
            {"num_beams": 5, "length_penalty": -1, "min_length": 8},
            Settings((), 256, 0, (("length_penalty", -1.0), ("min_length", 8), ("num_beams", 5))),
        ),
    ],
)
def test_settings(asks, expected):
    assert read_settings(asks, "task vqa") == expected


@pytest.mark.parametrize(
    ("asks", "said"),
    [
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 is not supported by emu_jax; set it to 1; expected some"),
        ({"stop_sequences": ["a"]}, r"stop_sequences=\['a'\] is not supported by emu_jax; expected some of until, max"),
        ({"until": 3}, "until=3; expected a text or a list of texts"),
        ({"max_new_tokens": "many"}, "max_new_tokens='many'; expected int"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5; expected int"),
        ({"num_beams": True}, "num_beams=True; expected int"),
        ({"do_sample": 1}, "do_sample=1; expected bool"),
        ({"max_new_tokens": 0}, "num_beams=1, max_new_tokens=0; expected at least 1 of each"),
        ({"temperature": 1, "num_beams": 3}, "num_beams=3 and temperature=1.0; beams do not sample"),
        ({"temperature": 1, "top_p": 0}, r"temperature=1.0, top_p=0.0; expected temperature >= 0 and 0 < top_p <= 1"),
    ],
)
def test_settings_that_cannot_work(asks, said):
    with pytest.raises(UserError, match=f"^task vqa: generation_kwargs {said}"):
        read_settings(asks, "task vqa")


@given(st.text("ab\n", max_size=8), st.lists(st.text("ab\n", min_size=1, max_size=2), max_size=3))
def test_an_answer_ends_before_the_texts_of_until(text, until):
    """The longest beginning that holds none of them, unless one of them begins before another's first place."""
    cut = Settings(tuple(until), 8, 0, ()).cut(text)
    assert text.startswith(cut) and not any(stop in cut for stop in until)
    if len(until) == 1:
        beginnings = [text[:end] for end in range(len(text) + 1)]
        assert cut == next((b.removesuffix(until[0]) for b in beginnings if b.endswith(until[0])), text)
