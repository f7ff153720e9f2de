"""inspect-data: exact counts of small sources, the page's texts, images and marks, and the lines of errors."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from ml_collections import ConfigDict
from PIL import Image

from configs import models
from emu_jax.cli import main
from emu_jax.data.document import Text
from emu_jax.data.prepared import Record, file_entry, shard_name, write_manifest
from emu_jax.errors import UserError
from emu_jax.inspect.data import inspect

SIZE, QUERIES = 16, 4
SCRIPT = "<script>alert('é 🦊')</script> & \"more\""


def _pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def _jsonl(folder, name: str, records: list[dict]) -> str:
    for seed in range(4):
        Image.fromarray(_pixels(seed)).save(folder / f"{seed}.png")
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return str(file)


def _config(mixture: dict[str, dict], *, model_type: str = "word", vocab: int = 100, order: str = "image_first"):
    """One batch of one row holds everything; every source is read once."""
    model = models.debug()
    model.llama.vocab_size = 0
    pairs = {
        "order": order,
        "image_first_probability": 0.5,
        "text_first_probability": 1.0,
        "text_first_text_weight": 0.3,
        "image_first_visual_weight": 0.0,
    }
    data = {
        "source": "",
        "split": "train",
        "seed": 0,
        "row_tokens": 64,
        "row_images": 4,
        "batch_rows": 1,
        "packing_window": 32,
        "shards": 1,
        "workers": 0,
        "max_faults": 1.0,
        "mixture": {name: {"epochs": 1, **entry} for name, entry in mixture.items()},
        "pairs": pairs,
    }
    tokenizer = {"path": "", "vocab_size": vocab, "model_type": model_type, "also": ()}
    return ConfigDict({"objective": "pretrain", "model": model, "tokenizer": tokenizer, "data": data})


class _Page(HTMLParser):
    """Documents of a page: their texts, tags, images and captions, in order."""

    def __init__(self, page: str):
        super().__init__()
        self.documents: list[dict] = []
        self.elements: set[str] = set()
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.add(tag)
        if tag == "article":
            self.documents.append({"text": "", "about": "", "tags": [], "classes": [], "images": []})
        elif tag == "img":
            data = base64.b64decode(attrs["src"].removeprefix("data:image/png;base64,"), validate=True)
            self.documents[-1]["images"].append(np.asarray(Image.open(io.BytesIO(data))))
        if tag == "span" and self.documents and "class" in attrs:
            self.documents[-1]["classes"].append(attrs["class"])
        if tag not in ("img", "meta"):
            self._open.append(attrs.get("class", ""))

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, data):
        if not self.documents or not self._open:
            return
        inside = self._open[-1].split(" ")[0]
        if inside == "t":
            self.documents[-1]["text"] += data
        elif inside == "tag":
            self.documents[-1]["tags"].append(data)
        elif any(name == "about" for name in self._open):
            self.documents[-1]["about"] += data


def _page(config, folder, **changes) -> tuple[str, _Page]:
    out = folder / "page.html"
    text = inspect(config, out, **({"rows": 4, "batches": 1, "verify": False} | changes))
    assert re.search(rf"^{re.escape(str(out))}: \d rows$", text, re.M), text
    return text, _Page(out.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- counts


def test_counts_of_two_sources(tmp_path):
    pair = {"image": "0.png", "text": "a red bus"}
    story = {"parts": [{"text": "a cat"}, {"image": "1.png"}, {"text": "then"}, {"image": "2.png"}]}
    config = _config(
        {
            "pairs": {"source": _jsonl(tmp_path, "pairs", [pair, {"image": "3.png", "text": "cat"}]), "weight": 2},
            "web": {"source": _jsonl(tmp_path, "web", [story]), "weight": 1},
        }
    )
    # <s> [IMG] 4 [/IMG] a red bus </s> = 11, one with "cat" = 9; <s> a cat [IMG] 4 [/IMG] then [IMG] 4 [/IMG] </s> = 17
    assert inspect(config, None, rows=4, batches=5, verify=False).split("\n") == [
        "1 batches of 1 rows of 64 tokens and 4 images (16 x 16 pixels, 4 tokens each), where the stream ends",
        "",
        "source  records  weight  documents  images  tokens   share  epochs/1,000 batches",
        "pairs         2       2          2       2      20   54.1%                 1e+03",
        "web           1       1          1       2      17   45.9%                 1e+03",
        "all           3                  3       4      37  100.0%",
        "",
        "a document's   mean  10%  50%  90%  most",
        "tokens, pairs  10.0    9    9   11    11",
        "tokens, web    17.0   17   17   17    17",
        "images, pairs   1.0    1    1    1     1",
        "images, web     2.0    2    2    2     2",
        "",
        "padding            42.2% of 64 positions",
        "empty image slots  0.0% of 4",
        "split documents    0 cuts through documents that are longer than a row",
        "faulty documents   0",
        "row_images         an image every 9.2 tokens: config.data.row_images=7 would fit better than 4 for "
        "row_tokens=64",
    ]


def test_both_orders_of_a_pair_are_one_record_and_one_slot(tmp_path):
    source = _jsonl(tmp_path, "pairs", [{"image": "0.png", "text": "a red bus"}])
    text, page = _page(_config({"pairs": {"source": source}}, order="both"), tmp_path)
    assert re.search(r"^pairs +1 +1 +2 +2 +22 +100.0% +1e\+03$", text, re.M), text
    assert "empty image slots  75.0% of 4" in text  # both show one slot
    first, second = page.documents
    assert first["about"] == "pairs · 11 tokens · 1 image"
    assert second["about"] == "pairs · 11 tokens · 1 image · text ×0.3"
    # <s> [IMG], the image, [/IMG], three words, </s>
    assert first["classes"] == ["tag w0", "tag w0", "pic v0", "tag w0", *["t w1"] * 3, "tag w1"]
    assert second["classes"] == ["tag w0", *["t w2"] * 3, "tag w0", "pic", "tag w0 v1", "tag w2"]


def test_an_endless_source_and_cut_documents(tmp_path):
    source = _jsonl(tmp_path, "long", [{"parts": [{"text": "cat " * 100}]}])
    config = _config({"long": {"source": source, "epochs": 0}})
    text, page = _page(config, tmp_path, rows=2, batches=2)
    # 32 equal records are one window; 100 words in rows of 63 make pieces of 64 and 39 tokens.
    assert text.startswith("2 batches of 1 rows of 64 tokens and 4 images (16 x 16 pixels, 4 tokens each)\n")
    assert "there was no image; config.data.row_images=4 could be 1" in text
    continued = ["continues a cut document" in document["about"] for document in page.documents]
    assert f"split documents    {sum(continued)} cuts" in text
    assert [len(document["text"].split()) for document in page.documents] == [37 if c else 63 for c in continued]


def test_unreadable_images_are_counted_and_marked(tmp_path):
    source = _jsonl(tmp_path, "pairs", [{"image": "0.png", "text": "a"}, {"image": "broken.png", "text": "b"}])
    (tmp_path / "broken.png").write_bytes(b"not an image")
    text, page = _page(_config({"mine": {"source": source}}), tmp_path)
    assert "faulty documents   1, left out of the loss: mine 1" in text
    abouts = sorted(document["about"] for document in page.documents)
    assert abouts == ["mine · 9 tokens · 1 image", "mine · 9 tokens · 1 imageleft out of the loss"]


# ---------------------------------------------------------------- the page


def test_the_page_holds_every_text_and_image_once_and_runs_nothing(tmp_path):
    texts = [SCRIPT, "two\n\nlines, 日本", "</article><img src=x onerror=alert(1)>"]
    records = [{"image": f"{number}.png", "text": text} for number, text in enumerate(texts)]
    config = _config({"<i>": {"source": _jsonl(tmp_path, "pairs", records)}}, model_type="bpe", vocab=400)
    config.data.row_tokens = 256
    _, page = _page(config, tmp_path)
    assert sorted(document["text"] for document in page.documents) == sorted(texts)
    assert {document["about"].split(" · ")[0] for document in page.documents} == {"<i>"}
    assert not page.elements & {"script", "iframe", "link"}
    for document in page.documents:
        assert document["tags"] == ["<s>", "[IMG]", "[/IMG]", "</s>"]
        (pixels,) = document["images"]
        np.testing.assert_array_equal(pixels, _pixels(texts.index(document["text"])))
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in html and "onerror=alert(1)>" not in html
    assert not re.search(r"""(src|href)=["']?(?!data:)[a-z]+:""", html)


