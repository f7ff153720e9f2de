"""Buckets: `gs://` by gcsfs and `s3://` by s3fs, with one rule for requests that fail.

A request that fails in passing (no connection, a reset, a time-out, a body cut short, status 408, 429 or 5xx) is sent
again, with growing pauses, until `EMU_JAX_STORAGE_TIMEOUT` seconds (600) have passed; then `TransientError` ends the
command with exit code 75. `retries()` counts them. Any other failure is raised at once: a bucket that does not exist,
missing permission and missing credentials as `UserError`. Buckets are never created. Listings are never cached, because
other processes write to the same folders.

A file that is opened for writing is uploaded whole when it is closed: an upload in parts cannot be resumed once an
answer is lost.

`use` registers these file systems with fsspec, so that all libraries that go through it or through `etils.epath`, such
as Orbax, follow the same rule. TensorStore, which reads and writes arrays, has its own drivers and retries by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import io
import os
import pathlib
import random
import re
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from etils import epath

from emu_jax.errors import TransientError, UserError

TIMEOUT = "EMU_JAX_STORAGE_TIMEOUT"
EXTRAS = {"gs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs")}  # scheme -> our extra, its package
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 20.0  # seconds
SILENCE = 60.0  # seconds without a byte, after which a connection counts as broken
# Statuses as TensorStore's messages name them.
_TRANSIENT_STATUS = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CURL error|HTTP response code: (408|429|5\d\d))"
)

_retries = 0


def retries() -> int:
    """The number of requests that this process has sent again, TensorStore's included."""
    import tensorstore

    names = [f"/tensorstore/kvstore/{kind}/retries" for kind in ("gcs", "s3")]
    found = [metric for name in names for metric in tensorstore.experimental_collect_matching_metrics(name)]
    return _retries + sum(int(value["value"]) for metric in found for value in metric["values"])


def timeout() -> float:
    """Seconds after which a request that keeps failing is given up.

    Raises:
      UserError: the environment holds no number.
    """
    text = os.environ.get(TIMEOUT, "600")
    if not re.fullmatch(r"\d{1,6}(\.\d+)?", text):
        raise UserError(f"{TIMEOUT}={text!r}; expected seconds, as in 600")
    return float(text)


def is_transient(error: BaseException) -> bool:
    """Whether an error of a library, or one that it was raised from, tells that storage could not be reached."""
    seen: BaseException | None = error
    while seen is not None:
        # JAX names a full device and a lost process by the same statuses.
        by_status = type(seen).__name__ != "JaxRuntimeError" and _TRANSIENT_STATUS.search(str(seen))
        passing = isinstance(seen, TransientError | ConnectionError | TimeoutError) or by_status
        if passing and not isinstance(seen, BrokenPipeError):  # whoever read our output has left: that is no storage
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def transient_error(error: BaseException) -> TransientError:
    """The one line for an error that `is_transient`."""
    if isinstance(error, TransientError):
        return error
    reason = (str(error).splitlines() or [""])[0][:300] or type(error).__name__
    return TransientError(f"storage or the network cannot be reached ({reason}); start the command again")


@functools.cache
def use(scheme: str) -> None:
    """Makes `scheme://` known to fsspec and `etils.epath`.

    Raises:
      UserError: its package is not installed.
    """
    extra, package = EXTRAS[scheme]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{scheme}:// needs the package {package}; install it by: pip install 'emu-jax[{extra}]'")
    timeout()
    # Otherwise TensorStore waits for ever on a connection that is silent.
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", f"{SILENCE:.0f}")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    os.environ.setdefault("EPATH_USE_TF", "false")  # TensorFlow's file system would neither retry nor count
    import fsspec

    if scheme == "gs":
        # Buckets of every kind answer the plain API; gcsfs would ask for each one's kind by gRPC first.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        for name in ("gs", "gcs"):
            fsspec.register_implementation(name, _gcs(), clobber=True)
    else:
        fsspec.register_implementation("s3", _s3(), clobber=True)


