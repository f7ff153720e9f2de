"""`emu-jax prepare`: the same bytes for any number of workers, everything left out is counted, hostile images."""

import dataclasses
import io
import json
import re
import resource
import time
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from emu_jax.cli import main
from emu_jax.data import fluent_emoji
from emu_jax.data.document import Text
from emu_jax.data.images import EncodedImage, ImageError, Recoding
from emu_jax.data.prepare import PrepareConfig, later_ones, prepare, recode
from emu_jax.data.prepared import MANIFEST, Record, Records, StoredImage
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.errors import UserError

SIZE = 56  # stored at 64


def encoded(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed: int, height: int = 70, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A reader of made-up pairs and web documents: `images` of them, a share of which is broken or repeated."""

    count: int = 40
    broken: int = 0
    repeated: int = 0

    def shards(self, path: str) -> list[str]:
        return ["0", "1", "2", "3"]

    def read(self, shard: str) -> Iterator[RawDocument | Reject]:
        for number in range(int(shard), self.count, 4):
            data = encoded(noise(0 if number < self.repeated else number))
            if number >= self.count - self.broken:
                data = (data[: len(data) // 2], b"<html>no image", bytes([number]) * 9)[number % 3]
            yield RawDocument(f"{shard}/{number:03d}", "pair", (RawImage(data), Text(f"number {number}")))


def records_of(folder) -> list[Record]:
    records = Records(folder, "train")
    return [records[i] for i in range(len(records))]


@pytest.mark.long
def test_two_workers_write_the_bytes_of_one(tmp_path):
    reader = Numbers(broken=3, repeated=3)
    for workers in (1, 2):
        config = PrepareConfig("numbers", shards=3, max_faults=0.1, recoding=Recoding(SIZE), workers=workers)
        prepare(reader, "numbers", "anywhere", tmp_path / str(workers), config)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("1", "2"))
    assert one == two
    assert sorted(one) == [
        "dataset_info.json",
        "features.json",
        "manifest.json",
        *(f"numbers-train.array_record-0000{i}-of-00003" for i in range(3)),
        "rejects.jsonl",
    ]
    manifest = json.loads(one[MANIFEST])
    assert manifest["documents_read"] == 40 and manifest["splits"]["train"]["records"] == 35
    assert manifest["rejects"] == {
        "duplicate": {"rejects": 2, "documents": 2},
        "unreadable_image": {"rejects": 3, "documents": 3},
    }
    rejects = {reject["key"]: reject for reject in map(json.loads, one["rejects.jsonl"].splitlines())}
    assert {key: reject["detail"] for key, reject in rejects.items() if reject["reason"] == "duplicate"} == {
        "1/001": "1/001: the same images as 0/000#0",
        "2/002": "2/002: the same images as 0/000#0",
    }
    whole = "expected a whole JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or PPM file"
    assert {key: reject["detail"] for key, reject in rejects.items() if reject["reason"] == "unreadable_image"} == {
        "1/037": f"1/037#0: not a readable image (an HTML page); {whole}",
        "2/038": f"2/038#0: not a readable image (its first bytes are those of no image); {whole}",
        "3/039": f"3/039#0: not a readable image (PNG, but damaged, cut off or of an unknown kind); {whole}",
    }
    kept = {record.key for record in records_of(tmp_path / "1")}
    assert kept | rejects.keys() == {f"{n % 4}/{n:03d}" for n in range(40)} and not kept & rejects.keys()


@pytest.mark.slow
def test_faults_up_to_a_share(tmp_path):
    config = PrepareConfig("numbers", recoding=Recoding(SIZE), max_faults=0.02)
    manifest = prepare(Numbers(count=200, broken=2), "numbers", "", tmp_path / "1%", config)
    assert manifest["rejects"] == {"unreadable_image": {"rejects": 2, "documents": 2}}
    out = tmp_path / "3%"
    with pytest.raises(UserError) as error:
        prepare(Numbers(count=200, broken=6), "numbers", "", out, config)
    assert str(error.value) == (
        "numbers: 6 faults in 200 documents, more than 2.0%; rejects: unreadable_image 6; see "
        f"{out}/rejects.jsonl, mend the data or raise max_faults"
    )
    assert not (out / MANIFEST).exists()
    # What a stopped preparation left is no obstacle to the next one.
    prepare(Numbers(count=200, broken=6), "numbers", "", out, dataclasses.replace(config, max_faults=0.05))
    assert len(records_of(out)) == 194


@pytest.mark.long
def test_folders_that_cannot_be_written(tmp_path):
    config = PrepareConfig("numbers", recoding=Recoding(SIZE))
    (tmp_path / "used").mkdir()
    for name in ("thesis.txt", "other-train.array_record-00000-of-00001"):
        (tmp_path / "used" / name).touch()
        with pytest.raises(UserError, match=rf"used: it holds {name}; name a new folder"):
            prepare(Numbers(), "numbers", "", tmp_path / "used", config)
        (tmp_path / "used" / name).unlink()  # still there: nobody else's file is removed
    prepare(Numbers(), "numbers", "", tmp_path / "done", config)
    with pytest.raises(UserError, match=r"done: it holds prepared data; name a new folder"):
        prepare(Numbers(), "numbers", "", tmp_path / "done", config)
    with pytest.raises(UserError, match=r"shards=99: too many for 40 documents"):
        prepare(Numbers(), "numbers", "", tmp_path / "new", dataclasses.replace(config, shards=99))


@dataclasses.dataclass(frozen=True)
class Pages(Numbers):
    """Web documents that all show the same logo."""

    def read(self, shard: str) -> Iterator[RawDocument | Reject]:
        logo = RawImage(encoded(noise(999)))
        for number in range(int(shard), self.count, 4):
            own = (RawImage(encoded(noise(number)), score=0.5), Text("own")) if number else ()
            yield RawDocument(f"{shard}/{number:03d}", "web", (logo, Text("logo"), *own))


def test_an_image_stays_in_one_web_document(tmp_path):
    manifest = prepare(Pages(count=8), "pages", "", tmp_path / "x", PrepareConfig("pages", recoding=Recoding(SIZE)))
    assert manifest["rejects"] == {"duplicate": {"rejects": 7, "documents": 0}}
    found = {record.key: record.parts for record in records_of(tmp_path / "x")}
    layouts = {key: ["P" if isinstance(p, StoredImage) else p.text for p in parts] for key, parts in found.items()}
    assert layouts["0/000"] == ["P", "logo"]
    assert layouts["1/001"] == ["logo", "P", "own"]
    assert [part.score for part in found["1/001"] if isinstance(part, StoredImage)] == [0.5]


def test_the_first_of_an_image_s_documents_keeps_it():
    assert list(later_ones((b"digest", [("b", 1), ("a", 2), ("c", 0)]))) == [("b", (1, "a#2")), ("c", (0, "a#2"))]


def test_what_loses_an_image():
    broken, whole = RawImage(b"no image"), RawImage(encoded(noise(1)))

    def outcome(kind: str, *parts) -> list[str]:
        found = recode(RawDocument("k", kind, parts), Recoding(SIZE))
        return [f"{f.key} {f.reason} {f.whole}" if isinstance(f, Reject) else str(len(f.parts)) for f in found]

    text = Text("words")
    assert outcome("web", broken, text, whole) == ["k#0 unreadable_image False", "2"]
    assert outcome("storyboard", text, broken, whole) == ["k#0 unreadable_image False", "2"]
    assert outcome("pair", broken, text) == ["k unreadable_image True"]
    assert outcome("video", whole, broken, text) == ["k unreadable_image True"]
    assert outcome("chat", whole, broken, text) == ["k unreadable_image True"]
    assert outcome("chat", text) == ["1"]


# ---------------------------------------------------------------- images

MODES = {
    "CMYK": encoded(Image.fromarray(noise(2)).convert("CMYK"), "JPEG"),
    "grey": encoded(Image.fromarray(noise(2)).convert("L")),
    "palette": encoded(Image.fromarray(noise(2)).convert("P"), "GIF"),
    "16 bit": encoded(Image.fromarray(noise(2)[..., 0].astype(np.uint16) << 8)),
    "1 bit": encoded(Image.fromarray(noise(2)).convert("1")),
    "animated": encoded(
        Image.fromarray(noise(2)), "GIF", save_all=True, append_images=[Image.fromarray(noise(3))], loop=0
    ),
    "transparent": encoded(Image.fromarray(noise(2)).convert("RGBA")),
    "WebP": encoded(noise(2), "WEBP"),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_image_becomes_rgb(mode):
    pixels = EncodedImage(Recoding(SIZE).recode(MODES[mode], mode), SIZE, mode)()
    assert (pixels.shape, pixels.dtype) == ((SIZE, SIZE, 3), np.uint8)
    assert 100 < pixels.mean() < 156, "noise of all brightnesses keeps its mean"


def test_stored_images_are_what_the_model_would_read():
    differences = []
    for example in fluent_emoji.examples("heldout_combinations", 128)[:20]:
        stored = Recoding(112).recode(example.pixels, example.key)
        assert Image.open(io.BytesIO(stored)).size == (112, 112)
        straight = np.asarray(Image.fromarray(example.pixels).resize((112, 112), Image.Resampling.BICUBIC)).astype(int)
        differences.append(np.abs(EncodedImage(stored, 112, example.key)() - straight).mean())
    assert np.mean(differences) < 2, f"expected 1.5 levels of 255 or so, got {np.mean(differences):.2f}"


@pytest.mark.parametrize("side", [13_000, 30_000])
def test_huge_images_are_refused_by_their_header(side):
    """All of the PNG is there, 30,000 x 30,000 white pixels in 1 MB: it is not decoded, and costs nothing."""
    row = b"\0" + b"\xff" * -(-side // 8)
    pack, parts = zlib.compressobj(9), []
    for _ in range(side):
        parts.append(pack.compress(row))
    chunks = {
        b"IHDR": side.to_bytes(4, "big") * 2 + b"\x01\0\0\0\0",
        b"IDAT": b"".join(parts) + pack.flush(),
        b"IEND": b"",
    }
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")
        for name, body in chunks.items()
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(5):  # of the processor, and the least: others use this machine
        started = time.process_time()
        with pytest.raises(ImageError) as error:
            Recoding(224).recode(data, "huge")
        seconds.append(time.process_time() - started)
    assert error.value.reason == "too_many_pixels"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert min(seconds) < 0.05 and grown < 300, (
        f"took {min(seconds) * 1000:.1f} ms and {grown:.0f} MB; expected 50 ms, 300 MB"
    )


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (noise(1, 10, 10), "too_small"),
        (encoded(noise(1, 31, 100)), "too_small"),
        (encoded(noise(1, 40, 200)), "extreme_aspect"),
        (encoded(noise(1))[:900], "unreadable_image"),
        (b"", "unreadable_image"),
        (b"GIF89a" + bytes(20), "unreadable_image"),
    ],
)
def test_images_that_are_left_out(image, reason):
    with pytest.raises(ImageError, match=r"^here: ") as error:
        Recoding(224).recode(image, "here")
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"quality": 0}, "quality of 1 to 100"), ({"image_size": 1}, "image_size of at least 8")],
)
def test_bad_recoding(fields, message):
    with pytest.raises(UserError, match=message):
        Recoding(**fields)


@pytest.mark.parametrize("out", ["2024_cc", "猫", "_x", "n" * 101])
def test_names_are_refused_before_anything_is_read(tmp_path, capsys, out):
    command = ["prepare", "pairs", "--in", str(tmp_path / "none"), "--out", str(tmp_path / out)]
    assert main(command) == 2
    assert re.search(
        r"would be called '.*; its name has to begin with a letter from A to Z .* choose one with --name$",
        capsys.readouterr().err.strip(),
    )
    assert not list(tmp_path.iterdir())
    assert main([*command, "--name", "cc_2024"]) == 2
    assert "none: no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize("fields", [{"name": "a b"}, {"name": "a", "workers": 0}, {"name": "a", "max_faults": 2}])
def test_bad_settings(fields):
    with pytest.raises(UserError, match=r"expected|choose one"):
        PrepareConfig(**fields)
