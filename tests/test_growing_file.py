"""Files that grow: the same content on a disk and in a bucket."""

import resource
import time

import pytest

from emu_jax import growing_file
from emu_jax.errors import UserError
from emu_jax.growing_file import GrowingFile
from emu_jax.storage import as_path


@pytest.mark.parametrize("kind", ["tmp_path", "bucket"])
def test_the_data_are_there_after_flush_and_close(kind, request):
    path = request.getfixturevalue(kind) / "rows.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = GrowingFile(path, "1\nü\n".encode())
    assert path.read_text(encoding="utf-8") == "1\nü\n"
    rows.add(b"3\n")
    rows.flush()
    assert path.read_text(encoding="utf-8") == "1\nü\n3\n"
    rows.add(b"4\n")
    rows.close()
    assert path.read_text(encoding="utf-8") == "1\nü\n3\n4\n"
    GrowingFile(path, b"5\n").close()
    assert path.read_text(encoding="utf-8") == "5\n"


def test_a_bucket_gets_them_in_passing(bucket, monkeypatch):
    monkeypatch.setattr(growing_file, "UPLOAD_EVERY", 0.2)
    rows = GrowingFile(bucket / "rows.jsonl")
    seen = ""
    for i in range(200):
        rows.add(b"%d\n" % i)
        seen = (bucket / "rows.jsonl").read_text()
        if seen:
            break
        time.sleep(0.05)
    assert seen.startswith("0\n"), seen
    rows.close()


def test_an_upload_that_failed_is_told(bucket, monkeypatch):
    rows = GrowingFile(bucket / "rows.jsonl")
    monkeypatch.setenv("EMU_JAX_STORAGE_TIMEOUT", "0")
    rows._path = as_path("gs://no-such-bucket/rows.jsonl")
    rows.add(b"1")
    with pytest.raises(UserError, match="gs://no-such-bucket: no such bucket"):
        rows.close()


def test_a_disk_takes_all_or_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = GrowingFile(path, b"1\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, limits[1]))  # the kernel writes the first three bytes
    try:
        with pytest.raises(OSError, match=r"rows\.jsonl"):
            rows.add(b"22222\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    rows.add(b"3\n")
    assert path.read_bytes() == b"1\n3\n"