def _no_such_bucket(bucket: str) -> UserError:
    return UserError(f"{bucket}: no such bucket; create it first, or name another")


def _denied(bucket: str, reason: str) -> UserError:
    reason = " ".join(reason.split())[:200].rstrip(".")
    return UserError(
        f"{bucket}: access is denied ({reason}); name a bucket that this account may use, or another account"
    )


def _no_credentials(bucket: str, remedy: str) -> UserError:
    return UserError(f"{bucket}: no credentials are found, and the bucket is not public; {remedy}")


async def _persist(request: Callable[[], Awaitable[Any]], passing: Callable[[Exception], bool], what: str) -> Any:
    """A request's result; sent again after failures that are `passing`, until the timeout."""
    global _retries
    began, pause = time.monotonic(), FIRST_PAUSE
    while True:
        try:
            return await request()
        except Exception as error:  # `passing` knows each library's; the others are raised again
            if not passing(error):
                raise
            waited = time.monotonic() - began
            if waited > timeout():
                reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
                raise TransientError(
                    f"{what}: storage does not answer for {waited:.0f} s ({reason}); start the command again "
                    f"to resume, or wait longer by {TIMEOUT}"
                ) from error
        _retries += 1
        await asyncio.sleep(pause * random.uniform(0.5, 1.5))
        pause = min(2 * pause, LONGEST_PAUSE)


class _Upload(io.BytesIO):
    """A file that is uploaded when it is closed."""

    def __init__(self, filesystem: Any, path: str):
        super().__init__()
        self._filesystem, self._path = filesystem, path

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            self._filesystem.pipe_file(self._path, data)


class _Bucket:
    """What both file systems share, in front of their library's class.

    There are no folders to make: the libraries would create the bucket. A file is uploaded whole, and anew where the
    library has lost an upload in parts.

    Attributes:
      scheme: of its URLs.
    """

    scheme: str

    @staticmethod
    def lost_upload(error: Exception) -> bool:
        """Whether an upload in parts is not known any more."""
        raise NotImplementedError

    async def _mkdir(self, path: str, *args: Any, **kwargs: Any) -> None:
        pass

    def mkdir(self, path: str, *args: Any, **kwargs: Any) -> None:
        pass

    async def _pipe_file(self, path: str, data: bytes, **kwargs: Any) -> Any:
        request = functools.partial(super()._pipe_file, path, data, **kwargs)  # type: ignore[misc]
        return await _persist(request, self.lost_upload, f"upload of {self.scheme}://{path}")

    async def _put_file(self, lpath: str, rpath: str, **kwargs: Any) -> Any:
        request = functools.partial(super()._put_file, lpath, rpath, **kwargs)  # type: ignore[misc]
        return await _persist(request, self.lost_upload, f"upload of {self.scheme}://{rpath}")

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return _Upload(self, path) if mode == "wb" else super()._open(path, mode, **kwargs)  # type: ignore[misc]


