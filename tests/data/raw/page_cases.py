"""Pages as people have them, and what a reader should find: texts, and the sources of images in <>, in reading order.

`test_page_text.py` reads them with our reader, `benchmarks/benchmark_parsers.py` with other people's too, by their
words and images. Every case is between two paragraphs of prose, without which finders of main parts find nothing.
"""

from __future__ import annotations

from typing import NamedTuple

BEFORE = (
    "The tool removes the red colour that a flash leaves in the eyes of people and of animals. Select the eyes before "
    "you use it, so that nothing else of the photo changes, and look at the result at full size."
)
AFTER = (
    "Choose a higher threshold where some of the colour is left, and a lower one where the lips or the skin have lost "
    "theirs. The preview shows what happens, and nothing is changed before you confirm it."
)


class PageCase(NamedTuple):
    """Attributes:
    body: what is between the two paragraphs.
    parts: what is read of it; lines of a text that the paragraphs adjoin join theirs.
    cut: the page ends after `body`.
    """

    about: str
    body: str
    parts: list[str]
    cut: bool = False

    @property
    def page(self) -> str:
        end = "" if self.cut else f"<p>{AFTER}</p></body></html>"
        return (
            "<!DOCTYPE html><html><head><title>Eyes</title></head><body><div class=nav><a href=/>Home</a> "
            f"<a href=b>Next</a></div><p>{BEFORE}</p>{self.body}{end}"
        )

    @property
    def expected(self) -> list[str]:
        parts = [BEFORE]
        for part in [*self.parts, *([] if self.cut else [AFTER])]:
            if part.startswith("<") or parts[-1].startswith("<"):
                parts.append(part)
            else:
                parts[-1] += "\n" + part
        return parts


