"""Paths on local disks and in buckets: atomic writes, and JSON objects with errors for the user.

A path is a `pathlib.Path`, or for `gs://…` and `s3://…` an `etils.epath.Path`, which has the same methods. `as_path`
turns what a user names into one of them. Requests to buckets retry, as `buckets.py` describes.

    operation                  local disk                               bucket
    a file becomes visible     by a rename (`write_atomically`)         when its upload ends
    a folder becomes visible   by a rename (`write_atomically`)         by a file in it that is written last
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import gzip
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple, TypeAlias

from etils import epath

from emu_jax.errors import UserError

Path: TypeAlias = pathlib.Path | epath.Path

MAX_LINE_BYTES = 64 << 20
NO_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP})  # what a name without a file gives
SCHEMES = ("gs", "s3")  # each with an extra of its own: pip install 'emu-jax[gcs]'
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/")


def as_path(path: str | os.PathLike[str]) -> Path:
    """The path that a user names.

    Raises:
      UserError: it is a URL that is no bucket's, or the packages for that bucket are not installed.

    >>> as_path("runs/mini")
    PosixPath('runs/mini')
    >>> as_path("gs:/bucket/run")
    Traceback (most recent call last):
    emu_jax.errors.UserError: gs:/bucket/run: expected gs://<bucket>/…, with two slashes
    """
    text = os.fspath(path)
    url = _URL.match(text)
    if not url:
        return pathlib.Path(text)
    scheme = url[1]
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UserError(
            f"{text}: {scheme}:// is no storage that emu_jax reads; expected a local path, or one of {known}"
        )
    if not re.match(r"\w+://[^/]", text):
        raise UserError(f"{text}: expected {scheme}://<bucket>/…, with two slashes")
    from emu_jax import buckets  # on demand: its packages are an extra

    buckets.use(scheme)
    return epath.Path(text)


def typed_path(text: str) -> Path:
    """The path that a user typed or dropped: as it is where there is such a file, otherwise as a shell reads it.

    >>> [typed_path(text) for text in ("'my cat.png'", r"my\\ cat.png", "don't.png", "file:///tmp/my%20cat.png")]
    [PosixPath('my cat.png'), PosixPath('my cat.png'), PosixPath("don't.png"), PosixPath('/tmp/my cat.png')]

    Raises:
      UserError: as `as_path`, or there are several names.
    """
    if os.path.exists(os.path.expanduser(text)):
        return as_path(text).expanduser()
    try:
        words = shlex.split(text)
    except ValueError:  # an apostrophe
        words = [text]
    if len(words) > 1 and any(os.path.exists(os.path.expanduser(word)) for word in words):
        raise UserError(f"{text}: {len(words)} names; expected one, in quotes if it has spaces")
    if len(words) != 1:
        words = [text]
    if words[0].startswith("file://"):
        words = [urllib.parse.unquote(urllib.parse.urlsplit(words[0]).path)]
    return as_path(words[0]).expanduser()


def is_bucket(path: Path) -> bool:
    """Whether a path is in a bucket.

    >>> is_bucket(as_path("runs/mini"))
    False
    """
    return not isinstance(path, pathlib.Path)


def absolute(path: Path) -> Path:
    """A path that does not depend on the current directory, without symbolic links where it is on a local disk."""
    return path.resolve() if isinstance(path, pathlib.Path) else path


def check_local(path: str | os.PathLike[str], what: str) -> pathlib.Path:
    """A path that has to be on a local disk.

    Args:
      what: the field or argument, and why it is local; for the error.

    Raises:
      UserError: it is a URL.

    >>> check_local("gs://bucket/cache", "cache, which is memory-mapped,")
    Traceback (most recent call last):
    emu_jax.errors.UserError: gs://bucket/cache: cache, which is memory-mapped, is on a local disk; name a local path
    """
    text = os.fspath(path)
    if _URL.match(text):
        raise UserError(f"{text}: {what} is on a local disk; name a local path")
    return pathlib.Path(text)


def is_mounted_bucket(path: pathlib.Path, mounts: str | None = None) -> bool:
    """Whether a local path is on a mount of Cloud Storage FUSE, which neither appends nor renames as a disk does.

    Args:
      mounts: the text of /proc/mounts; None reads it.

    >>> mounts = "/dev/sda1 / ext4 rw 0 0\\nmy-bucket /mnt/my\\\\040bucket fuse.gcsfuse rw 0 0"
    >>> [is_mounted_bucket(pathlib.Path(path), mounts) for path in ("/mnt/my bucket/run", "/mnt/other")]
    [True, False]
    """
    if mounts is None:
        try:
            mounts = pathlib.Path("/proc/mounts").read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return False
    kinds = {line.split()[1].replace("\\040", " "): line.split()[2] for line in mounts.splitlines()}
    path = path.absolute()
    return next((kinds[str(p)] for p in (path, *path.parents) if str(p) in kinds), "") == "fuse.gcsfuse"


def partial_path(path: Path) -> Path:
    """Where `path` is written until it is complete, on a local disk."""
    return path.with_name(f"{path.name}.partial")


def remove(path: Path) -> None:
    """Removes a file, or a folder with everything in it, if there is one."""
    if not isinstance(path, pathlib.Path):
        if path.is_dir():
            path.rmtree(missing_ok=True)
        else:
            path.unlink(missing_ok=True)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def move_folder(folder: Path, to: Path) -> None:
    """Gives a folder another name, which must be free: by a rename, and in a bucket by copies of its files."""
    if not isinstance(folder, pathlib.Path):
        from emu_jax import buckets

        buckets.filesystem(folder).mv(str(folder), str(to), recursive=True)
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(to)


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yields another path at which to write a file or folder; moves it to `path` when the block succeeds.

    After an error `path` is as it was, and the partial file or folder is gone. An existing file at `path` is replaced;
    an existing folder must be empty. For a path in a bucket the other path is on a local disk, with room for all of it;
    the files of a folder are uploaded in their sorted order, `manifest.json` last.
    """
    if not isinstance(path, pathlib.Path):
        from emu_jax import buckets

        with buckets.staged(path) as partial:
            yield partial
        return
    partial = partial_path(path)
    remove(partial)  # left by a process that was killed
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk, for example, does not say where
        raise
    finally:
        remove(partial)


