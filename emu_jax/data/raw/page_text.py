"""An HTML page -> its content: text and images in reading order, without the page's furniture.

    <nav>…</nav><h1>Cats</h1><p>A <b>cat</b>:<img src="cat.png">asleep</p>
        ─ read_page ─ "Cats⏎A cat:", image, "asleep"

White space collapses as in a browser: blocks are on lines of their own, table cells are separated by tabs, `pre` is
kept. The following is left out, in this order:

1. Everything outside the main part, if the page marks one: its only `main` or role="main", or its only `article`.
2. Elements that are not text: `SKIPPED_TAGS` (scripts, styles, controls, embedded media, `nav`, the readings of ruby),
   `hidden`, aria-hidden, display:none.
3. Furniture: `header` (outside an article), `footer`, `aside` (but topics and notes), `form`; the roles in
   `FURNITURE_ROLES`; elements with a class, or blocks with an id, that is in `FURNITURE_NAMES` or has one of
   `FURNITURE_WORDS` between its hyphens, unless the id repeats a heading; what the caller drops. An element that
   contains the page's h1, main part or article is kept.
4. Links to the previous and next page (rel="prev" …), and links that only show ¶ or #.
"""

from __future__ import annotations

import codecs
import fnmatch
import re
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from lxml import etree

from emu_jax.data.raw.invisible import INVISIBLE

T = TypeVar("T")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SKIPPED_TAGS = _words(
    "head script style noscript template nav button input select option textarea label iframe object embed applet "
    "audio video canvas svg map dialog datalist meter progress annotation annotation-xml rt rp rtc"
)
FURNITURE_TAGS = _words("footer aside form")
FURNITURE_ROLES = _words(
    "navigation banner contentinfo search complementary menu menubar menuitem tablist toolbar dialog alertdialog "
    "button doc-toc doc-index doc-pagelist"
)
FURNITURE_NAMES = _words(
    "menu mainmenu submenu dropdown-menu menubar toc tocbox tocwrapper table-of-contents toctree-wrapper related "
    "navheader navfooter navlinks prevnext prev next previous copyright colophon permalink anchorjs-link "
    "reportbug skip-link skiplink sr-only visually-hidden screen-reader-text comments "
    "respond modal popup site-header page-header-links mw-jump-link"
)
FURNITURE_WORDS = _words(
    "nav navbar navigation breadcrumb breadcrumbs sidebar sidenav footer pagination pager rellink rellinks "
    "headerlink hashlink editsection cookie cookies newsletter advert advertisement ads share sharing social "
    "searchbox"
)
CONTENT_ASIDES = _words("topic admonition note tip warning footnote footnote-list")  # as docutils writes them
# Elsewhere an id is a name to link to, such as a heading's or a function's.
NAMED_BLOCKS = _words("aside center div dl form header ol p section table tbody td tr ul")
LINE_NUMBERS = _words("linenos lineno line-numbers")
PAGE_PREFIXES = ("no-", "has-", "with-", "without-")  # has-sidebar describes a page, and is not a sidebar
BLOCKS = _words(
    "address article aside blockquote body caption center dd details dialog dir div dl dt fieldset figcaption "
    "figure footer form h1 h2 h3 h4 h5 h6 header hgroup hr html legend li main menu nav ol p pre search section "
    "summary table tbody tfoot thead tr ul"
)
CELLS = frozenset(("td", "th"))
LINK_RELATIONS = _words("prev previous next up first last home start contents index")
HEADING_LINK_TEXTS = frozenset(("¶", "#", "§", "🔗", "\uf0c1", ""))  # "" is drawn by the style sheet

