"""Tar archives of samples, as webdataset and img2dataset write them, read sequentially; nothing is written to disk.

    00012.tar: 000120034.jpg 000120034.txt 000120034.json 000120035.jpg … ─ read_samples ─ Sample | Reject

Consecutive members belong to one sample if their names agree up to the first dot after the last slash. Members other
than plain files, and those whose names lead out of the archive, are left out, pickles are never opened, and every
truncation of an archive is detected: Python's own reader mistakes the end of the file for the end of the archive.
"""

from __future__ import annotations

import dataclasses
import re
import tarfile
import unicodedata
from collections.abc import Iterator
from typing import IO

from emu_jax.data.raw.compressed import CutError, unpacked
from emu_jax.data.raw.files import opened, shard_name
from emu_jax.data.raw.reader import Reject
from emu_jax.errors import UserError

BLOCK = 512
RECORD_BYTES = 10_240  # tar programs pad an archive to a multiple of it by default
MAX_MEMBER_BYTES = 256 << 20
MAX_HEADER_BYTES = 1 << 20  # of an extended header
MAX_NAME_CHARACTERS = 4096
CHUNK = 1 << 20
PICKLES = {"pkl", "pickle", "pyd", "pt", "pth"}
FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
WITHOUT_DATA = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a pipe",
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """Members that share a name: `members["jpg"]` are the bytes of `name.jpg`."""

    name: str
    members: dict[str, bytes]


@dataclasses.dataclass(frozen=True)
class _Member:
    name: str
    data: bytes


class _Cut(Exception):
    """The archive is truncated.

    Args:
      lost: whether samples may be lost.
      member: name of the member that is incomplete, if known.
    """

    def __init__(self, detail: str, lost: bool = True, member: str = ""):
        super().__init__(detail)
        self.lost, self.member = lost, member


class _Blocks:
    """A stream of blocks that counts its position."""

    def __init__(self, stream: IO[bytes]):
        self._stream, self.position = stream, 0

    def some(self, size: int) -> bytes:
        """Reads `size` bytes, or fewer at the end of the stream."""
        data = self._stream.read(size)
        self.position += len(data)
        return data

    def exactly(self, size: int, member: str = "") -> bytes:
        """Reads `size` bytes of a member, or of a header if it has no name; raises `_Cut` at the end of the stream."""
        data = self.some(size)
        if len(data) < size:
            what = f"member {ascii(member)[:200]}" if member else "a header"
            raise _Cut(f"ends within {what}, at byte {self.position}", member=member)
        return data

    def padded(self, size: int, member: str = "") -> bytes:
        """Reads `size` bytes and the padding of their last block."""
        data = self.exactly(size, member)
        self.exactly(-size % BLOCK, member)
        return data

    def skip(self, size: int, member: str) -> None:
        left = size + -size % BLOCK
        while left:
            left -= len(self.exactly(min(left, CHUNK), member))


def read_samples(
    shard: str, max_member_bytes: int = MAX_MEMBER_BYTES, record_bytes: int = RECORD_BYTES
) -> Iterator[Sample | Reject]:
    """The samples of a .tar, .tar.gz or .tar.zst, in order, and rejects for what was left out.

    The sample in which an archive is truncated is not yielded, because members of it may be missing.

    Args:
      max_member_bytes: limit for a member, and for all members of a sample together.
      record_bytes: Python's and GNU's tar pad archives to a multiple of it, so even a truncated padding is detected. An
        archive that `tar -b` wrote with another factor would be reported as truncated, though all its samples are
        yielded: pass 512 for such archives.

    Raises:
      UserError: the file cannot be opened.
    """
    name = shard_name(shard)
    try:
        with opened(shard) as file:
            members = _members(_Blocks(unpacked(file)), name, max_member_bytes, record_bytes)
            yield from _samples(members, name, max_member_bytes)
    except OSError as error:
        raise UserError(f"{shard}: cannot be opened ({error.strerror}); expected a tar archive") from error


