"""Buckets: one API for both kinds, and a network that fails in passing loses nothing."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from emu_jax import buckets
from emu_jax.errors import TransientError, UserError
from emu_jax.storage import as_path, is_bucket, read_json_object, remove, replace_text, write_atomically
from tests.buckets import FaultyProxy, free_port, gcs_environment, gcs_server, s3_environment

LARGE = bytes(range(256)) * 40_000  # 10 MB: two requests of an upload


@pytest.mark.parametrize("kind", ["bucket", "s3_bucket"])
def test_files_and_folders(kind, request):
    folder = request.getfixturevalue(kind)
    assert is_bucket(folder) and not folder.exists()
    replace_text(folder / "a.json", '{"a": 1}')
    replace_text(folder / "a.json", '{"a": "ü"}')
    assert read_json_object(folder / "a.json", "an object") == {"a": "ü"}
    with write_atomically(folder / "records") as partial:
        (partial / "inner").mkdir(parents=True)
        (partial / "manifest.json").write_text("{}")
        (partial / "inner" / "large").write_bytes(LARGE)
        assert not (folder / "records").exists()
    assert sorted(path.name for path in (folder / "records").iterdir()) == ["inner", "manifest.json"]
    assert (folder / "records" / "inner" / "large").read_bytes() == LARGE
    remove(folder / "records")
    remove(folder / "never there")
    assert [path.name for path in folder.iterdir()] == ["a.json"]


def test_an_error_uploads_nothing(bucket):
    with pytest.raises(RuntimeError), write_atomically(bucket / "a") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert not (bucket / "a").exists()


def test_others_files_are_seen_at_once(bucket):
    assert not (bucket / "late").exists() and not bucket.is_dir()
    program = f"from emu_jax.storage import as_path; as_path('{bucket}/late').write_bytes(b'1')"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (bucket / "late").exists() and [path.name for path in bucket.iterdir()] == ["late"]


@pytest.mark.parametrize(
    "path, error",
    [
        ("hdfs://host/a", "hdfs:// is no storage that emu_jax reads; expected a local path, or one of gs://, s3://"),
        ("gs:/bucket/a", "expected gs://<bucket>/…, with two slashes"),
        ("gs:///a", "expected gs://<bucket>/…, with two slashes"),
    ],
)
def test_urls_of_no_bucket_are_refused(path, error):
    with pytest.raises(UserError) as raised:
        as_path(path)
    assert str(raised.value) == f"{path}: {error}"


def write_and_read(folder: str) -> str:
    """A program that writes, lists and reads in a bucket, and prints how many requests it has sent again."""
    return f"""
from emu_jax import buckets
from emu_jax.storage import as_path
folder = as_path("{folder}")
data = bytes(range(256)) * 8192
for i in range(30):
    (folder / f"{{i:02}}").write_bytes(data[i:])
assert sorted(path.name for path in folder.iterdir()) == [f"{{i:02}}" for i in range(30)]
for i in range(30):
    assert (folder / f"{{i:02}}").read_bytes() == data[i:], i
print(buckets.retries())
"""


@pytest.mark.long
def test_a_faulty_network_loses_nothing(tmp_path):
    (tmp_path / "bucket").mkdir()
    port = free_port()
    with FaultyProxy(port, 0.3) as proxy, gcs_server(tmp_path, proxy.url, port):
        program = [sys.executable, "-c", write_and_read("gs://bucket/run")]
        done = subprocess.run(program, env=child(gcs_environment(proxy.url)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 10 and all(proxy.counts[fault] for fault in ("drop", "reset", "503", "truncate", "lose"))


def test_a_bucket_that_is_down_is_transient(tmp_path):
    (tmp_path / "bucket").mkdir()
    port = free_port()
    with FaultyProxy(port, 1.0, faults=("503", "reset")) as proxy, gcs_server(tmp_path, proxy.url, port):
        variables = gcs_environment(proxy.url) | {buckets.TIMEOUT: "2"}
        program = "from emu_jax.storage import as_path; as_path('gs://bucket/a').read_text()"
        done = subprocess.run([sys.executable, "-c", program], env=child(variables), capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert "TransientError: GET b/bucket/o/a: storage does not answer for" in last, done.stderr[-2000:]
    assert buckets.TIMEOUT in last


@pytest.mark.parametrize("kind", ["bucket", "s3_bucket"])
def test_a_bucket_that_does_not_exist_is_not_created(kind, request):
    absent = as_path(str(request.getfixturevalue(kind)).replace("://bucket/", "://absent/"))
    absent.mkdir(parents=True, exist_ok=True)
    absent.mkdir(exist_ok=True)
    for use in (absent.exists, absent.is_dir, lambda: list(absent.iterdir()), lambda: (absent / "a").write_bytes(b"1")):
        with pytest.raises(UserError) as raised:
            use()
        where = f"{str(absent).partition('://')[0]}://absent"
        assert str(raised.value) == f"{where}: no such bucket; create it first, or name another"


@pytest.mark.parametrize(
    "scheme, status, variables, expected",
    [
        ("gs", 401, {}, "no credentials are found, and the bucket is not public; log in by `gcloud auth"),
        ("gs", 403, {}, "access is denied (try another way); name a bucket that this account may use"),
        ("s3", 403, {}, "access is denied (Forbidden); name a bucket that this account may use"),
        ("s3", 200, {"AWS_ACCESS_KEY_ID": "", "HOME": "/nowhere"}, "no credentials are found, and the bucket is not"),
    ],
)
def test_a_refusal_is_an_error_of_the_user(scheme, status, variables, expected):
    program = f"""
from emu_jax.errors import UserError
from emu_jax.storage import as_path
path = as_path("{scheme}://bucket/a")
for use in (path.exists, path.read_bytes, lambda: path.write_bytes(b"1"), lambda: list(path.iterdir())):
    try:
        use()
    except UserError as error:
        print(error)
"""
    with FaultyProxy(free_port(), 1.0, faults=(str(status),)) as proxy:
        variables = gcs_environment(proxy.url) | s3_environment(proxy.url) | variables | {buckets.TIMEOUT: "5"}
        done = subprocess.run([sys.executable, "-c", program], env=child(variables), capture_output=True, text=True)
    assert done.stdout.count(f"{scheme}://bucket: {expected}") == 4, done.stdout + done.stderr[-2000:]


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(buckets.EXTRAS, "gs", ("gcs", "package_that_is_not_installed"))
    with pytest.raises(UserError) as raised:
        buckets.use.__wrapped__("gs")
    expected = "gs:// needs the package package_that_is_not_installed; install it by: pip install 'emu-jax[gcs]'"
    assert str(raised.value) == expected


def test_what_is_transient():
    cause = ValueError("UNAVAILABLE: CURL error")
    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = cause
    assert buckets.is_transient(wrapped) and buckets.is_transient(ConnectionResetError())
    assert buckets.is_transient(TransientError("down"))
    assert not buckets.is_transient(ValueError("NOT_FOUND: no such key"))
    assert not buckets.is_transient(FileNotFoundError("a"))
    assert not buckets.is_transient(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"))


def child(variables: dict[str, str]) -> dict[str, str]:
    """The environment of a process that uses another server."""
    import os

    return {**os.environ, **variables, "PYTHONPATH": str(Path(__file__).parents[1])}
