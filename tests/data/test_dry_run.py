"""A dry run says what a preparation of the same records does, and a limited set is not taken for a whole one."""

import dataclasses
import json
from collections.abc import Iterator

import pytest

from emu_jax.cli import main
from emu_jax.data.document import Text
from emu_jax.data.dry_run import RECORDS, VIDEOS, dry_run
from emu_jax.data.images import Recoding
from emu_jax.data.prepare import PrepareConfig, prepare
from emu_jax.data.prepared import MANIFEST, Records
from emu_jax.data.raw.limits import by_file, read_first
from emu_jax.data.raw.reader import RawDocument, Reject
from emu_jax.data.raw.readers import make_reader
from emu_jax.data.sources import PairOrder, open_source
from emu_jax.data.summary import Summary
from emu_jax.errors import UserError
from tests.data.test_poisoned import write_tars


@dataclasses.dataclass(frozen=True)
class Texts:
    """`files` files in two pieces, of four chats each, the second of which is left out."""

    files: int = 1
    kind: str = "chat"

    def shards(self, path: str) -> list[str]:
        return [f"{file:05d}.jsonl@{piece}-{piece + 1}" for file in range(self.files) for piece in range(2)]

    def read(self, shard: str) -> Iterator[RawDocument | Reject]:
        for number in range(4):
            key = f"{shard}/{number}"
            if number == 1:
                yield Reject(key, "no_answer", "none")
            else:
                yield Reject(f"{key}#leading", "leading_answer", "one", whole=False)
                yield RawDocument(key, self.kind, (Text(key, "user"), Text("b", "assistant")))


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 5, 8, 9])
def test_limits_count_documents_over_the_pieces_of_a_file(limit):
    (pieces,) = by_file(Texts().shards(""))
    found = list(read_first(Texts(), pieces, limit))
    everything = list(read_first(Texts(), pieces, 0))
    assert found == everything[: len(found)]
    assert sum(isinstance(one, RawDocument) or one.whole for one in found) == (min(limit, 8) if limit else 8)


@pytest.mark.parametrize(
    ("files", "kind", "limit", "expected"),
    [
        (1, "chat", 0, (RECORDS, 1, 8)),
        (3, "chat", 0, (RECORDS // 3, 3, 24)),
        (3, "chat", 2, (2, 3, 6)),
        (4 * RECORDS, "chat", 0, (1, RECORDS, RECORDS)),
        (4, "video_chat", 0, (VIDEOS // 4, 4, 32)),
        (100, "video_chat", 0, (1, VIDEOS, VIDEOS)),
    ],
)
def test_how_much_is_read(files, kind, limit, expected):
    found = dry_run(Texts(files, kind), "", Recoding(), limit)
    assert (found.limit, found.files, found.summary.documents) == expected and found.all_files == files


@pytest.mark.long
def test_it_says_what_a_preparation_does(tmp_path):
    write_tars(tmp_path)
    reader, recoding = make_reader("pairs"), Recoding(32)
    for limit in (0, 3):
        config = PrepareConfig("poisoned", max_faults=1.0, recoding=recoding, limit=limit)
        manifest = prepare(reader, "pairs", str(tmp_path / "in"), tmp_path / f"out{limit}", config)
        assert manifest["limit"] == (limit or None)
        tried = dry_run(reader, str(tmp_path / "in"), recoding, limit)
        assert tried.summary == Summary.from_json(manifest)
    assert tried.summary.documents == 4 * 3


@pytest.mark.long
def test_a_limited_set_is_known(tmp_path):
    write_tars(tmp_path)
    command = ["prepare", "pairs", "--in", str(tmp_path / "in"), "--image-size", "32", "--max-faults", "1"]
    for name, limit in (("whole", []), ("limited", ["--limit", "99"])):
        assert main([*command, "--out", str(tmp_path / name), *limit]) == 0
    whole, limited = (Records(tmp_path / name, "train") for name in ("whole", "limited"))
    assert len(whole) == len(limited) and whole.fingerprint != limited.fingerprint
    remarks = [open_source(str(r.folder), "train", 32, PairOrder()).remark for r in (whole, limited)]
    stated = "prepared from the first 99 records of each raw file only (--limit)"
    assert remarks == ["", f"{tmp_path / 'limited'}: {stated}"]


def test_nothing_is_written(tmp_path, capsys):
    write_tars(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    command = ["prepare", "pairs", "--in", str(tmp_path / "in"), "--dry-run"]
    assert main([*command, "--max-faults", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "dry run: at most 250 records of each of 4 files; nothing is written",
        "23 documents: 10 would be kept, 8 faults",
        "reason            left out  documents  counts as",
    ]
    assert main(command) == 2
    out, error = capsys.readouterr()
    assert "unreadable_image         3          3  fault" in out, "the table is printed where the data are refused too"
    assert error.startswith("emu-jax prepare: pairs: 8 faults in 23 documents, more than 2.0%; rejects: ")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.long
def test_a_refused_preparation_prints_its_table(tmp_path, capsys):
    write_tars(tmp_path)
    assert main(["prepare", "pairs", "--in", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    out, error = capsys.readouterr()
    assert "unreadable_image         3          3  fault" in out and "more than 2.0%" in error
    assert not (tmp_path / "out" / MANIFEST).exists()
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert f"unreadable_text          {sum(r['reason'] == 'unreadable_text' for r in rejects)}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out is missing: name a new folder"),
        (["--dry-run", "--limit", "0"], "--limit 0: expected 1 or more"),
        (["--out", "x", "--limit", "-1"], "--limit -1: expected 1 or more"),
        (["--dry-run", "--max-faults", "2"], "max faults 2.0; expected a share"),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, message):
    assert main(["prepare", "pairs", "--in", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_bad_limits():
    with pytest.raises(UserError, match="limit -1; expected"):
        dry_run(Texts(), "", Recoding(), -1)
    with pytest.raises(UserError, match="limit -1; expected"):
        PrepareConfig("a", limit=-1)
