"""A folder of plain HTML pages with their images -> web documents.

    site/guide/cats.html, site/images/cat.png ─ Html ─ Text("Cats\\nA cat:"), RawImage, Text("asleep")

`page_text` defines what is read of a page. An image is left out as decoration if the page states the size of an icon,
or if many pages show it, such as arrows, logos and signs of notes. Nothing outside the folder is read.
"""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import functools
import os
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from emu_jax.data.document import Text
from emu_jax.data.raw.files import LOCAL, MAX_IMAGE_BYTES, Skip, walk
from emu_jax.data.raw.image_files import data_address
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.data.raw.web import Found, check_similarity, finish
from emu_jax.errors import UserError
from emu_jax.storage import check_local

MAX_PAGE_BYTES = 16 << 20
SAMPLED_PAGES = 500  # pages, spread evenly, on which the repeated images are counted
MIN_REPEATED_PAGES = 5  # pages that must show an image before it counts as repeated


@dataclasses.dataclass(frozen=True)
class Html:
    """One document per page of a folder, which is searched recursively.

    Attributes:
      include, exclude: patterns of paths within the folder; `*` also matches slashes, as in `*/de/*`.
      drop: patterns of classes and ids whose elements are furniture, in addition to `page_text`'s.
      decorations: patterns of paths of images that are decorations.
      icon_side: images with a stated width or height of at most so many pixels are icons.
      repeated: an image that more than this share of the pages show is a decoration.
      require_image: whether pages without images are left out.
      pages_per_shard: number of pages per shard.
      clip: folder of CLIP weights, to leave out images whose similarity to the text after them is less than
        `min_similarity`; "" keeps all.
    """

    about: ClassVar[str] = "web documents: HTML pages and their images"
    kind: ClassVar[str] = "web"
    include: Sequence[str] = ("*.html", "*.htm", "*.xhtml")
    exclude: Sequence[str] = ()
    drop: Sequence[str] = ()
    decorations: Sequence[str] = ()
    icon_side: int = 32
    repeated: float = 0.2
    require_image: bool = True
    pages_per_shard: int = 64
    clip: str = ""
    min_similarity: float = 0.32

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "drop", "decorations"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise UserError(f"Html.{name}={value!r}; expected a list of patterns, as [{value!r}]")
            object.__setattr__(self, name, tuple(value))  # a list becomes hashable
        if self.pages_per_shard < 1:
            raise UserError(f"Html.pages_per_shard={self.pages_per_shard}; expected at least 1")
        if not 0.0 < self.repeated <= 1.0:
            raise UserError(f"Html.repeated={self.repeated}; expected a share of pages above 0, at most 1")
        check_similarity("Html", self.min_similarity)

    def shards(self, path: str) -> list[str]:
        if not check_local(path, LOCAL).is_dir():
            raise UserError(f"{path}: no such folder; expected a folder of HTML pages")
        pages, _ = _survey(self, path)
        if not pages:
            wanted = ", ".join(self.include)
            raise UserError(f"{path}: no page matches include {wanted} and no exclude; expected a folder of HTML pages")
        starts = range(0, len(pages), self.pages_per_shard)
        return [f"{path}//pages@{start}-{min(start + self.pages_per_shard, len(pages))}" for start in starts]

    def read(self, shard: str) -> Iterator[RawDocument | Reject]:
        root, _, name = shard.rpartition("//")
        start, stop = name.removeprefix("pages@").split("-")
        pages, decorations = _survey(self, root)
        for page in pages[int(start) : int(stop)]:
            yield from self._document(Path(root), page, decorations)

    def _document(self, root: Path, page: str, decorations: frozenset[str]) -> Iterator[RawDocument | Reject]:
        page_text = _page_text()
        key = page.encode("utf-8", "backslashreplace").decode()  # a file name may not be UTF-8
        try:
            tree = page_text.parse_page(_page_bytes(root, page))
        except Skip as skip:
            yield skip.reject(key)
            return
        if tree is None:
            yield Reject(key, "no_text", "the page is empty")
            return
        base, rejects, count = page_text.base_of(tree), [], 0

        def image(element: Any) -> Found | None:
            nonlocal count
            source = page_text.source_of(element)
            if not source:
                return None
            number, count = count, count + 1
            try:
                sides = page_text.stated_sides(element)
                if sides and min(sides) <= self.icon_side:
                    raise Skip("decoration", f"{source[:200]} is an icon of {' x '.join(map(str, sides))} pixels")
                return Found(number, RawImage(self._image(root, page, base, source, decorations)))
            except Skip as skip:
                rejects.append(skip.reject(f"{key}#{number}", whole=False))
                return None

        parts = page_text.read_page(tree, image, self.drop)
        yield from rejects
        yield from finish(
            key,
            [Text(part) if isinstance(part, str) else part for part in parts],
            require_image=self.require_image,
            clip=self.clip,
            least=self.min_similarity,
        )

    def _image(self, root: Path, page: str, base: str, source: str, decorations: frozenset[str]) -> bytes:
        """The image's bytes.

        Raises:
          Skip: it is a decoration, or not available.
        """
        if source[:5].lower() == "data:":
            return data_address(source)
        path = locate(root, page, base, source)
        if path in decorations:
            raise Skip("decoration", f"{path} is on more than {self.repeated:.0%} of the pages")
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in self.decorations):
            raise Skip("decoration", f"{path} matches the setting decorations")
        return _file_bytes(root / path, path, MAX_IMAGE_BYTES, "missing_image", "image_too_large")