def copy_folder(origin: Path, target: Path) -> None:
    """Copies the files of a folder, and of the folders in it, between disks and buckets."""
    if not is_bucket(target):
        target.mkdir(parents=True, exist_ok=True)
    for path in origin.iterdir():
        if path.is_dir():
            copy_folder(path, target / path.name)
        else:
            with path.open("rb") as source, (target / path.name).open("wb") as copy:
                shutil.copyfileobj(source, copy, 8 << 20)


def replace_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically, over an earlier one."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically, over an earlier one."""
    if is_bucket(path):
        path.write_bytes(data)  # an upload is atomic
        return
    with write_atomically(path) as partial:
        partial.write_bytes(data)


class FileInfo(NamedTuple):
    """A file's size in bytes, and a text that changes when it is written again."""

    size: int
    version: str


def list_files(folder: Path) -> dict[str, FileInfo]:
    """The files of a folder by name, without those of sub-folders; none if there is no such folder.

    In a bucket the version is a digest of the contents where the bucket states one, elsewhere the time of the change.
    """
    if isinstance(folder, pathlib.Path):
        found = {}
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file():
                    found[entry.name] = _info(entry.stat())
        return found
    from emu_jax import buckets

    with contextlib.suppress(FileNotFoundError):
        entries = buckets.filesystem(folder).ls(str(folder), detail=True)
        return {
            entry["name"].rpartition("/")[2]: FileInfo(entry["size"], str(_version(entry)))
            for entry in entries
            if entry["type"] == "file"
        }
    return {}


def file_info(path: pathlib.Path) -> FileInfo | None:
    """A local file's `FileInfo`; None if there is no such file."""
    try:
        return _info(path.stat())
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        return None


def _info(status: os.stat_result) -> FileInfo:
    return FileInfo(status.st_size, str(status.st_mtime_ns))


def _version(entry: Mapping[str, Any]) -> Any:
    return next((entry[name] for name in ("md5Hash", "ETag", "mtime", "LastModified") if entry.get(name)), "")


def create_text(path: Path, text: str) -> bool:
    """Writes a new UTF-8 text file; False, and nothing is written, where one exists. Of several processes one wins."""
    try:
        if not isinstance(path, pathlib.Path):
            from emu_jax import buckets

            buckets.filesystem(path).pipe_file(str(path), text.encode(), mode="create")
            return True
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
        return True
    except FileExistsError:
        return False


def failed_download(head: bytes, size: int) -> str:
    """What stands in a file's place where its download failed, and what to do; "" where nothing shows that it did.

    Args:
      head: the file's first bytes, 1024 or all of them.
      size: the number of bytes of the whole file, or of `head` where that is not all of it.

    >>> failed_download(b"version https://git-lfs.github.com/spec/v1\\noid sha256:3f", 134)
    'a Git-LFS pointer, not the file itself; run `git lfs pull` in its repository, or download it again'
    >>> failed_download(b"Entry not found", 15)
    "the text 'Entry not found' in place of the file; look at its name and your access to it, and download it again"
    >>> failed_download(b"PK\\x03\\x04", 4)
    ''
    """
    if not size:
        return "an empty file; download it again"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git-LFS pointer, not the file itself; run `git lfs pull` in its repository, or download it again"
    if b"/annex/objects/" in head[:200]:
        return "a git-annex pointer, not the file itself; run `git annex get` in its repository, or download it again"
    start = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<!--")):
        return (
            "an HTML page, not the file itself; download the file behind the page (on Hugging Face an address with "
            "/resolve/ instead of /blob/), with your access to it"
        )
    if start.startswith((b"<?xml", b"<error>")) or re.match(rb'\{\s*"(error|message|detail)"\s*:', start):
        return "a server's error message, not the file itself; look at its name and your access, and download it again"
    try:
        line = head.decode().strip()
    except UnicodeDecodeError:
        return ""
    if size < 512 and line.isprintable() and line[:1] not in ("{", "["):
        look = "look at its name and your access to it, and download it again"
        return f"the text {line[:60]!r} in place of the file; {look}"
    return ""


