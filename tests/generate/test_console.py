"""`emu-jax chat`: messages as arguments, piped, and typed at a terminal; what cannot be done there."""

import io
import os
import pty
import re
import shlex
import signal
import sys
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emu_jax import Emu
from emu_jax.cli import main
from emu_jax.errors import UserError
from emu_jax.generate.chat import UNDRAWN
from emu_jax.generate.console import Console, converse
from tests.train import tiny


@pytest.fixture
def model(golden) -> list[str]:
    """The published layout, small: what selects it on the command line."""
    arguments = ["--model", str(golden / "mini-a/instruct/Emu-instruct.pt"), "--vision-head-dim", "12"]
    return [*arguments, "--tokenizer", str(golden / "llama_tokenizer.model"), "--max-new-tokens", "5"]


@pytest.fixture
def images(tmp_path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), np.uint8)
    for name, pixels in zip(("cat.png", "dog.png"), noise, strict=True):
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "words.png").write_text("not an image")
    return tmp_path


@pytest.fixture
def answers(golden, images) -> list[str]:
    """Of a chat about cat.png, then dog.png."""
    file = golden / "mini-a/instruct/Emu-instruct.pt"
    chat = Emu.load(file, tokenizer=golden / "llama_tokenizer.model", vision_head_dim=12).chat()
    messages = ([images / "cat.png", "what is this?"], [images / "dog.png", "and this?"], ["well?"])
    return [chat.say(message, max_new_tokens=5).text for message in messages]


def typed(monkeypatch, text: str) -> None:
    """Standard input is a terminal where this was typed, then Ctrl-D."""
    master, slave = pty.openpty()
    os.write(master, text.encode() + b"\x04")
    monkeypatch.setattr(sys, "stdin", open(slave, encoding="utf-8"))  # noqa: SIM115


def test_messages_as_arguments(model, images, answers, capsys):
    messages = ["--message", "what is this?", f"/image {images / 'dog.png'}", "--message", "and this?", "well?"]
    assert main(["chat", *model, "--image", str(images / "cat.png"), *messages]) == 0
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in answers)


def test_messages_that_are_piped(model, images, answers, capsys, monkeypatch):
    lines = f"/image {images / 'cat.png'}\nwhat is this?\n\n/image {images / 'dog.png'}\nand this?\n/undo\n"
    lines += f"/image {images / 'dog.png'}\nand this?\nwell?\n/quit\nnever said\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert main(["chat", *model]) == 0
    first, second, third = answers
    assert capsys.readouterr().out == f"{first}\n{second}\n{second}\n{third}\n"


def test_at_a_terminal(model, images, answers, capfd, monkeypatch):
    """What cannot be done is one line, and the chat goes on; an image that was shown waits for a message that can."""
    lines = f"/image {images / 'words.png'}\n/image {images / 'cat.png'}\n/imagine\n/undo\n{'1' * 2100}\n"
    typed(monkeypatch, lines + "what is this?\n")
    assert main(["chat", *model]) == 0
    out, err = capfd.readouterr()
    assert "/image PATH, /video PATH, /undo, /reset, /quit; Ctrl-C stops an answer" in out
    assert answers[0] in out
    errors = err.splitlines()
    assert "words.png: not a readable image" in errors[0]
    assert errors[1].startswith("/imagine is no command; did you mean /image?")
    assert errors[2] == "chat: there is no turn to take back"
    assert "tokens after 0, and 5 new ones, exceed the model's context of 2048" in errors[3]
    assert len(errors) == 4


def refused(capsys, *arguments: str) -> str:
    """A command that must fail; its one line."""
    assert main(["chat", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


class Shown(Console):
    """A console without a model, which notes what it shows."""

    def __init__(self):
        super().__init__(None, io.StringIO(), {})
        self.paths = []

    def show(self, path, *, video):
        self.paths.append((path, video))


def test_names_of_files_are_read_as_a_shell_reads_them(tmp_path):
    """As a terminal writes the name of a file that is dropped into it; and a file's name is no message."""
    names = ("cat.png", "my cat.png", "don't.png", "'quoted'.png", "clip one.mp4")
    for name in names:
        (tmp_path / name).write_bytes(b"")
    console = Shown()
    for name in names:
        plain = str(tmp_path / name)
        url = f"file://{urllib.parse.quote(plain)}"
        for argument in {plain, shlex.quote(plain), re.sub(r"([ '])", r"\\\1", plain), url}:
            console.paths.clear()
            assert console.take(f"/image  {argument} ")
            assert console.paths == [(Path(plain), False)], argument
            command = "/video" if name.endswith(".mp4") else "/image"
            with pytest.raises(UserError, match=f"the name of a file; to show it, write {command} "):
                console.take(argument)
    with pytest.raises(UserError, match="2 names; expected one, in quotes if it has spaces"):
        console.take(f"/image {tmp_path / 'cat.png'} b.png")
    with pytest.raises(UserError, match="is no command; did you mean"):
        console.take("/imagine/this.png")


def test_what_cannot_be_done_ends_it(model, images, trained, capsys, monkeypatch):
    line = refused(capsys, *model, "--image", str(images / "words.png"), "--message", "what is this?")
    assert line.startswith("emu-jax chat: ") and "words.png: not a readable image" in line
    assert "gone.mp4: no such video file" in refused(capsys, *model, "--video", str(images / "gone.mp4"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is this?\n/image\nnever said\n"))
    assert "/image: expected /image PATH" in refused(capsys, *model)
    assert "num_beams=2 and temperature=0.5" in refused(capsys, *model, "--num-beams", "2", "--temperature", "0.5")
    line = refused(capsys, "--checkpoint", str(trained), "--message", "what is this?")
    assert "this model does not chat: its tokenizer has no [USER] and no [ASSISTANT]" in line


def test_ctrl_c_stops_an_answer(model, capfd, monkeypatch):
    """At the third token: it is finished, what was said counts, and the chat goes on."""
    from emu_jax.generate import chat

    step, calls = chat._next_token, []

    def interrupted(*arguments, **static):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments, **static)

    monkeypatch.setattr(chat, "_next_token", interrupted)
    typed(monkeypatch, "what is this?\n/undo\nwhat is this?\n")
    before = signal.getsignal(signal.SIGINT)
    assert main(["chat", *model]) == 0
    assert signal.getsignal(signal.SIGINT) is before
    out, err = capfd.readouterr()
    answers = [line.replace("> ", "") for line in out.splitlines()[1:] if line.replace("> ", "")]
    stopped, note, whole = answers
    assert note == "(stopped)" and err == ""
    assert whole.startswith(stopped) and whole != stopped
    assert len(calls) == 2 + 4, "steps: two for three tokens, then four for five"


def test_images_that_answers_begin_are_files(instructed, drawing, tmp_path):
    """They are numbered after those that are there, and carry what was asked."""
    model = tiny.that_draws(Emu.load(instructed, decoder=drawing).merged())
    (tmp_path / "drawing-1.png").touch()
    out = io.StringIO()
    console = Console(model.chat(""), out, {"seed": 3}, tmp_path)
    converse(console, ["draw a red bar", "/undo", "and a blue one"])
    files = [tmp_path / "drawing-2.png", tmp_path / "drawing-3.png"]
    assert out.getvalue() == "".join(f"\n{file}\n" for file in files)
    asked = [Image.open(file).text["prompt"] for file in files]
    assert asked == ['["draw a red bar"]', '["and a blue one"]']
    silent = io.StringIO()
    converse(Console(model.chat(""), silent, {"seed": 3}), ["draw a red bar"])
    assert silent.getvalue() == f"\n({UNDRAWN})\n"
