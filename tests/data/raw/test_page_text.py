"""What is read of a page: literal small pages, and that no text of any page is lost or turned round."""

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.data.raw.page_text import decode_page, parse_page, read_page, source_of, stated_sides
from tests.data.raw.page_cases import CASES


def _read(page: str | bytes, drop=()):
    """Texts, and sources of images in <>."""
    tree = parse_page(page.encode() if isinstance(page, str) else page)
    return [] if tree is None else read_page(tree, lambda element: f"<{source_of(element)}>", drop)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.about)
def test_case(case):
    assert _read(case.page) == case.expected


# ---------------------------------------------------------------- layout


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("<h1>Cats</h1><p>A <b>cat</b>: <img src=cat.png> asleep</p>", ["Cats\nA cat:", "<cat.png>", "asleep"]),
        ("<p>one\n  <i> two </i>  three</p>", ["one two three"]),
        ("<p>un<b>believ</b>able</p>", ["unbelievable"]),
        ("one<br>two<hr>three", ["one\ntwo\nthree"]),
        ("<div><div><p>one</p></div></div><div>two</div>", ["one\ntwo"]),
        ("<ul><li>one<li>two<ul><li>three</ul></ul>", ["one\ntwo\nthree"]),
        ("<dl><dt>Whirl</dt><dd><p>an angle</p></dd></dl>", ["Whirl\nan angle"]),
        ("<table><tr><th>a</th> <th>b</th></tr><tr><td>1</td><td><b>2</b></td></tr></table>", ["a\tb\n1\t2"]),
        ("<p>x<table><tr><td><p>a</p></td><td><p>b</p><p>c</p></td></tr></table><p>y", ["x\na\tb\nc\ny"]),
        ("<p>x<table><tr><td><p></p></td><th>Tip</th></tr><tr><td>a</td><td> </td></tr></table>y", ["x\nTip\na\ny"]),
        ("<figure><img src=a.png><figcaption>A cat</figcaption></figure>", ["<a.png>", "A cat"]),
        ("<pre>\nfor x in y:\n    go()\n\n</pre><p>end", ["for x in y:\n    go()\nend"]),
        ("<p>see</p><pre><b>a</b>\n  b</pre>", ["see\na\n  b"]),
        ("a&nbsp;b&shy;c &lt;d&gt; &amp; &eacute;", ["a bc <d> & é"]),
        ("one<!-- no --> two", ["one two"]),
        ("<img src=a.png><img src=b.png>", ["<a.png>", "<b.png>"]),
        ("", []),
        ("   \n ", []),
        ("<p> </p><div>\n</div>", []),
    ],
)
def test_layout(page, expected):
    assert _read(page) == expected


def test_an_image_that_is_left_out_leaves_the_text_whole():
    assert read_page(parse_page(b"<p>Press <img src=a.png> twice</p>"), lambda element: None) == ["Press twice"]


# ---------------------------------------------------------------- what is left out


@pytest.mark.parametrize(
    "furniture",
    [
        "<script>var x</script>",
        "<style>p {}</style>",
        "<noscript>x</noscript>",
        "<nav><a href=/>Home</a></nav>",
        "<header>A site</header>",
        "<footer>(c)</footer>",
        "<aside>More</aside>",
        "<form><input value=x>Search</form>",
        "<button>Copy</button>",
        "<div role=navigation>Next</div>",
        "<div role=contentinfo>(c)</div>",
        "<div class=navheader>Prev</div>",
        "<div class='x sk-content-footer'>Prev</div>",
        "<ul class=breadcrumb><li>Home</ul>",
        "<ol aria-label=Breadcrumbs><li>Home</ol>",
        "<div id=sidebar>More</div>",
        "<div hidden>x</div>",
        "<div style='color: red; display: none'>x</div>",
        "<span aria-hidden=true>x</span>",
        "<a rel=next href=b.html>Wind</a>",
        "<a class=headerlink href=#x>Link</a>",
        "<a href=#x>¶</a>",
        "<div class=sphx-glr-timing>1.4 s</div>",
        "<pre><span class=linenos> 12</span></pre>",
    ],
)
def test_furniture_is_left_out(furniture):
    assert _read(f"<body><p>before</p>{furniture}<p>after</p></body>", drop=("sphx-glr-*",)) == ["before\nafter"]


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("<div class=has-sidebar><p>text</p></div>", ["text"]),
        ("<div class=page-sidebar><h1>Cats</h1><p>text</p></div>", ["Cats\ntext"]),  # a name that does not fit
        ("<form><main><p>text</p></main></form>", ["text"]),  # one form around the page
        ("<article><header><b>Cats</b></header><p>text</p><footer>share</footer></article>", ["Cats\ntext"]),
        ("<pre><span class=nav>x</span></pre>", ["x"]),  # a colour
        ("<p>before</p><main><p>text</p></main><p>after</p>", ["text"]),
        ("<p>before</p><div role=main><p>text</p></div><p>after</p>", ["text"]),
        ("<p>before</p><article>one</article><article>two</article>", ["before\none\ntwo"]),  # a list of articles
        ("<p>See <a href=#5>5</a> and <a href=b.html>#</a></p>", ["See 5 and #"]),
    ],
)
def test_what_is_kept(page, expected):
    assert _read(f"<body>{page}</body>") == expected


