"""The images of a JSONL: a resumed run notices that they were replaced, and a missing one is a fault, not an end."""

import contextlib
import json
import os

import numpy as np
import pytest
from PIL import Image as PIL

from emu_jax.data.config import DataConfig
from emu_jax.data.counts import figures
from emu_jax.data.pipeline import Pipeline
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError
from emu_jax.storage import replace_text

SIZE, COUNT = 8, 40
TOKENIZER = Tokenizer.train([f"cat {n}" for n in range(COUNT)], vocab_size=200, model_type="word")


def draw(folder, number: int, seed: int = 0) -> None:
    pixels = np.random.default_rng([number, seed]).integers(0, 256, (12, 12, 3), np.uint8)
    with (folder / f"{number}.bmp").open("wb") as file:  # a format whose size does not depend on the pixels
        PIL.fromarray(pixels).save(file, "BMP")


def write(folder) -> str:
    """A JSONL of pairs beside its images; returns its path."""
    for number in range(COUNT):
        draw(folder, number)
    lines = [json.dumps({"image": f"{number}.bmp", "text": f"cat {number}"}) for number in range(COUNT)]
    replace_text(folder / "cats.jsonl", "\n".join(lines) + "\n")
    return str(folder / "cats.jsonl")


def stream(source: str, **changes) -> Pipeline:
    fields = {
        "source": source,
        "split": "",
        "seed": 0,
        "row_tokens": 32,
        "row_images": 2,
        "batch_rows": 2,
        "packing_window": 8,
        "workers": 0,
        "pairs": {},
    }
    return Pipeline(DataConfig.from_dict(fields | changes), TOKENIZER, queries=2, image_size=SIZE)


def restored(source: str, state: dict, **changes) -> None:
    with contextlib.closing(stream(source, **changes)) as pipeline:
        pipeline.set_state(state)


REFUSED = (
    r"^input pipeline: images of the \.jsonl source were replaced, removed or copied since the checkpoint was taken"
)


@pytest.mark.parametrize("how", ["stat", "content"])
def test_replaced_images_are_refused(tmp_path, how):
    source = write(tmp_path)
    first = stream(source, image_fingerprint=how)
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    restored(source, state, image_fingerprint=how)
    draw(tmp_path, 7, seed=1)
    with pytest.raises(UserError, match=REFUSED):
        restored(source, state, image_fingerprint=how)


def test_contents_tell_more_than_sizes_and_times(tmp_path):
    source, image = write(tmp_path), tmp_path / "7.bmp"
    states = {how: stream(source, image_fingerprint=how).get_state() for how in ("stat", "content")}
    before = image.stat()
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # as a copy
    restored(source, states["content"], image_fingerprint="content")
    with pytest.raises(UserError, match=REFUSED):
        restored(source, states["stat"], image_fingerprint="stat")
    draw(tmp_path, 7, seed=1)
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    restored(source, states["stat"], image_fingerprint="stat")
    with pytest.raises(UserError, match=REFUSED):
        restored(source, states["content"], image_fingerprint="content")


def test_a_deleted_image_is_a_fault_of_its_document(tmp_path):
    source = write(tmp_path)
    pipeline = stream(source, max_faults=0.02)
    next(pipeline)
    (tmp_path / "7.bmp").unlink()
    for _ in range(100):  # several epochs
        next(pipeline)
    faults = figures([pipeline.counts()])["faulty_documents"]
    assert faults >= 3 and faults == pipeline.count(f"faults/{source}")
    pipeline.close()
    strict = stream(source)
    with pytest.raises(
        UserError, match=r"have unreadable images, .*max_faults=0\.0; the last: .*7\.bmp: no such image file"
    ):
        for _ in range(100):
            next(strict)


@pytest.mark.parametrize("kind", ["bucket", "s3_bucket"])
def test_a_bucket_holds_the_documents_and_their_images(tmp_path, kind, request):
    folder = request.getfixturevalue(kind)
    here, there = stream(write(tmp_path)), stream(write(folder))
    for _ in range(5):
        expected, found = next(here), next(there)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
    state = there.get_state()
    there.set_state(state)
    draw(folder, 7, seed=1)
    with pytest.raises(UserError, match=REFUSED):
        restored(str(folder / "cats.jsonl"), state)


def test_a_local_file_names_images_elsewhere(tmp_path, bucket):
    draw(bucket, 0)
    (tmp_path / "one.jsonl").write_text(json.dumps({"image": f"{bucket}/0.bmp", "text": "cat 0"}) + "\n")
    batch = next(stream(str(tmp_path / "one.jsonl")))
    assert batch["images"].any()
    (tmp_path / "one.jsonl").write_text('{"image": "https://example.org/a.png", "text": "cat 0"}\n')
    with pytest.raises(
        UserError, match=r"one\.jsonl:1: https://example\.org/a\.png: https:// is no storage that emu_jax reads"
    ):
        stream(str(tmp_path / "one.jsonl"))
