"""Pages with their images: literal documents of small sites, and what is never read."""

import base64
import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image as PIL

from emu_jax.data.document import Text
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.data.raw.readers import make_reader
from emu_jax.data.raw.readers.html import Html
from emu_jax.errors import UserError


def _png(colour: int) -> bytes:
    stream = io.BytesIO()
    PIL.fromarray(np.full((4, 4, 3), colour, np.uint8)).save(stream, "png")
    return stream.getvalue()


CAT, DOG, SIGN = _png(1), _png(2), _png(3)


def _write(root, **files):
    for name, data in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


def _all(root, reader):
    return [got for shard in reader.shards(str(root)) for got in reader.read(shard)]


def _rejects(got):
    return [(reject.key, reject.reason, reject.whole) for reject in got if isinstance(reject, Reject)]


def _site(root, **pages):
    _write(root, **{"images__cat.png": CAT, "images__dog.png": DOG})
    for name, page in pages.items():
        _write(root, **{f"{name}.html": page})


def test_a_small_page(tmp_path):
    page = (
        "<nav>Home</nav><h1>Cats</h1><p>A cat:<img src='../images/cat.png'>asleep.</p>"
        "<p>A <b>dog</b></p><img src=/images/dog.png>"
    )
    _site(tmp_path, guide__cats=page)
    assert _all(tmp_path, Html()) == [
        RawDocument(
            "guide/cats.html",
            "web",
            (Text("Cats\nA cat:"), RawImage(CAT), Text("asleep.\nA dog"), RawImage(DOG)),
        )
    ]


def test_addresses(tmp_path):
    root = tmp_path / "site"
    (tmp_path / "secret.png").write_bytes(SIGN)
    embedded = "data:image/png;base64," + base64.b64encode(DOG).decode()
    sources = [
        "images/cat.png?v=1#top",
        embedded,
        "images/%63at.png",
        "../secret.png",
        "/../../secret.png",
        "link.png",
        f"file://{tmp_path}/secret.png",
        "https://a.example/cat.png",
        "//a.example/cat.png",
        "images/none.png",
        "data:text/plain,x",
        "http://[",
        "images",
        "x" * 5000,
        "loop.png",
        "",
    ]
    page = "<p>text</p>" + "".join(f"<img src='{source}'>" for source in sources)
    _site(root, a=page)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "loop.png").symlink_to("loop.png")
    got = _all(root, Html())
    assert got[-1] == RawDocument("a.html", "web", (Text("text"), RawImage(CAT), RawImage(DOG), RawImage(CAT)))
    assert _rejects(got) == [
        ("a.html#3", "outside", False),
        ("a.html#4", "outside", False),
        ("a.html#5", "outside", False),
        ("a.html#6", "outside", False),
        ("a.html#7", "missing_image", False),
        ("a.html#8", "missing_image", False),
        ("a.html#9", "missing_image", False),
        ("a.html#10", "unreadable_image", False),
        ("a.html#11", "missing_image", False),
        ("a.html#12", "missing_image", False),
        ("a.html#13", "missing_image", False),
        ("a.html#14", "missing_image", False),
    ]


def test_a_base_address(tmp_path):
    page = "<base href='{}'><p>text</p><img src=cat.png>"
    _site(tmp_path, a=page.format("images/"), b=page.format("https://a.example/"))
    got = _all(tmp_path, Html())
    assert got[0] == RawDocument("a.html", "web", (Text("text"), RawImage(CAT)))
    assert _rejects(got) == [("b.html#0", "missing_image", False), ("b.html", "no_image", True)]


def test_icons(tmp_path):
    page = "<p>a<img src=images/cat.png width=16>b<img src=images/dog.png width=300>c<img src=sign.png>d</p>"
    _site(tmp_path, a=page)
    _write(tmp_path, **{"sign.png": SIGN})
    got = _all(tmp_path, Html(decorations=["si*.png"]))
    assert got[-1] == RawDocument("a.html", "web", (Text("ab"), RawImage(DOG), Text("cd")))
    assert _rejects(got) == [("a.html#0", "decoration", False), ("a.html#2", "decoration", False)]
    assert got[0].detail == "images/cat.png is an icon of 16 pixels"
    assert len(_all(tmp_path, Html(icon_side=0))[-1].parts) == 7


