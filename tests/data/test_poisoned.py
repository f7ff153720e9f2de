"""Good data among one of every bad thing: everything good comes out, and everything bad has its reason."""

import ast
import contextlib
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PIL

from emu_jax.data.config import DataConfig
from emu_jax.data.images import Recoding
from emu_jax.data.jsonl import read_documents
from emu_jax.data.pipeline import Pipeline
from emu_jax.data.prepare import PrepareConfig, prepare
from emu_jax.data.prepared import MANIFEST, Records
from emu_jax.data.raw.readers import make_reader
from emu_jax.data.reasons import MISSING_PART_REASONS, REASONS, RULE_REASONS
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError
from emu_jax.storage import read_lines
from tests.pages import ROOT


def encoded(seed: int, height: int = 40, width: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    PIL.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


# ---------------------------------------------------------------- one vocabulary


def test_every_reason_in_the_code_is_explained():
    """The literal reasons of `Reject`, `Skip` and the errors that become one; and the page's table."""
    places = {"Skip": 0, "ImageError": 0, "VideoError": 0, "JsonFault": 0, "Reject": 1}
    found = set()
    for file in (*sorted((ROOT / "emu_jax" / "data").rglob("*.py")), ROOT / "emu_jax" / "storage.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in places:
                reason = node.args[places[node.func.id] :][:1]
                found |= {leaf.value for arg in reason for leaf in ast.walk(arg) if isinstance(leaf, ast.Constant)}
    found = {reason for reason in found if isinstance(reason, str)} - {"missing_"}  # a part of two reasons
    assert found <= REASONS.keys()
    variables = {"page_too_large", "unreadable_page", "unsafe_member", "unread_member", "unsupported_depth"}
    assert REASONS.keys() - found <= variables
    assert REASONS.keys() > RULE_REASONS | MISSING_PART_REASONS
    page = (ROOT / "docs" / "data-formats.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `(\w+)` \| (rule|fault|fault if the document is lost) \| (.*) \|$", page, flags=re.MULTILINE
    )
    assert {reason: text for reason, _, text in rows} == REASONS
    assert {reason for reason, kind, _ in rows if kind == "rule"} == RULE_REASONS
    assert {reason for reason, kind, _ in rows if kind.startswith("fault if")} == MISSING_PART_REASONS


# ---------------------------------------------------------------- a poisoned preparation

GOOD_NAMES = ["plain", "猫\u30001", "Screenshot 9.41\u202fAM", "line\u2028end", "astronaut 👩\u200d🚀", "caf\u00e9"]
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"/>'
# Name, members, and what becomes of it: (key, reason).
BAD = [
    ("garbage", {"png": b"\x00\x01\x02", "txt": b"a"}, ("garbage", "unreadable_image")),
    ("svg", {"png": SVG, "txt": b"a"}, ("svg", "unreadable_image")),
    ("cut", {"png": encoded(90)[:300], "txt": b"a"}, ("cut", "unreadable_image")),
    ("small", {"png": encoded(91, 8, 8), "txt": b"a"}, ("small", "too_small")),
    ("narrow", {"png": encoded(92, 32, 320), "txt": b"a"}, ("narrow", "extreme_aspect")),
    ("twin", {"png": encoded(0), "txt": b"the same image as plain"}, ("twin", "duplicate")),
    ("wordless", {"png": encoded(93), "txt": b" \n"}, ("wordless", "no_text")),
    ("imageless", {"txt": b"a"}, ("imageless", "no_image")),
    ("latin", {"png": encoded(94), "txt": b"caf\xe9"}, ("latin", "unreadable_text")),
    ("half", {"png": encoded(95), "json": b'{"caption": "\\ud83d"}'}, ("half", "unreadable_text")),
    ("null", {"png": encoded(96), "json": b'{"caption": null}'}, ("null", "no_text")),
    ("nojson", {"png": encoded(97), "json": b"{"}, ("nojson", "unreadable_json")),
    ("long", {"png": encoded(98), "txt": b"x" * 10_001}, ("long", "text_too_long")),
    ("../out", {"txt": b"a"}, ("../out.txt", "unsafe_member")),
    ("pickle", {"pkl": b"cos\nsystem\n."}, ("pickle.pkl", "pickle_member")),
]


def write_tars(folder: Path) -> None:
    """Four tars, in the second folder of which a link leads; good pairs around each bad thing."""
    (folder / "in").mkdir(parents=True)
    (folder / "elsewhere").mkdir()
    (folder / "in" / "linked").symlink_to(folder / "elsewhere", target_is_directory=True)
    (folder / "in" / "loop").symlink_to(folder / "in", target_is_directory=True)
    samples = [(name, {"png": encoded(n), "txt": f"\ufeffgood {n}".encode()}) for n, name in enumerate(GOOD_NAMES)]
    samples += [(name, members) for name, members, _ in BAD]
    samples += [(f"end{n}", {"png": encoded(40 + n), "txt": f"good end {n}".encode()}) for n in range(4)]
    for number in range(4):
        place = folder / ("elsewhere" if number % 2 else "in") / f"{number}.tar"
        with tarfile.open(place, "w") as archive:
            for name, members in samples[number::4]:
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{name}.{extension}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


def check_prepared(tmp_path: Path, workers: int) -> dict[str, bytes]:
    """Prepares the tars and compares what came out with what went in; returns the bytes of all files."""
    out = tmp_path / f"out{workers}"
    config = PrepareConfig("poisoned", shards=2, max_faults=1.0, recoding=Recoding(32), workers=workers)
    manifest = prepare(make_reader("pairs"), "pairs", str(tmp_path / "in"), out, config)
    records = Records(out, "train")
    texts = {records[n].parts[1].text for n in range(len(records))}
    assert texts == {f"good {n}" for n in range(len(GOOD_NAMES))} | {f"good end {n}" for n in range(4)}
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_bytes().split(b"\n") if line]
    expected = sorted(told for *_, told in BAD)
    assert sorted((r["key"].partition(".tar/")[2], r["reason"]) for r in rejects) == expected
    assert {reason for _, reason in expected} == manifest["rejects"].keys() <= REASONS.keys()
    assert all("\n" not in r["detail"] and " at 0x" not in r["detail"] for r in rejects)
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.long
def test_good_pairs_come_out_and_bad_ones_have_their_reasons(tmp_path):
    write_tars(tmp_path)
    assert MANIFEST in check_prepared(tmp_path, 1)


@pytest.mark.slow
def test_four_workers_write_the_bytes_of_one(tmp_path):
    write_tars(tmp_path)
    assert check_prepared(tmp_path, 1) == check_prepared(tmp_path, 4)


# ---------------------------------------------------------------- a poisoned JSONL in training

LINES = [  # and the reason of each
    (b'{"image": "0.png", "text": null}', "unreadable_record"),
    (b'{"image": "0.png", "text": ["a"]}', "unreadable_record"),
    (b'{"image": "0.png", "text": 7}', "unreadable_record"),
    (b'{"image": "0.png", "text": NaN}', "unreadable_record"),
    (b'{"image": "", "text": "a"}', "unreadable_record"),
    (b'["a"]', "unreadable_record"),
    (b"{", "unreadable_json"),
    (b"[" * 100_000, "unreadable_json"),
    (b'{"image": "0.png", "text": "a \x92"}', "unreadable_text"),
    (b'{"image": "0.png", "text": "a \\ud83d"}', "unreadable_text"),
    (b'{"image": "0.png", "text": "a", "video": "a.mp4"}', "unread_field"),
    (b'{"image": "' + b"n" * 300 + b'.png", "text": "a"}', "missing_image"),
    (b'{"image": "http://example.org/a.png", "text": "a"}', "missing_image"),
]


def write_jsonl(folder: Path) -> tuple[Path, int]:
    """Good pairs before, between and after the bad lines, with a byte order mark; the path, and how many are good."""
    good = []
    for number in range(30):
        (folder / f"{number}.png").write_bytes(encoded(number))
        text = f"cat {number}\u2028\u0085"  # what other readers take for the end of a line
        good.append(json.dumps({"image": f"{number}.png", "text": text}, ensure_ascii=False).encode())
    lines = [line for pair in zip(good, [bad for bad, _ in LINES], strict=False) for line in pair] + good[len(LINES) :]
    (folder / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\n")
    return folder / "data.jsonl", len(good)


def stream(path: Path, max_faults: float) -> Pipeline:
    fields = {"source": str(path), "split": "", "seed": 0, "row_tokens": 32, "row_images": 2, "batch_rows": 2}
    more = {"packing_window": 8, "workers": 0, "pairs": {}, "max_faults": max_faults}
    tokenizer = Tokenizer.train([f"cat {n}" for n in range(30)], vocab_size=200, model_type="word")
    return Pipeline(DataConfig.from_dict(fields | more), tokenizer, queries=2, image_size=8)


def test_training_leaves_out_bad_lines_and_missing_images(tmp_path):
    path, good = write_jsonl(tmp_path)
    (tmp_path / "7.png").unlink()
    with contextlib.closing(stream(path, max_faults=0.4)) as pipeline:
        assert pipeline.samples.lengths == {str(path): good}
        assert pipeline.remarks == [
            f"{path}: 13 of 43 lines left out (missing_image 2, unread_field 1, unreadable_json 2, "
            f"unreadable_record 6, unreadable_text 2); the first: {path}:2: text is null; expected a text"
        ]
        for _ in range(40):
            next(pipeline)
        assert pipeline.count(f"faults/{path}") >= 2  # the missing image, once an epoch
    with pytest.raises(UserError, match=r"13 of 43 lines left out .* more than max_faults=0\.1; mend the lines"):
        stream(path, max_faults=0.1)
    with pytest.raises(UserError, match=r"data\.jsonl:2: text is null; expected a text$"):
        stream(path, max_faults=0.0)


def test_each_bad_line_has_its_reason(tmp_path):
    for line, reason in LINES:
        found = read_documents(tmp_path / "a.jsonl", line + b'\n{"image": "a.png", "text": "a"}\n', max_faults=0.5)
        assert found.rejects == {reason: 1} and list(found.records) == [2]


# ---------------------------------------------------------------- lines, against plain Python

PIECES = st.sampled_from(
    [b"\n", b"\r\n", b"\r", b" ", b"\xef\xbb\xbf", "\u2028".encode(), "\u0085".encode(), b"ab", b"1"]
)


@given(pieces=st.lists(PIECES, max_size=20), most=st.integers(1, 12))
def test_lines_are_what_split_finds(pieces, most):
    data = b"".join(pieces)
    lines = data.split(b"\n")
    starts = [sum(len(line) + 1 for line in lines[:number]) for number in range(len(lines))]
    expected = []
    for number, (line, start) in enumerate(zip(lines, starts, strict=True), 1):
        ended, too_long = number < len(lines), len(line) > most
        line = line[:most]
        line = line[3:] if start == 0 and line.startswith(b"\xef\xbb\xbf") else line
        if line.strip():
            expected.append((number, start, line, ended, too_long))
    assert [tuple(line) for line in read_lines(io.BytesIO(data), most=most)] == expected