def _samples(members: Iterator[_Member | Reject], name: str, max_bytes: int) -> Iterator[Sample | Reject]:
    """Members -> samples; the last one is yielded when the archive is known to be complete."""
    seen: set[str] = set()
    sample, room = None, 0

    def close() -> Iterator[Sample | Reject]:
        if sample is None:
            return
        if sample.name in seen:
            yield Reject(f"{name}/{sample.name}", "repeated_key", "an earlier sample in the archive has this name")
        else:
            seen.add(sample.name)
            yield sample

    try:
        for member in members:
            if isinstance(member, Reject):
                yield member
                continue
            key, extension = _split(member.name)
            if not key:
                continue
            if sample is None or sample.name != key:
                yield from close()
                sample, room = Sample(key, {}), max_bytes
            room -= len(member.data) + BLOCK
            if extension in sample.members:
                detail = f"a second .{extension} of sample {key}"
                yield Reject(f"{name}/{member.name}", "repeated_member", detail, whole=False)
            elif room < -BLOCK:
                detail = f"sample {key} has more than {max_bytes} bytes"
                yield Reject(f"{name}/{member.name}", "member_too_large", detail, whole=False)
            else:
                sample.members[extension] = member.data
    except _Cut as cut:
        broken, _ = _split(cut.member)
        lost = f"; sample {broken} is left out" if broken else ""
        if not cut.lost or (broken and sample and sample.name != broken):
            yield from close()
        elif sample:
            lost = f"; sample {sample.name}, which may miss members, is left out"
        yield Reject(name, "cut_shard", f"{name} {cut}{lost}", whole=cut.lost)
    else:
        yield from close()


def _split(member: str) -> tuple[str, str]:
    """A member's name -> its sample's name and its extension, by webdataset's rules; both "" if it has no sample.

    An extension that would hold white space, as of "Screenshot 9.41 AM.png", begins at the last dot instead.
    """
    folder, slash, base = member.rpartition("/")
    stem, dot, extension = base.partition(".")
    if any(map(str.isspace, extension)):
        stem, dot, extension = base.rpartition(".")
    if not stem or not dot or (stem.startswith("__") and stem.endswith("__")):
        return "", ""
    return f"{folder}{slash}{stem}", extension.lower()


def _members(blocks: _Blocks, name: str, max_bytes: int, record_bytes: int) -> Iterator[_Member | Reject]:
    """The plain files of an archive; raises `_Cut` where it is truncated."""
    try:
        yield from _headers(blocks, name, max_bytes, record_bytes)
    except (CutError, OSError) as error:
        detail = f"cannot be unpacked beyond byte {blocks.position} ({str(error) or type(error).__name__})"
        raise _Cut(detail) from error


def _headers(blocks: _Blocks, name: str, max_bytes: int, record_bytes: int) -> Iterator[_Member | Reject]:
    extended: dict[str, str] = {}
    filled = True  # whether the archive's writer pads it
    members = 0
    while True:
        start = blocks.position
        block = blocks.some(BLOCK)
        if not block:
            raise _Cut(f"ends without an end marker, at byte {start}")
        if len(block) < BLOCK:
            raise _Cut(f"ends within a header, at byte {blocks.position}")
        if not any(block):
            yield from _end(blocks, name, record_bytes if filled and members else BLOCK)
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.HeaderError as error:
            raise _Cut(f"has a damaged header at byte {start} ({error})") from error
        members += 1
        # Headers of Python's and GNU's tar look like this; other writers set the device numbers of all members.
        filled = filled and block[257:262] == b"ustar" and block[154:156] == b"\0 " and not any(block[329:345])
        size = header.size
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE):
            if not 0 <= size <= MAX_HEADER_BYTES:
                raise _Cut(f"has an extended header of {size} bytes at byte {start}")
            data = blocks.padded(size)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                extended["path"] = data.partition(b"\0")[0].decode("utf-8", "backslashreplace")
            elif header.type == tarfile.XHDTYPE:
                extended.update(_pax(data, start))
            continue  # targets of long links and global headers are not needed
        if "size" in extended:
            size = int(extended["size"]) if re.fullmatch("[0-9]{1,18}", extended["size"]) else -1
        if size < 0:
            raise _Cut(f"has a damaged header at byte {start} (size)")
        path = extended.get("path", header.name)
        sparse = header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in extended)
        extended = {}
        if header.type == tarfile.GNUTYPE_SPARSE and block[482]:
            while blocks.exactly(BLOCK)[504]:
                pass
        if header.type in WITHOUT_DATA:
            size = 0
        path, reason, detail = _judge(path, WITHOUT_DATA.get(header.type), sparse, header.type)
        if header.type == tarfile.DIRTYPE and not reason:
            continue
        key = f"{name}/{path}"
        if reason:
            yield Reject(key, reason, detail, whole=False)
        elif PICKLES.intersection(path.rpartition("/")[2].lower().split(".")[1:]):
            yield Reject(key, "pickle_member", "a pickle, which is never opened because it can run code", whole=False)
        elif size > max_bytes:
            yield Reject(key, "member_too_large", f"{size} bytes; at most {max_bytes} are read", whole=False)
        else:
            yield _Member(path, blocks.padded(size, path))
            continue
        blocks.skip(size, path)