def test_what_many_pages_show(tmp_path):
    _write(tmp_path, **{"sign.png": SIGN})
    for number in range(8):
        cat = "<p>cat <img src=images/cat.png></p>" * (number < 6)
        _site(tmp_path, **{f"p{number}": f"<p>Note <img src=sign.png> this</p>{cat}"})
    got = _all(tmp_path, Html(repeated=0.75))  # the cat is on 6 of 8 pages, not on more
    documents = [document for document in got if isinstance(document, RawDocument)]
    parts = (Text("Note this\ncat"), RawImage(CAT))
    assert documents == [RawDocument(f"p{number}.html", "web", parts) for number in range(6)]
    rejects = [(f"p{number}.html#0", "decoration", False) for number in range(8)]
    assert [reject for reject in _rejects(got) if not reject[2]] == rejects
    assert got[0].detail == "sign.png is on more than 75% of the pages"
    assert not any(isinstance(document, RawDocument) for document in _all(tmp_path, Html(repeated=0.7)))


def test_few_pages_have_no_decorations(tmp_path):
    _site(tmp_path, **{f"p{number}": "<p>text<img src=images/cat.png>" for number in range(4)})
    assert len(_all(tmp_path, Html())) == 4
    assert not _rejects(_all(tmp_path, Html()))


def test_pages_without_text_or_images(tmp_path):
    _site(tmp_path, a="<p>text", b="<img src=images/cat.png>", c="", d="<p>text<img src=images/cat.png>")
    assert _rejects(_all(tmp_path, Html())) == [
        ("a.html", "no_image", True),
        ("b.html", "no_text", True),
        ("c.html", "unreadable_page", True),
    ]
    assert RawDocument("a.html", "web", (Text("text"),)) in _all(tmp_path, Html(require_image=False))


def test_shards_are_batches_of_the_chosen_pages(tmp_path):
    page = "<p>text<img src=/images/cat.png>"
    _site(tmp_path, a=page, b=page, index=page, de__a=page, en__c=page)
    _write(tmp_path, **{"notes.txt": page})
    reader = Html(exclude=("*index.html", "de/*"), pages_per_shard=2)
    shards = reader.shards(str(tmp_path))
    assert [shard.rpartition("//")[2] for shard in shards] == ["pages@0-2", "pages@2-3"]
    keys = [[document.key for document in reader.read(shard)] for shard in shards]
    assert keys == [["a.html", "b.html"], ["en/c.html"]]
    worker = pickle.loads(pickle.dumps(reader))
    assert list(worker.read(shards[1])) == list(reader.read(shards[1]))


def test_pages_of_odd_names(tmp_path):
    root = tmp_path / "site"
    _site(root, a="<p>text<img src=images/cat.png>")
    (tmp_path / "secret.html").write_text("<p>secret<img src=images/cat.png>")
    (root / "b.html").symlink_to(tmp_path / "secret.html")
    (root / "c.html").symlink_to("a.html")
    (root / "d.html").symlink_to("d.html")
    (root / os.fsdecode(b"\xff.html")).write_text("<p>text<img src=images/cat.png>")
    got = _all(root, Html())
    documents = [document.key for document in got if isinstance(document, RawDocument)]
    assert documents == ["a.html", "c.html", "\\udcff.html"]
    assert _rejects(got) == [("b.html", "outside", True), ("d.html", "unreadable_page", True)]


def test_settings_from_the_command_line():
    reader = make_reader("html", ["exclude=*index.html,de/*", "repeated=0.5", "require_image=false"])
    assert reader == Html(exclude=("*index.html", "de/*"), repeated=0.5, require_image=False)


def test_wrong_settings_and_paths(tmp_path):
    with pytest.raises(UserError, match="no such folder; expected a folder of HTML pages"):
        Html().shards(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"no page matches include \*.html"):
        Html().shards(str(tmp_path))
    with pytest.raises(UserError, match=r"Html.include='\*.html'; expected a list of patterns"):
        Html(include="*.html")
    with pytest.raises(UserError, match=r"Html.repeated=0"):
        Html(repeated=0)
    with pytest.raises(UserError, match=r"Html.min_similarity=2; expected a cosine"):
        Html(min_similarity=2)