@functools.cache
def _gcs() -> type:
    import aiohttp
    import gcsfs.core
    import gcsfs.retry

    send = gcsfs.core.GCSFileSystem._request.__wrapped__  # without gcsfs' own six tries

    def passing(error: Exception) -> bool:
        if isinstance(error, gcsfs.retry.HttpError) and str(error.code).isdigit():
            return int(error.code) in (408, 429) or int(error.code) >= 500
        return gcsfs.retry.is_retriable(error) or isinstance(error, ConnectionError | TimeoutError)

    def refused(error: Exception, path: str) -> UserError | None:
        """The error for the user, where a request is refused; not for one about the bucket itself, which few may do."""
        asked = re.search(r"\bb/([^/]+)/o\b(/?)", path)
        if not asked:
            return None
        bucket = f"gs://{asked[1]}"
        if isinstance(error, FileNotFoundError) and not asked[2] and "upload_id=" not in path:
            return _no_such_bucket(bucket)  # a listing or an upload: there is no object to miss
        if isinstance(error, gcsfs.retry.HttpError) and error.code == 401:
            return _no_credentials(
                bucket, "log in by `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"
            )
        if isinstance(error, OSError) and str(error).startswith("Forbidden"):
            return _denied(bucket, str(error).partition("\n")[2] or "403")
        return None

    class GoogleCloudStorage(_Bucket, gcsfs.core.GCSFileSystem):
        protocol = ("gs", "gcs")
        scheme = "gs"

        @staticmethod
        def lost_upload(error: Exception) -> bool:
            return isinstance(error, FileNotFoundError) and "upload_id=" in str(error)

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **(kwargs | {"use_listings_cache": False}))
            self.requests_timeout = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=SILENCE)

        async def _request(self, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
            request = functools.partial(send, self, method, path, *args, **kwargs)
            try:
                return await _persist(request, passing, f"{method} {path.format(*args)}")
            except Exception as error:  # raised again unless `refused` knows it
                if (refusal := refused(error, path.format(*args))) is not None:
                    raise refusal from error
                raise

    return GoogleCloudStorage


@functools.cache
def _s3() -> type:
    import botocore.exceptions
    import s3fs.core

    def passing(error: Exception) -> bool:
        if isinstance(error.__cause__, botocore.exceptions.ClientError):
            error = error.__cause__
        if isinstance(error, botocore.exceptions.ClientError):
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return status in (408, 429) or status >= 500
        transient = (*s3fs.core.S3_RETRYABLE_ERRORS, botocore.exceptions.ConnectionError, ConnectionError, TimeoutError)
        return isinstance(error, transient)

    def refused(error: Exception, bucket: str) -> UserError | None:
        """The error for the user, where a request is refused."""
        if isinstance(error, botocore.exceptions.NoCredentialsError):
            return _no_credentials(
                bucket, "log in by `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        if isinstance(error, PermissionError):
            return _denied(bucket, str(error) or "403")
        answer = getattr(error.__cause__, "response", {})
        return _no_such_bucket(bucket) if answer.get("Error", {}).get("Code") == "NoSuchBucket" else None

    class SimpleStorageService(_Bucket, s3fs.core.S3FileSystem):
        scheme = "s3"
        retries = 1  # `_persist` does the rest

        @staticmethod
        def lost_upload(error: Exception) -> bool:
            return "NoSuchUpload" in f"{error}{error.__cause__}"

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **(kwargs | {"use_listings_cache": False}))

        async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
            request = functools.partial(super()._call_s3, method, *args, **kwargs)
            try:
                return await _persist(request, passing, f"{method} {kwargs.get('Bucket')}/{kwargs.get('Key', '')}")
            except Exception as error:  # raised again unless `refused` knows it
                if (refusal := refused(error, f"s3://{kwargs.get('Bucket')}")) is not None:
                    raise refusal from error
                raise

    return SimpleStorageService


@contextlib.contextmanager
def staged(path: epath.Path) -> Iterator[pathlib.Path]:
    """Yields a local path at which to write a file or folder; uploads it to `path` when the block succeeds.

    Of a folder `manifest.json`, whose presence makes it complete, is uploaded last.
    """
    with tempfile.TemporaryDirectory(prefix="emu-jax-") as folder:
        local = pathlib.Path(folder, path.name)
        yield local
        if local.is_dir():
            files = sorted((f for f in local.rglob("*") if f.is_file()), key=lambda f: (f.name == "manifest.json", f))
            for file in files:
                upload(file, path / file.relative_to(local).as_posix())
        else:
            upload(local, path)


def upload(local: pathlib.Path, path: epath.Path) -> None:
    """Copies a local file to a bucket."""
    filesystem(path).put_file(str(local), str(path))


def filesystem(path: epath.Path) -> Any:
    """fsspec's file system of a bucket: the one that `etils.epath` uses."""
    import fsspec

    scheme = str(path).partition("://")[0]
    return fsspec.filesystem(scheme, **({"finalize_on_close": True} if scheme == "gs" else {}))