def locate(root: Path, page: str, base: str, source: str) -> str:
    """The file that an address on a page refers to, as a path within the folder; a leading / means the folder.

    Args:
      base: what the page's addresses are relative to; "" is the page itself.

    Raises:
      Skip: the address refers to something else.
    """
    try:
        address = urllib.parse.urlsplit(urllib.parse.urljoin(base, source) if base else source)
    except ValueError as error:
        raise Skip("missing_image", f"{source[:200]}: not an address ({error})") from error
    if address.scheme == "file":
        raise Skip("outside", f"{source[:200]} leads out of the folder")
    if address.scheme or address.netloc:
        raise Skip("missing_image", f"{source[:200]} is not in the folder; addresses are not fetched")
    path = urllib.parse.unquote(address.path)
    if "\0" in path or not path.strip("/"):
        raise Skip("missing_image", f"{ascii(source)[:200]} names no file")
    here = "" if path.startswith("/") else os.path.dirname(page)
    inside = os.path.normpath(os.path.join(here, path.lstrip("/")))
    if inside.split(os.sep)[0] == ".." or _leaves(root, inside):
        raise Skip("outside", f"{source[:200]} leads out of the folder")
    return inside.replace(os.sep, "/")


def _leaves(root: Path, inside: str) -> bool:
    """Whether a path within the folder is a symbolic link out of it."""
    # Not Path.resolve(), which raises on circular links.
    return not Path(os.path.realpath(root / inside)).is_relative_to(os.path.realpath(root))


def _page_text() -> Any:
    try:
        from emu_jax.data.raw import page_text
    except ImportError as error:
        raise UserError("HTML pages need lxml; run `pip install 'emu-jax[prepare]'`") from error
    return page_text


def _page_bytes(root: Path, page: str) -> bytes:
    if _leaves(root, page):
        raise Skip("outside", f"{page[:200]} is a link out of the folder")
    return _file_bytes(root / page, page, MAX_PAGE_BYTES, "unreadable_page", "page_too_large")


def _file_bytes(path: Path, name: str, most: int, missing: str, too_large: str) -> bytes:
    try:
        if not path.is_file():
            raise Skip(missing, f"no file {name[:200]}")
        if (size := path.stat().st_size) > most:
            raise Skip(too_large, f"{name[:200]} has {size} bytes; at most {most}")
        data = path.read_bytes()
    except OSError as error:
        raise Skip(missing, f"{name[:200]} cannot be read ({error.strerror})") from error
    if not data:
        raise Skip(missing, f"{name[:200]} is empty")
    return data


@functools.lru_cache(maxsize=4)
def _survey(html: Html, root: str) -> tuple[tuple[str, ...], frozenset[str]]:
    """The folder's pages in order, and the images that many of them show; computed once per process."""
    page_text = _page_text()
    pages = tuple(sorted(path for file in walk(Path(root)) if _takes(html, path := file.as_posix())))
    step = -(-len(pages) // SAMPLED_PAGES) or 1
    sample = pages[::step]
    shown: collections.Counter[str] = collections.Counter()
    for page in sample:
        paths = set()
        try:
            tree = page_text.parse_page(_page_bytes(Path(root), page))
        except Skip:
            continue
        if tree is None:
            continue
        base = page_text.base_of(tree)
        for element in tree.iter("img"):
            try:
                paths.add(locate(Path(root), page, base, page_text.source_of(element)))
            except Skip:
                continue
        shown.update(paths)
    least = max(MIN_REPEATED_PAGES - 1, html.repeated * len(sample))
    return pages, frozenset(path for path, count in shown.items() if count > least)


def _takes(html: Html, path: str) -> bool:
    """Whether the settings include a page, by its path in the folder."""
    included = any(fnmatch.fnmatchcase(path, pattern) for pattern in html.include)
    return included and not any(fnmatch.fnmatchcase(path, pattern) for pattern in html.exclude)


READER = Html
