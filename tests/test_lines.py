"""Files that grow by lines: the same content on a disk and in a bucket."""

import time

import pytest

from emu_jax import lines
from emu_jax.errors import TransientError
from emu_jax.lines import Lines
from emu_jax.storage import as_path


@pytest.mark.parametrize("kind", ["tmp_path", "bucket"])
def test_lines_are_there_after_flush_and_close(kind, request):
    path = request.getfixturevalue(kind) / "rows.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = Lines(path, ["1", "ü"])
    assert path.read_text(encoding="utf-8") == "1\nü\n"
    rows.add("3")
    rows.flush()
    assert path.read_text(encoding="utf-8") == "1\nü\n3\n"
    rows.add("4")
    rows.close()
    assert path.read_text(encoding="utf-8") == "1\nü\n3\n4\n"
    Lines(path, ["5"]).close()
    assert path.read_text(encoding="utf-8") == "5\n"


def test_a_bucket_gets_them_in_passing(bucket, monkeypatch):
    monkeypatch.setattr(lines, "UPLOAD_EVERY", 0.2)
    rows = Lines(bucket / "rows.jsonl")
    seen = ""
    for i in range(200):
        rows.add(str(i))
        seen = (bucket / "rows.jsonl").read_text()
        if seen:
            break
        time.sleep(0.05)
    assert seen.startswith("0\n"), seen
    rows.close()


def test_an_upload_that_failed_is_told(bucket, monkeypatch):
    rows = Lines(bucket / "rows.jsonl")
    monkeypatch.setenv("EMU_JAX_STORAGE_TIMEOUT", "0")
    rows._path = as_path("gs://no-such-bucket/rows.jsonl")
    rows.add("1")
    with pytest.raises((OSError, TransientError)):
        rows.close()