SPACE = re.compile(r"[ \t\n\r\f]+")
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
CHARSET = re.compile(rb"""(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
WHATWG = {"iso-8859-1": "cp1252", "latin1": "cp1252", "us-ascii": "cp1252", "ascii": "cp1252", "gb2312": "gb18030"}
HIDING = re.compile(r"(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*hidden)", re.IGNORECASE)
PIXELS = re.compile(r"\s*(\d+)(?:\.\d*)?\s*(?:px)?\s*$", re.IGNORECASE)

_INSIDE = etree.XPath("boolean(.//h1 | .//main | .//article | .//*[@role='main'])")
# The parser does not know that a `source` has no end tag, so what follows one is inside it.
_SOURCES = etree.XPath("preceding-sibling::source | ancestor::source")
_MAIN = etree.XPath("//main | //*[@role='main']")
_ARTICLE = etree.XPath("//article")
_WORD = re.compile(r"[^\W_]+")
_SEPARATORS = ("", " ", "\t", "\n")
_SPACED, _CELL, _LINE = 1, 2, 3


def decode_page(data: bytes) -> str:
    """Decodes a page by its byte order mark, the charset that it states, UTF-8 or Windows-1252; never raises."""
    for mark, name in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(name, "replace")
    said = CHARSET.search(data[:2048])
    label = said[1].decode("ascii", "replace").lower() if said else "utf-8"
    if label.startswith("utf-16"):
        label = "utf-8"  # a label that is readable as ASCII cannot be in UTF-16
    try:
        return data.decode(WHATWG.get(label, label))
    except (LookupError, ValueError):
        pass
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def parse_page(data: bytes) -> etree._Element | None:
    """The page's tree, however broken the page is; None if it is empty."""
    # Encoded as UTF-8 with an explicit encoding, so that the parser ignores the charset that the page states.
    clean = decode_page(data).replace("\0", "").encode("utf-8", "replace")
    parser = etree.HTMLParser(encoding="utf-8", huge_tree=True, no_network=True)
    try:
        return etree.fromstring(clean, parser)
    except (etree.LxmlError, ValueError, AssertionError):
        return None


def base_of(root: etree._Element) -> str:
    """The address to which the page's links are relative; "" for the page itself."""
    return next((element.get("href") for element in root.iter("base") if element.get("href")), "")


def source_of(image: etree._Element) -> str:
    """The address of an `img`; pages that load images lazily have it in another attribute than `src`, or beside it."""
    for name in ("data-src", "data-original", "data-lazy-src"):
        if value := image.get(name, "").strip():
            return value
    source = image.get("src", "").strip()
    if source and source[:5].lower() != "data:":
        return source
    for element in (image, *_SOURCES(image)):
        for name in ("data-srcset", "srcset"):
            if value := element.get(name, "").strip():
                return value.split(" ")[0].rstrip(",")
    return source  # may hold a whole image, too


def stated_sides(image: etree._Element) -> list[int]:
    """Width and height in pixels, as far as the page states them."""
    style = dict(rule.partition(":")[::2] for rule in image.get("style", "").replace(" ", "").lower().split(";"))
    found = (PIXELS.match(image.get(side) or style.get(side, "")) for side in ("width", "height"))
    return [int(match[1][:9]) for match in found if match]


def read_page(
    root: etree._Element, image: Callable[[etree._Element], T | None], drop: Sequence[str] = ()
) -> list[str | T]:
    """A page's tree -> texts and images in order.

    Args:
      image: maps an `img` to what takes its position; with None, the text around it stays one text.
      drop: patterns of further classes and ids that are furniture, such as `sphx-glr-*`.
    """
    flow: _Flow[T] = _Flow()
    main = _main_part(root)
    kept: list[etree._Element] = []  # the open `pre`
    walk = etree.iterwalk(main, events=("start", "end", "comment", "pi"))
    for event, element in walk:
        if event == "start":
            left_out = element is not main and _left_out(element, drop, bool(kept))
            if element.tag in CELLS:
                flow.cell()
            elif element.tag in BLOCKS or element.tag == "br":
                flow.part(_LINE, row=element.tag == "tr")
            if left_out:
                walk.skip_subtree()  # its end event still follows
                continue
            if element.tag == "img" and (found := image(element)) is not None:
                flow.put(found)
            if element.tag == "pre":
                kept.append(element)
                flow.fresh = True
            flow.write(element.text, bool(kept))
            continue
        if event == "end":
            if kept and kept[-1] is element:
                kept.pop()
            if element.tag in CELLS:
                flow.border = False
            elif element.tag in BLOCKS:
                flow.part(_LINE)
        if element is not main:
            flow.write(element.tail, bool(kept))
    return flow.finish()


class _Flow(Generic[T]):
    """Collects laid-out text; the separator of two words is known when the second one arrives."""

    def __init__(self) -> None:
        self._parts: list[str | T] = []
        self._text: list[str] = []
        self._gap = 0
        self._in_row = False  # whether the current table row is not empty
        self.border = False  # at the start of a cell, where blocks do not begin lines
        self.fresh = False  # at the start of a `pre`, whose first line break is ignored

    def part(self, gap: int, row: bool = False) -> None:
        """Separates what follows from what is here, by `gap` or more."""
        if row:
            self._in_row = self.border = False
        if not self.border:
            self._gap = max(self._gap, gap)
        self.fresh = False

    def cell(self) -> None:
        """Separates what follows from the previous cell by a tab, whatever blocks the two contain."""
        if self._in_row:
            self._gap, self.border = _CELL, True

    def write(self, text: str | None, preformatted: bool) -> None:
        if not text:
            return
        text = text.translate(INVISIBLE)
        if preformatted:
            if self.fresh:
                text = text.removeprefix("\r").removeprefix("\n")
            if text:
                self._add(text)
            return
        text = SPACE.sub(" ", text)
        if text.startswith(" "):
            self.part(_SPACED)
        if words := text.strip(" "):
            self._add(words)
            if text.endswith(" "):
                self.part(_SPACED)

    def _add(self, text: str) -> None:
        if self._text and self._gap:
            self._text[-1] = self._text[-1].rstrip()  # the end of a `pre`
            self._text.append(_SEPARATORS[self._gap])
        self._text.append(text)
        self._gap, self.fresh, self.border, self._in_row = 0, False, False, True

    def put(self, image: T) -> None:
        self._close()
        self._parts.append(image)
        self._in_row = True

    def _close(self) -> None:
        text = "".join(self._text).strip("\n").rstrip()
        if text.strip():
            self._parts.append(text)
        self._text, self._gap = [], 0

    def finish(self) -> list[str | T]:
        self._close()
        return self._parts


# ---------------------------------------------------------------- what is left out


def _main_part(root: etree._Element) -> etree._Element:
    """The element that holds the page's content."""
    for find in (_MAIN, _ARTICLE):
        found = find(root)
        if len(found) == 1:
            return found[0]
    body = root.find("body")
    return root if body is None else body


def _left_out(element: etree._Element, drop: Sequence[str], preformatted: bool) -> bool:
    tag = element.tag
    if tag in SKIPPED_TAGS or "hidden" in element.attrib or element.get("aria-hidden", "").lower() == "true":
        return True
    if HIDING.search(element.get("style", "")):
        return True
    if tag == "a":
        if LINK_RELATIONS.intersection(element.get("rel", "").lower().split()):
            return True
        if (
            element.get("href", "").startswith("#")
            and len(element) == 0
            and (element.text or "").strip() in HEADING_LINK_TEXTS
        ):
            return True
    classes, ids = (element.get(name, "").split() for name in ("class", "id"))
    if any(fnmatch.fnmatchcase(name, pattern) for name in (*classes, *ids) for pattern in drop):
        return not _INSIDE(element)
    if preformatted:  # other classes are colours there
        return bool(LINE_NUMBERS.intersection(classes + ids))
    return _is_furniture(element, classes, ids) and not _INSIDE(element)


def _is_furniture(element: etree._Element, classes: Sequence[str], ids: Sequence[str]) -> bool:
    tag = element.tag
    if tag == "aside" and CONTENT_ASIDES.intersection(classes):
        return False
    if tag in FURNITURE_TAGS or element.get("role", "").lower() in FURNITURE_ROLES:
        return True
    if tag == "header" and not any(parent.tag in ("article", "main") for parent in element.iterancestors()):
        return True
    if any(map(_names_furniture, classes)) or "breadcrumb" in element.get("aria-label", "").lower():
        return True
    return tag in NAMED_BLOCKS and any(_names_furniture(name) and not _repeats_heading(element, name) for name in ids)


def _names_furniture(name: str) -> bool:
    name = name.lower()
    if name in FURNITURE_NAMES or name in LINE_NUMBERS:
        return True
    return not name.startswith(PAGE_PREFIXES) and not FURNITURE_WORDS.isdisjoint(re.split("[-_]+", name))


def _repeats_heading(element: etree._Element, name: str) -> bool:
    """Whether generators of sites made an id of the element's first heading: it links to it, or has its several words.

    `section id="pagination"` may as well be the page's own pagination.
    """
    heading = next(element.iter("h2", "h3", "h4", "h5", "h6"), None)
    if heading is None:
        return False
    words = set(_WORD.findall(name.lower()))
    repeated = len(words) > 1 and words <= set(_WORD.findall("".join(heading.itertext()).lower()))
    return repeated or any(link.get("href") == f"#{name}" for link in heading.iter("a"))