def test_rows_that_are_not_asked_for_are_not_drawn(tmp_path):
    config = _config({"pairs": {"source": _jsonl(tmp_path, "pairs", [{"image": "0.png", "text": "a"}])}})
    inspect(config, tmp_path / "page.html", rows=0, batches=1, verify=False)
    assert "article" not in _Page((tmp_path / "page.html").read_text(encoding="utf-8")).elements


def test_the_command_prints_and_writes(tmp_path, capsys):
    out = tmp_path / "rows.html"
    arguments = ["--batches", "2", "--rows", "3", "--out", str(out), "--config.data.split=heldout_combinations"]
    arguments += ["--config.data.row_images=4"]
    config = Path(__file__).parents[2] / "configs/quickstart.py"
    assert main(["inspect-data", "--config", str(config), *arguments]) == 0
    assert capsys.readouterr().out.startswith("2 batches of 8 rows of 96 tokens and 4 images")
    assert out.read_text(encoding="utf-8").count('<section class="row">') == 3


# ---------------------------------------------------------------- errors


def _prepared(folder) -> str:
    folder.mkdir()
    for index in range(2):
        name = shard_name("mine", "train", index, 2)
        writer = ArrayRecordWriter(str(folder / name), "group_size:1")
        writer.write(Record(f"key{index}", "web", (Text("a red bus"),)).serialise())
        writer.close()
    files = {path.name: file_entry(path, 1) for path in sorted(folder.glob("*array_record*"))}
    write_manifest(folder, "mine", {"train": files}, {"settings": {"images": {"image_size": SIZE}}})
    return str(folder)


