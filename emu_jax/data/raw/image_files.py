"""Images by name: a folder, or a tar that is read where they stand; nothing is unpacked."""

from __future__ import annotations

import base64
import tarfile
import urllib.parse
from pathlib import Path

from emu_jax.data.raw.files import MAX_IMAGE_BYTES, Skip, read_image, shard_name
from emu_jax.errors import UserError


class Images:
    """The images that belong to a shard.

    Attributes:
      cut: what is wrong with a tar that breaks off; its images before that place are there.
    """

    def __init__(self, path: Path):
        self._path, self.cut = path, ""
        self._places: dict[str, tuple[int, int]] | None = None
        if path.is_file():
            self._file = path.open("rb")
            self._places = self._find()

    def _find(self) -> dict[str, tuple[int, int]]:
        """Where each member's bytes are: memory for names, none for images."""
        places: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as archive:
                while member := archive.next():
                    if member.isreg():
                        places.setdefault(member.name.removeprefix("./"), (member.offset_data, member.size))
                    archive.members = []  # type: ignore[attr-defined]  # private to typeshed; it would keep every header
        except (tarfile.TarError, OSError, ValueError) as error:
            self.cut = f"{self._path.name} breaks off after {len(places)} images ({error})"
        return places

    def read(self, name: object) -> bytes:
        """The encoded image.

        Raises:
          Skip: it is not there, or too large.
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

    def __enter__(self) -> Images:
        return self

    def __exit__(self, *_: object) -> None:
        if self._places is not None:
            self._file.close()


def beside(shard: str, setting: str) -> Path:
    """A path of the settings, relative to the shard; `{shard}` in it is the shard's name up to the first dot."""
    file = Path(shard)
    return file.parent / setting.replace("{shard}", file.name.partition(".")[0])


def check_beside(where: str, shards: list[str], setting: str) -> None:
    """Raises unless every shard's images are there: without them every document would be a reject."""
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
    """The image within a data: address.

    Raises:
      Skip: it holds none.
    """
    head, comma, body = address.partition(",")
    if not comma or not head.lower().startswith("data:image/"):
        raise Skip("unreadable_image", f"no image: {address[:60]}")
    data = urllib.parse.unquote_to_bytes(body)
    if head.lower().endswith(";base64"):
        try:
            data = base64.b64decode(b"".join(data.split()))
        except ValueError as error:
            raise Skip("unreadable_image", f"{head[:60]}: {error}") from error
    if not data:
        raise Skip("unreadable_image", f"{head[:60]} is empty")
    return data