CASES = (
    PageCase("inline elements in one word", "<p>un<b>bel<i>iev</i></b>able</p>", ["unbelievable"]),
    PageCase("an image in a sentence", "<p>Press <img src=a.png> twice.</p>", ["Press", "<a.png>", "twice."]),
    PageCase(
        "images in a list",
        "<ul><li><img src=a.png> one<li>two <img src=b.png></ul>",
        ["<a.png>", "one\ntwo", "<b.png>"],
    ),
    PageCase("an image in a heading", "<h2>The <img src=a.png> tool</h2>", ["The", "<a.png>", "tool"]),
    PageCase("an image in a link", "<a href=a.html><img src=a.png></a>", ["<a.png>"]),
    PageCase("two images in a row", "<p><img src=a.png><img src=b.png></p>", ["<a.png>", "<b.png>"]),
    PageCase("a figure", "<figure><img src=a.png><figcaption>An eye</figcaption></figure>", ["<a.png>", "An eye"]),
    PageCase(
        "a caption first", "<figure><figcaption>An eye</figcaption><img src=a.png></figure>", ["An eye", "<a.png>"]
    ),
    PageCase(
        "a table",
        "<table><caption>Keys</caption><tr><th>Tool<th>Key<tr><td>Pencil<td><kbd>N</kbd></table>",
        ["Keys\nTool\tKey\nPencil\tN"],
    ),
    PageCase(
        "images in a table",
        "<table><tr><td><img src=a.png><td>one<tr><td><img src=b.png><td>two</table>",
        ["<a.png>", "one", "<b.png>", "two"],
    ),
    PageCase(
        "a table for the layout",
        "<table><tr><td><p>Left</p></td><td><table><tr><td>Right</td></tr></table></td></tr></table>",
        ["Left\nRight"],
    ),
    PageCase("a definition list", "<dl><dt>Blur</dt><dd>makes soft</dd></dl>", ["Blur\nmakes soft"]),
    PageCase("code", "<pre>for eye in eyes:\n    go(eye)</pre>", ["for eye in eyes:\n    go(eye)"]),
    PageCase("a quotation", "<blockquote><p>Red is red.</p></blockquote>", ["Red is red."]),
    PageCase(
        "details that are closed", "<details><summary>More</summary><p>Even more</p></details>", ["More\nEven more"]
    ),
    PageCase("ruby", "<p><ruby>漢<rp>(</rp><rt>kan</rt><rp>)</rp>字<rt>ji</rt></ruby>です</p>", ["漢字です"]),
    PageCase(
        "a formula, for eyes and for readers",
        "<p>so <math><mi>x</mi><annotation>\\x</annotation></math><span aria-hidden=true>x</span></p>",
        ["so x"],
    ),
    PageCase("line breaks", "<p>one<br>two<br/>three</p>", ["one\ntwo\nthree"]),
    PageCase("soft hyphens and chances to break", "<p>thres&shy;hold <wbr>pre<wbr>view</p>", ["threshold preview"]),
    PageCase("entities", "<p>R&amp;D &lt;b&gt; &eacute;&nbsp;&#9731;</p>", ["R&D <b> é ☃"]),
    PageCase("tags that are not closed", "<p>one<p>two <b>three<p>four", ["one\ntwo three\nfour"]),
    PageCase("tags that cross", "<p>one <b>two <i>three</b> four</i></p>", ["one two three four"]),
    PageCase("a quote that is not closed", '<p title="x>one</p><p title="y">two</p>', ["two"]),
    PageCase("comments", "<p>one<!-- no --> <!--[if IE]><p>old</p><![endif]-->two</p>", ["one two"]),
    PageCase(
        "scripts and styles", "<script>document.write('<p>no</p>')</script><style>p {}</style><p>yes</p>", ["yes"]
    ),
    PageCase("data in a script", '<script type="application/ld+json">{"text": "no"}</script><p>yes</p>', ["yes"]),
    PageCase(
        "hidden text",
        "<p hidden>no</p><p style='display: none'>no</p><template><p>no</p></template><p>yes</p>",
        ["yes"],
    ),
    PageCase("hidden images", "<div style='display:none'><img src=no.png></div><p>yes</p>", ["yes"]),
    PageCase(
        "what is shown where a video is not", "<video src=a.mp4><p>Your browser is old.</p></video><p>yes</p>", ["yes"]
    ),
    PageCase("a share bar", "<div class='share-bar'><a href=x>Tweet</a></div><p>yes</p>", ["yes"]),
    PageCase("a cookie notice", "<div id=cookie-notice><p>We use cookies. Accept all?</p></div><p>yes</p>", ["yes"]),
    PageCase(
        "a section about sharing",
        "<section id=bike-sharing-in-the-city><h2>Bike sharing in the city</h2><p>yes</p></section>",
        ["Bike sharing in the city\nyes"],
    ),
    PageCase(
        "a section about pagination",
        "<section id=pagination><h2>Pagination<a class=headerlink href=#pagination>¶</a></h2><p>yes</p></section>",
        ["Pagination\nyes"],
    ),
    PageCase("the pagination", "<section id=pagination><h2>Pages</h2><a href=2>2</a></section><p>yes</p>", ["yes"]),
    PageCase(
        "a section about cookies, of an old generator",
        '<div class="section" id="baking-cookies"><h2>Baking cookies</h2><p>yes</p></div>',
        ["Baking cookies\nyes"],
    ),
    PageCase(
        "a heading about the footer",
        "<h2 id=footer>Footer</h2><h2><span id=the-sidebar>The sidebar</span></h2><p>yes</p>",
        ["Footer\nThe sidebar\nyes"],
    ),
    PageCase(
        "the name of a function",
        "<dl><dt id=set_cookie>set_cookie</dt><dd>sets one</dd></dl>",
        ["set_cookie\nsets one"],
    ),
    PageCase(
        "an aside that is a topic",
        "<aside class=topic><p class=topic-title>Blur</p><p>It is soft.</p></aside>",
        ["Blur\nIt is soft."],
    ),
    PageCase("footnotes", "<aside class='footnote brackets'><span>1</span><p>Or green.</p></aside>", ["1\nOr green."]),
    PageCase(
        "an aside of other articles",
        "<aside class=related-articles><p>Read also: Green eyes</p></aside><p>yes</p>",
        ["yes"],
    ),
    PageCase("a lazy image", "<p><img src='data:image/gif;base64,R0lGODlhAQAB' data-src=a.png></p>", ["<a.png>"]),
    PageCase(
        "a lazy image of WordPress",
        "<p><img data-lazy-src=a.png src=x.gif><noscript><img src=a.png></noscript></p>",
        ["<a.png>"],
    ),
    PageCase("an image with srcset alone", "<p><img srcset='a.png 480w, b.png 800w'></p>", ["<a.png>"]),
    PageCase(
        "a lazy srcset",
        "<p><img data-srcset='a.png 1x, b.png 2x' src='data:image/gif;base64,R0lGODlhAQAB'></p>",
        ["<a.png>"],
    ),
    PageCase(
        "an image whose sources are beside it",
        "<p><source data-srcset='a.webp 1x'><source srcset='b.webp'><img alt=eye></p>",
        ["<a.webp>"],
    ),
    PageCase("an image and its sources", "<p><source srcset=a.webp type=image/webp><img src=a.jpg></p>", ["<a.jpg>"]),
    PageCase("cut in a sentence", "<p>and then", ["and then"], cut=True),
    PageCase("cut in a tag", "<p>and <img src=a.png> then <img src='b.p", ["and", "<a.png>", "then"], cut=True),
    PageCase("cut in a comment", "<p>and then <!-- a comm", ["and then"], cut=True),
    PageCase("cut in a script", "<p>and then<script>var a = '<p>no", ["and then"], cut=True),
)