def test_verify_names_the_damaged_file(tmp_path):
    config = _config(
        {
            "mine": {"source": _prepared(tmp_path / "mine")},
            "web": {"source": _jsonl(tmp_path, "web", [{"parts": [{"text": "a"}]}])},
        }
    )
    lines = inspect(config, None, rows=1, batches=1, verify=True).split("\n")
    assert lines[:3] == [
        "mine: every file's digest is the manifest's (2)",
        "web: no prepared folder, nothing to compare with",
        "",
    ]
    file = tmp_path / "mine" / shard_name("mine", "train", 1, 2)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=re.escape(f"{file}: damaged, its SHA-256 is not the manifest's")):
        inspect(config, None, rows=1, batches=1, verify=True)


def test_errors_are_one_line(tmp_path):
    source = _jsonl(tmp_path, "pairs", [{"image": "0.png", "text": "a"}])
    config = _config({"pairs": {"source": source}})

    def refused(expected: str, out=None, config=config, rows=1, batches=1):
        with pytest.raises(UserError) as error:
            inspect(config, out, rows=rows, batches=batches, verify=False)
        assert expected in str(error.value) and "\n" not in str(error.value), str(error.value)

    refused("batches=0, rows=1; expected at least 1 batch", batches=0)
    refused("batches=1, rows=-1; expected at least 1 batch, and 0 rows or more", rows=-1)
    refused(f"out={tmp_path}: is a folder; name an HTML file", out=tmp_path)
    refused(f"there is no folder {tmp_path / 'none'}", out=tmp_path / "none" / "page.html")
    few = config.copy_and_resolve_references()
    few.data.batch_rows = 8
    refused("config.data: all sources together do not fill a batch of config.data.batch_rows=8 rows", config=few)
    refused("config.objective='vae': inspect-data shows packed documents", config=ConfigDict({"objective": "vae"}))
    wrong = config.copy_and_resolve_references()
    wrong.model.llama.vocab_size = 7
    refused("config.model.llama.vocab_size=7, but the tokenizer has", config=wrong)


# ---------------------------------------------------------------- counts for programs


def test_json_counts(tmp_path):
    """Of each source what is learnt; a page that is cut, one that is not, and a caption."""
    pair = {"image": "0.png", "text": "a red bus"}
    pages = [{"parts": [{"text": "cat " * 80}]}, {"parts": [{"text": "a cat"}, {"image": "1.png"}]}]
    config = _config(
        {
            "pairs": {"source": _jsonl(tmp_path, "pairs", [pair]), "weight": 1},
            "web": {"source": _jsonl(tmp_path, "web", pages), "weight": 2},
        }
    )
    config.data.update({"batch_rows": 2, "mixture_unit": "records"})
    file = tmp_path / "counts.json"
    inspect(config, None, rows=0, batches=1, verify=False, counts=file)
    counts = json.loads(file.read_text(encoding="utf-8"))
    # <s> [IMG] 4 [/IMG] a red bus </s>; <s> and 63 of 80 words, <s> and 17 and </s>; <s> a cat [IMG] 4 [/IMG] </s>
    pairs = {
        "samples": 1,
        "tokens": 11,
        "images": 1,
        "text_targets": 4,
        "visual_targets": 0,
        "learnt_eos": 1,
        "document_ends": 1,
        "cut_documents": 0,
        "predicted_documents": 0,
    }
    web = {
        "samples": 3,
        "tokens": 64 + 19 + 10,
        "images": 1,
        "text_targets": 80 + 1 + 3,
        "visual_targets": 5,
        "learnt_eos": 2,
        "document_ends": 2,
        "cut_documents": 1,
        "predicted_documents": 1,
    }
    assert counts["sources"] == {"pairs": pairs, "web": web}
    everything = {name: pairs[name] + web[name] for name in pairs}
    assert {name: counts[name] for name in everything} == everything
    assert counts["padding"] == pytest.approx(1 - 104 / 128) and counts["empty_image_slots"] == 1 - 2 / 8
    with pytest.raises(UserError, match=r"counts=nowhere/x\.json: there is no folder nowhere; name a JSON file in a"):
        inspect(config, None, rows=0, batches=1, verify=False, counts=Path("nowhere/x.json"))