def _judge(path: str, kind: str | None, sparse: bool, type_flag: bytes) -> tuple[str, str, str]:
    """A member's name in a form fit for a key, and the reason and detail why it is left out, or "" twice.

    A name may hold any character, such as the wide space of Japanese or the narrow one of a screenshot's time. Those
    that would break a line, or reorder it on a screen, are escaped.
    """
    shown = "".join(map(_escaped, path))
    clean = "/".join(part for part in shown.split("/") if part not in ("", "."))
    if len(path) > MAX_NAME_CHARACTERS:
        return clean[:200], "unread_member", f"a name of {len(path)} characters; at most {MAX_NAME_CHARACTERS}"
    if path.startswith("/"):
        return clean, "unsafe_member", "an absolute path"
    if ".." in path.split("/"):
        return clean, "unsafe_member", "the path leads out of the archive"
    if kind and type_flag != tarfile.DIRTYPE:
        return clean, "unread_member", kind
    if sparse:
        return clean, "unread_member", "a sparse file"
    if not kind and type_flag not in FILES:
        return clean, "unread_member", f"of the unknown type {type_flag.decode('latin-1')!a}"
    return clean, "", ""


def _escaped(character: str) -> str:
    """The character, or its escape if it ends a line, steers a terminal or changes the direction of writing."""
    steers = unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs") or (
        unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    )
    return ascii(character)[1:-1] if steers else character


def _pax(data: bytes, start: int) -> dict[str, str]:
    """Records of an extended header, each "<length> <key>=<value>\\n"."""
    records = {}
    while data.strip(b"\0"):
        length, space, _ = data.partition(b" ")
        size = int(length) if length.isdigit() and len(length) < 8 else 0
        record = data[len(length) + 1 : size]
        key, equals, value = record.partition(b"=")
        if not space or not equals or not record.endswith(b"\n"):
            raise _Cut(f"has a damaged extended header at byte {start}")
        records[key.decode("utf-8", "backslashreplace")] = value[:-1].decode("utf-8", "backslashreplace")
        data = data[size:]
    return records


def _end(blocks: _Blocks, name: str, record_bytes: int) -> Iterator[Reject]:
    """Checks what follows the first block of the end marker: a second one, then only zeros up to a complete record."""
    start = blocks.position - BLOCK
    block = blocks.some(BLOCK)
    if len(block) < BLOCK:
        raise _Cut(f"ends within its end marker, at byte {blocks.position}", lost=False)
    if any(block):
        raise _Cut(f"has a block of zeros where a header is expected, at byte {start}")
    while chunk := blocks.some(CHUNK):
        if any(chunk):
            detail = f"data follow the end marker at byte {start} and are not read; were archives joined by cat?"
            yield Reject(name, "data_after_end", detail)
            return
    if blocks.position % record_bytes:
        detail = (
            f"ends within the padding after its end marker: {blocks.position} bytes, not a multiple of {record_bytes}"
        )
        raise _Cut(detail, lost=False)