# ---------------------------------------------------------------- characters


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("<meta charset=iso-8859-2><p>Łódź".encode("iso-8859-2"), "Łódź"),
        ('<meta http-equiv="Content-Type" content="text/html; charset=Shift_JIS"><p>猫'.encode("shift_jis"), "猫"),
        ('<?xml version="1.0" encoding="windows-1251"?><p>кот'.encode("windows-1251"), "кот"),
        ("<p>猫".encode(), "猫"),  # says nothing
        ("<p>caf\xe9 \x93a\x94".encode("latin-1"), "café “a”"),  # says nothing, and is no UTF-8
        (b"<meta charset=iso-8859-1><p>" + b"\x93a\x94", "“a”"),  # what browsers take Latin-1 for
        ("<meta charset=nonsense><p>猫".encode(), "猫"),
        ("<meta charset=rot13><p>猫".encode(), "猫"),
        ("<meta charset=utf-16><p>猫".encode(), "猫"),
        ("\ufeff<p>猫".encode("utf-16-le"), "猫"),
        (b"\xef\xbb\xbf<meta charset=iso-8859-1><p>\xc3\xa9", "é"),
        (b"<p>a\x00b", "ab"),
    ],
)
def test_the_charset_of_the_page(data, expected):
    assert _read(data) == [expected]


def test_what_an_img_says():
    def image(text):
        return parse_page(text.encode()).find(".//img")

    assert source_of(image("<img src=' a.png '>")) == "a.png"
    assert source_of(image("<img src='data:image/gif;base64,R0' data-src=b.png>")) == "b.png"  # loaded late
    assert source_of(image("<img srcset='c.png 1x, d.png 2x'>")) == "c.png"
    assert source_of(image("<img>")) == ""
    assert stated_sides(image("<img width=16 height=20px>")) == [16, 20]
    assert stated_sides(image("<img style='height: 15px; width:50%'>")) == [15]
    assert stated_sides(image("<img width=100% height=auto>")) == []


# ---------------------------------------------------------------- any page

TAGS = (
    *("div", "p", "span", "b", "em", "ul", "li", "table", "tr", "td", "h2", "section", "blockquote", "pre", "code"),
    *("dl", "dt", "dd", "figure", "center", "font", "x-y"),
)
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=8)
NODES = st.recursive(
    TEXTS.map(lambda text: ("text", text))
    | st.sampled_from([("skip", "<script>NEVER</script>"), ("skip", "<!--NEVER-->")]),
    lambda children: st.tuples(st.sampled_from(TAGS), st.lists(children, max_size=4)),
    max_leaves=20,
)


def _render(node) -> tuple[str, str]:
    """A node -> its HTML and its text."""
    kind, body = node
    if kind == "text":
        return html.escape(body), body
    if kind == "skip":
        return body, ""
    inner = [_render(child) for child in body]
    return f"<{kind}>{''.join(page for page, _ in inner)}</{kind}>", "".join(text for _, text in inner)


def _visible(text: str) -> str:
    return re.sub("[\\s\xad\u200b\ufeff]+", "", text)


@given(st.lists(NODES, max_size=5))
def test_no_text_is_lost_or_turned_round(nodes):
    page, text = (("".join(half)) for half in zip(*map(_render, nodes), strict=True)) if nodes else ("", "")
    got = _read(f"<html><body>{page}</body></html>")
    assert _visible("".join(got)) == _visible(text)
    assert all(part == part.strip("\n") and part.strip() for part in got)


MARKUP = (
    *(
        "<",
        ">",
        "</",
        "/",
        "!",
        "=",
        '"',
        "'",
        "&",
        "&#",
        ";",
        "<p",
        "<img src=",
        "-->",
        "<!--",
        "]]>",
        "a",
        "\xff",
        "\0",
    ),
    *("div", "pre", "table", "nav", "style='width:'"),
)


@given(st.lists(st.sampled_from(MARKUP) | st.text(max_size=3)))
def test_a_broken_page_never_raises(pieces):
    _read("".join(pieces).encode("utf-8", "surrogatepass"))


@given(st.binary(max_size=200))
def test_bytes_never_raise(data):
    assert isinstance(decode_page(data), str)
    _read(data)


def test_a_page_of_thousands_of_nested_elements():
    assert _read("<div>" * 1500 + "deep" + "</div>" * 1500 + "<p>end") == ["deep\nend"]
