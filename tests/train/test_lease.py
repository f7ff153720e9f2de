"""One run a work directory: leases on disks and in buckets, holders that live, died, sleep or are elsewhere."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from emu_jax.errors import UserError
from emu_jax.train import lease
from emu_jax.train.lease import FILE, Holder, Lease, check_shared

HOLD = """
import sys, time
from emu_jax.storage import as_path
from emu_jax.train.lease import Lease
with Lease(as_path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(request):
    """Starts a process that holds a folder's lease."""
    started = []

    def start(folder) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", ["tmp_path", "bucket"])
def test_a_second_run_is_refused_until_the_first_is_gone(kind, request, holder):
    folder = request.getfixturevalue(kind) / "run"
    first = holder(folder)
    expected = (
        f"workdir={folder}: another run trains in it (host {Holder.current().host}, process {first.pid}); "
        "stop that one first, or use a new work directory"
    )
    with pytest.raises(UserError) as raised, Lease(folder):
        pass
    assert str(raised.value) == expected
    first.send_signal(signal.SIGSTOP)  # paused, but not gone
    with pytest.raises(UserError) as raised, Lease(folder):
        pass
    assert str(raised.value) == expected
    first.kill()
    first.wait()
    with Lease(folder):
        assert (folder / FILE).exists()
    assert not (folder / FILE).exists()


def test_a_holder_elsewhere_is_watched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lease, "PATIENCE", 3.0)
    away = dataclasses.replace(Holder.current(), machine="tpu-7 boot pid", process=12)
    (tmp_path / FILE).write_text(json.dumps(dataclasses.asdict(away)))
    with Lease(tmp_path):
        held = json.loads((tmp_path / FILE).read_text())
        assert held["run"] != away.run
    assert "is of a run on tpu-7, process 12; waiting up to 3 s to see whether it lives" in capsys.readouterr().err
    # Another one, whose beat goes on.
    (tmp_path / FILE).write_text(json.dumps(dataclasses.asdict(away)))
    write = f"""
import json, pathlib, time
time.sleep(1.5)
file = pathlib.Path({str(tmp_path / FILE)!r})
file.write_text(json.dumps(json.loads(file.read_text()) | {{"beat": 1}}))
"""
    with subprocess.Popen([sys.executable, "-c", write]), pytest.raises(UserError, match="another run trains in it"):
        monkeypatch.setattr(lease, "PATIENCE", 20.0)
        with Lease(tmp_path):
            pass


def test_a_run_that_lost_its_lease_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.2)
    with Lease(tmp_path) as held:
        first = json.loads((tmp_path / FILE).read_text())["beat"]
        while json.loads((tmp_path / FILE).read_text() or "{}").get("beat", 0) <= first:
            time.sleep(0.05)
        held.check()
        other = dataclasses.replace(Holder.current(), machine="tpu-7 boot pid", process=12)
        (tmp_path / FILE).write_text(json.dumps(dataclasses.asdict(other)))
        time.sleep(0.6)
        with pytest.raises(UserError, match=r"a run on tpu-7, process 12, has taken it over"):
            held.check()
    assert json.loads((tmp_path / FILE).read_text())["run"] == other.run  # the other one's is left


def test_a_process_that_sees_another_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "SHARED_WITHIN", 1.0)
    with Lease(tmp_path / "a") as held:
        check_shared(tmp_path / "a", held.run, 3)
        (tmp_path / "b").mkdir()
        with pytest.raises(UserError, match=r"process 3 does not see the lease\.json that process 0 has just written"):
            check_shared(tmp_path / "b", held.run, 3)


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="nothing can be written there"), Lease(tmp_path / "file" / "run"):
        pass


def test_a_reused_process_number_is_another_process(tmp_path):
    old = dataclasses.replace(Holder.current(), process=os.getppid(), started=1)
    assert old.is_alive() is False
    (tmp_path / FILE).write_text(json.dumps(dataclasses.asdict(old)))
    with Lease(tmp_path):
        pass