def failed_file(file: Path) -> str:
    """`failed_download` of a file; "" where it cannot be read."""
    try:
        with file.open("rb") as opened:
            head = opened.read(1024)
            return failed_download(head, len(head))
    except OSError:
        return ""


class JsonFault(ValueError):
    """Bytes that are no JSON, or JSON whose texts are no Unicode.

    Attributes:
      reason: `unreadable_json` or `unreadable_text`, as `emu-jax prepare` counts them.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def decode_json(data: bytes) -> Any:
    """The JSON value in UTF-8 text, with or without a byte order mark.

    Raises:
      JsonFault: it is none, or a text in it is no Unicode.
    """
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError as error:
        start = error.start + len(data) - len(error.object)  # the codec does not count a byte order mark
        why = f"not UTF-8 at byte {start} (0x{data[start]:02x}); expected JSON, saved as UTF-8"
        raise JsonFault("unreadable_text", why) from error
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        why = f"a text holds {half}, which is half of a surrogate pair; remove it"
        raise JsonFault("unreadable_text", why) from error
    except RecursionError as error:
        raise JsonFault("unreadable_json", "not JSON (nested too deeply)") from error
    except ValueError as error:
        raise JsonFault("unreadable_json", f"not JSON ({error})") from error


def parse_json(data: bytes, where: str) -> Any:
    """The value of `decode_json`, with an error for the user.

    Args:
      where: file, and line if it has one, for errors.

    Raises:
      UserError: the bytes are no JSON, or a text in it is no Unicode.

    >>> parse_json(b'["caf\\xe9"]', "a.jsonl:3")
    Traceback (most recent call last):
    emu_jax.errors.UserError: a.jsonl:3: not UTF-8 at byte 5 (0xe9); expected JSON, saved as UTF-8
    """
    try:
        return decode_json(data)
    except JsonFault as fault:
        raise UserError(f"{where}: {fault}") from fault


class Line(NamedTuple):
    """A line of a file.

    Attributes:
      number: counts lines from 1, where reading began.
      start: the byte at which it begins.
      data: its bytes without the `\\n` that ends it, at most the limit.
      ended: whether a `\\n` ends it; the last line of a file may lack one.
      too_long: whether it is longer than the limit.
    """

    number: int
    start: int
    data: bytes
    ended: bool
    too_long: bool


def read_lines(
    stream: IO[bytes] | gzip.GzipFile, *, start: int = 0, end: int | None = None, most: int = MAX_LINE_BYTES
) -> Iterator[Line]:
    """The lines of a stream that begin before byte `end`, without those of white space alone.

    Only `\\n` ends a line, with or without a `\\r` before it: JSON may hold U+2028, U+0085 and the like inside a text.
    Memory is bounded by `most` bytes. A byte order mark at the start of the file is left out.

    Args:
      start: the byte of the file at which the stream is.

    >>> [(line.number, line.data) for line in read_lines(io.BytesIO(b'\\xef\\xbb\\xbf1\\r\\n\\n2'))]
    [(1, b'1\\r'), (3, b'2')]
    """
    number = 0
    while end is None or start < end:
        if not (data := stream.readline(most + 1)):
            return
        number, begin, ended = number + 1, start, data.endswith(b"\n")
        start += len(data)
        if too_long := not ended and len(data) > most:
            while not ended and (rest := stream.readline(1 << 20)):
                start, ended = start + len(rest), rest.endswith(b"\n")
        data = data[:most] if too_long else data.removesuffix(b"\n")
        if not begin:
            data = data.removeprefix(codecs.BOM_UTF8)
        if data.strip():
            yield Line(number, begin, data, ended, too_long)


def json_lines(file: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    """The values of JSONL with the numbers of their lines (`read_lines`).

    Args:
      file: where the data come from, for errors.

    Raises:
      UserError: as `parse_json`; names the line.
    """
    for line in read_lines(io.BytesIO(data), most=len(data)):
        yield line.number, parse_json(line.data, f"{file}:{line.number}")


def read_json_object(file: Path, expected: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
      expected: what the file should be, for errors.

    Raises:
      UserError: the file is missing, is not JSON, or holds another JSON value.
    """
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file; expected {expected}") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}); expected {expected}") from error
    try:
        value = parse_json(data, str(file))
    except UserError as error:
        why = failed_download(data[:1024], len(data))
        raise UserError(f"{file}: {why}" if why else f"{error}; expected {expected}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: not a JSON object; expected {expected}")
    return value
