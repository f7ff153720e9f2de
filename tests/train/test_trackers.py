"""Trackers: the real packages offline, in a run that is stopped and goes on; what fails, and what is recorded."""

import importlib
import json
import math
import struct
import subprocess
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from emu_jax.cli import main
from emu_jax.config import load_config
from emu_jax.errors import UserError
from emu_jax.observation import Observation
from emu_jax.train import trackers
from emu_jax.train.loop import train
from emu_jax.train.sections import tag
from emu_jax.train.starts import git_state
from emu_jax.workdir import read_metrics
from tests.train import line


def settings(*more: str) -> list[str]:
    return ["--config.train.steps=8", "--config.train.checkpoint_every=4", *more]


def stored_by_wandb(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format, in blocks of 32 KiB."""
    assert data[:4] == b":W&B"
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := -at % 32768) < 7 and left:  # too short for a record: padding
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def logged_by_wandb(folder) -> dict[int, dict[str, float]]:
    """Rows by step, of all files that `wandb sync` would send."""
    records = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    rows: dict[int, dict[str, float]] = {}
    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        for data in stored_by_wandb(path.read_bytes()):
            record = records.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                assert record.history.step.num not in rows, "a step is there twice"
                rows[record.history.step.num] = {key: json.loads(value) for key, value in values.items()}
    return rows


def test_both_have_every_row_once(tmp_path, monkeypatch):
    """Also of a run that was killed after rows that its second start writes again."""
    pytest.importorskip("wandb")
    pytest.importorskip("trackio")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    storage = _fresh_storage(monkeypatch, tmp_path / "trackio")
    workdir = tmp_path / "run"
    words = ["train", "--config", line.__file__, "--workdir", str(workdir), "--track", "wandb", "trackio"]
    words += ["--name", "a line"]
    assert main([*words, *settings()]) == 0
    assert main([*words, *settings("--change", "config.train.steps=12")]) == 0
    rows = {row["step"]: row for row in read_metrics(workdir / "metrics.jsonl")}
    assert sorted(rows) == list(range(1, 13))
    starts = [json.loads(text) for text in (workdir / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 8] and len({start["id"] for start in starts}) == 1
    (name,) = storage.get_runs("emu_jax")
    assert name == f"a line-{starts[0]['id'][:6]}"
    tracked = {row["step"]: row for row in storage.get_logs("emu_jax", name)}
    assert storage.get_run_config("emu_jax", name)["optimizer"]["b1"] == load_config(line.__file__).optimizer.b1
    for found in (tracked, logged_by_wandb(workdir / "wandb")):
        assert sorted(found) == sorted(rows)
        for step, row in rows.items():
            numbers = {key: value for key, value in row.items() if key != "step"}
            assert all(math.isclose(found[step][tag(key)], value, rel_tol=1e-6) for key, value in numbers.items())


def test_both_have_images_and_histograms(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    pytest.importorskip("trackio")
    monkeypatch.setenv("WANDB_MODE", "offline")
    storage = _fresh_storage(monkeypatch, tmp_path / "trackio")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    seen = Observation({}, {"sheet": pixels}, {"ranks": np.array([0.0, 2.0, 2.0])})
    run = trackers.TrackedRun("a", "0123456789", tmp_path, load_config(line.__file__), {})
    both = trackers.Trackers(["wandb", "trackio"], run)
    both.log(3, {"loss": 1.0}, seen)
    both.close()
    row = logged_by_wandb(tmp_path / "wandb")[3]
    assert sum(row[f"{tag('ranks')}/values"]) == 3 and row[f"{tag('sheet')}/_type"] == "image-file"
    (tracked,) = storage.get_logs("emu_jax", storage.get_runs("emu_jax")[0])
    assert sum(tracked[tag("ranks")]["values"]) == 3
    for folder in (tmp_path / "wandb", tmp_path / "trackio"):
        (file,) = folder.rglob("*.png")
        np.testing.assert_array_equal(np.asarray(Image.open(file).convert("RGB")), pixels)


def _fresh_storage(monkeypatch, folder):
    """Trackio reads TRACKIO_DIR once, when it is imported."""
    storage = pytest.importorskip("trackio.sqlite_storage")
    monkeypatch.setattr(storage, "TRACKIO_DIR", folder)
    for module in ("utils", "run", "media.media"):
        monkeypatch.setattr(importlib.import_module(f"trackio.{module}"), "MEDIA_DIR", folder / "media")
    return storage.SQLiteStorage


class Broken:
    """Fails at the third row."""

    def __init__(self, run: trackers.TrackedRun):
        self.rows = 0

    def log(self, step, row, seen):
        self.rows += 1
        if self.rows == 3:
            raise ConnectionError("nobody answers\nat all")

    def close(self):
        raise AssertionError("it is not asked any more")


def test_a_tracker_that_fails_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trackers.TRACKERS, "broken", Broken)
    monkeypatch.setattr(trackers, "_imported", lambda package: None)
    train(load_config(line.__file__, settings()), tmp_path / "run", track=["broken"])
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    said = [text for text in lines if "track=" in text]
    expected = "emu-jax train: track=broken: nobody answers; it gets nothing more of this start"
    assert said == [f"{expected}, and metrics.jsonl has all numbers"]
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 8


def test_unknown_trackers_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    for name, said in (("wand", "track=wand: unknown; did you mean wandb?"), ("gone", "pip install 'emu-jax.gone.'")):
        monkeypatch.setitem(trackers.TRACKERS, "gone", Broken)
        with pytest.raises(UserError, match=said):
            train(load_config(line.__file__, settings()), tmp_path / "run", track=[name])
        assert not (tmp_path / "run").exists()


def test_the_commit_and_what_was_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert git_state() == {}
    commit = ["-c", "user.name=a", "-c", "user.email=a", "commit", "-q", "--allow-empty", "-m", "a"]
    for words in (["init", "-q"], commit):
        subprocess.run(["git", *words], check=True)
    (tmp_path / "a b.py").write_text("1")
    subprocess.run(["git", "add", "."], check=True)
    found = git_state()
    assert len(found["commit"]) == 40 and found["changed"] == ['"a b.py"']
