"""Images by name, from a folder or from a tar, which is read in place and never unpacked; and data: URLs."""

from __future__ import annotations

import tarfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from emu_jax.data.forgiving_base64 import decode_base64
from emu_jax.data.raw.files import MAX_IMAGE_BYTES, Skip, read_image, shard_name
from emu_jax.data.raw.reader import Reject
from emu_jax.errors import UserError


class ImageFiles:
    """The images of a shard: a folder, or a plain tar. Of a truncated tar, the images before the break are found."""

    def __init__(self, path: Path):
        self._path, self._cut = path, ""
        self._places: dict[str, tuple[int, int]] | None = None
        if path.is_file():
            self._file = path.open("rb")
            self._places = self._find()

    def faults(self, shard: str) -> Iterator[Reject]:
        """A reject if the shard's tar is truncated."""
        if self._cut:
            yield Reject(f"{shard_name(shard)}#images", "cut_shard", self._cut, whole=False)

    def _find(self) -> dict[str, tuple[int, int]]:
        """First byte and size of each member, by name: the names are held in memory, the images are not."""
        places: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as archive:
                while member := archive.next():
                    if member.isreg():
                        places.setdefault(member.name.removeprefix("./"), (member.offset_data, member.size))
                    archive.members = []  # type: ignore[attr-defined]  # private to typeshed; otherwise it keeps every header
        except (tarfile.TarError, OSError, ValueError) as error:
            self._cut = f"{self._path.name} breaks off after {len(places)} images ({error})"
        return places

    def read(self, name: object) -> bytes:
        """The encoded image `name`, which is not trusted.

        Raises:
          Skip: it is missing, or too large.
        """
        if self._places is None:
            return read_image(self._path, name)
        if not isinstance(name, str) or name not in self._places:
            raise Skip("missing_image", f"no member {ascii(name)[:200]} in {self._path.name}")
        start, size = self._places[name]
        if size > MAX_IMAGE_BYTES:
            raise Skip("image_too_large", f"{name} has {size} bytes; at most {MAX_IMAGE_BYTES}")
        self._file.seek(start)
        data = self._file.read(size)
        if not data or len(data) < size:
            raise Skip("missing_image", f"{name} is empty or breaks off in {self._path.name}")
        return data

    def __enter__(self) -> ImageFiles:
        return self

    def __exit__(self, *_: object) -> None:
        if self._places is not None:
            self._file.close()


def beside(shard: str, setting: str) -> Path:
    """The path that a setting names, relative to the shard; `{shard}` is the shard's name up to its first dot."""
    file = Path(shard)
    return file.parent / setting.replace("{shard}", file.name.partition(".")[0])


def check_beside(where: str, shards: list[str], setting: str) -> None:
    """Raises unless the images of every shard exist: without them, every document would be a reject."""
    for shard in shards:
        path = beside(shard, setting)
        if path.is_file():
            try:
                tarfile.open(path, "r:").close()
            except (tarfile.TarError, OSError) as error:
                raise UserError(
                    f"{where}={setting!r}: {path} is no plain tar ({error}); expected a folder or a .tar without gzip"
                ) from error
        if not path.exists():
            raise UserError(
                f"{where}={setting!r}: {path} is not there; expected the images of {shard_name(shard)}, a folder or "
                "a plain .tar; a relative path starts at the shard, and {shard} stands for its name"
            )


def data_address(address: str) -> bytes:
    """The encoded image in a data: URL.

    >>> data_address("data:image/png;base64,aGk"), data_address("DATA:;Base64,a G k=")
    (b'hi', b'hi')

    Raises:
      Skip: there is none.
    """
    head, comma, body = address.partition(",")
    kind, *parameters = (part.strip().lower() for part in head.partition(":")[2].split(";"))
    if not comma or (kind and not kind.startswith("image/") and not kind.endswith("/octet-stream")):
        raise Skip("unreadable_image", f"not an image: {ascii(address)[:60]}")
    try:
        data = decode_base64(body) if parameters[-1:] == ["base64"] else urllib.parse.unquote_to_bytes(body)
    except ValueError as error:
        raise Skip("unreadable_image", f"{ascii(head)[:60]}: {error}") from error
    if not data:
        raise Skip("unreadable_image", f"{ascii(head)[:60]} is empty")
    return data
