"""The registry of readers: what each module says of its reader, and readers of other packages."""

import dataclasses
import pickle
import subprocess
import sys

import pytest

from emu_jax.data.kinds import KINDS
from emu_jax.data.raw.reader import RawDocument
from emu_jax.data.raw.readers import READERS, find_reader, make_reader
from emu_jax.errors import UserError

MODULE = '''
import dataclasses
from typing import ClassVar

from emu_jax.data.document import Text
from emu_jax.data.raw.reader import RawDocument


@dataclasses.dataclass(frozen=True)
class Lines:
    """One document per line of a text file."""

    about: ClassVar[str] = "texts: one per line"
    kind: ClassVar[str] = "web"
    prefix: str = ""

    def shards(self, path):
        return [path]

    def read(self, shard):
        for number, line in enumerate(open(shard)):
            yield RawDocument(f"{shard}/{number}", self.kind, (Text(self.prefix + line.strip()),))


class Half:
    about = "nothing"
'''
ENTRIES = """[emu_jax.sources]
lines = some_package:Lines
half = some_package:Half
gone = no_such_package:Lines
html = some_package:Lines
"""


@pytest.mark.parametrize("name", READERS)
def test_every_reader_says_what_it_is(name):
    reader = make_reader(name)
    assert reader.about and "\n" not in reader.about
    assert reader.kind in KINDS
    assert all(field.default is not dataclasses.MISSING for field in dataclasses.fields(reader))
    assert pickle.loads(pickle.dumps(reader)) == reader


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with entry points."""
    (tmp_path / "some_package.py").write_text(MODULE)
    info = tmp_path / "some_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(tmp_path)


def test_another_package_adds_a_reader(package, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    reader = make_reader("lines", ["prefix=- "])
    (shard,) = reader.shards(str(tmp_path / "a.txt"))
    assert [document.parts[0].text for document in reader.read(shard)] == ["- one", "- two"]
    assert find_reader("html").__name__ == "Html", "a name of ours stays ours"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("line", "source 'line' is unknown; did you mean lines"),
        ("half", "source half: some_package:Half is not a reader; expected a dataclass with about, kind, shards, read"),
        ("gone", "source gone: no_such_package:Lines cannot be imported .*; mend its package"),
    ],
)
def test_readers_that_cannot_be_used(package, name, message):
    with pytest.raises(UserError, match=message):
        make_reader(name)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "image=x",
            r"setting 'image=x' of source coco \(images with captions: COCO's JSON\): expected field=value, with",
        ),
        ("max_characters=x", "setting 'max_characters=x' of source coco: expected a int, such as 10000"),
    ],
)
def test_settings_that_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        make_reader("coco", [setting])


def test_documents_of_an_unknown_kind():
    with pytest.raises(UserError, match=r"a: kind 'chats' is unknown; did you mean chat\?"):
        RawDocument("a", "chats", ())


def test_a_missing_library_is_one_line():
    """Of the extra [prepare]: videos need PyAV. In a process that has not imported it yet."""
    code = "import sys; sys.modules['av'] = None; from emu_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "prepare", "videos", "--in", "a.csv", "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert said.startswith("emu-jax prepare: source videos: ") and said.endswith("run `pip install 'emu-jax[prepare]'`")
