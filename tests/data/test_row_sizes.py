"""Sizes of rows that the config leaves open: chosen from the documents, recorded, and refused where much is wasted."""

import dataclasses
import json
import re

import pytest

from emu_jax.data.config import DataConfig
from emu_jax.data.counts import figures
from emu_jax.data.pipeline import Pipeline, train_tokenizer
from emu_jax.data.row_sizes import RowFill
from emu_jax.data.sources import PairOrder
from emu_jax.errors import UserError

SIZE, QUERIES = 16, 4
DATA = DataConfig(
    source="fluent_emoji",
    split="heldout_combinations",
    seed=0,
    row_tokens=64,
    row_images=0,
    batch_rows=2,
    packing_window=64,
    workers=0,
    pairs=PairOrder("image_first"),
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DATA, SIZE, vocab_size=400, model_type="word")


def _open(tokenizer, **changes) -> Pipeline:
    pipeline = Pipeline(dataclasses.replace(DATA, **changes), tokenizer, queries=QUERIES, image_size=SIZE)
    pipeline.close()
    return pipeline


def test_images_of_a_row_are_those_of_its_tokens(tokenizer):
    """A caption of 13 to 17 tokens an image: 4 of them, in rows of 64 tokens."""
    fills = {images: _open(tokenizer, row_images=images).fill for images in (2, 3, 4, 5, 8)}
    chosen = _open(tokenizer)
    assert chosen.data.row_images == min(fills, key=lambda images: fills[images].waste) == chosen.fill.fitting
    assert fills[2].padding > 0.4 and fills[8].empty_slots > 0.4
    assert fills[2].fitting == fills[8].fitting == pytest.approx(chosen.data.row_images, abs=1)
    longer = _open(tokenizer, row_tokens=128)
    assert longer.data.row_images == pytest.approx(2 * chosen.data.row_images, abs=2)


def test_text_alone_takes_one_slot_and_says_nothing(tokenizer, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"parts": [{"text": "woman dark skin tone " * 3}]}) for _ in range(40)))
    pipeline = _open(tokenizer, source=str(file))
    assert (pipeline.data.row_images, pipeline.fill.empty_slots, pipeline.fill.remark(pipeline.data)) == (1, 0.0, "")


def test_a_batch_holds_so_many_samples_on_average(tokenizer):
    pipeline = Pipeline(
        dataclasses.replace(DATA, batch_rows=0, batch_samples=24, shards=2), tokenizer, queries=QUERIES, image_size=SIZE
    )
    rows = pipeline.data.batch_rows
    assert rows % 2 == 0 and rows == pytest.approx(24 * pipeline.fill.rows / pipeline.fill.samples, abs=1)
    counts = []
    for _ in range(12):
        next(pipeline)
        counts.append(figures([pipeline.counts()])["documents"])
    pipeline.close()
    assert sum(counts) / 12 == pytest.approx(24, rel=0.15), f"expected about 24 samples a batch, got {counts}"


def test_waste_is_said_with_what_would_fit(tokenizer):
    wasteful = _open(tokenizer, row_images=8)
    expected = (
        rf"^config\.data: [\d.]+% of the positions .* slots are empty; row_images={wasteful.fill.fitting} would fit"
    )
    assert re.match(expected, wasteful.fill.remark(wasteful.data))
    assert _open(tokenizer).fill.remark(DATA) == ""
    with pytest.raises(
        UserError, match=r"max_padding=0\.2: [\d.]+% of the positions are padding .* would fit better than 2"
    ):
        _open(tokenizer, row_images=2, max_padding=0.2)


@pytest.mark.parametrize(("padding", "empty", "said"), [(0.2, 0.3, False), (0.21, 0.0, True), (0.0, 0.31, True)])
def test_when_a_run_says_so(padding, empty, said):
    fill = RowFill(samples=10, rows=5, padding=padding, empty_slots=empty, fitting=4)
    assert bool(fill.remark(dataclasses.replace(DATA, row_images=3))) == said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_images": -1}, r"row_images=-1; expected 0, which measures and chooses, or more"),
        (
            {"batch_rows": 0},
            r"batch_rows=0, batch_samples=0; expected rows per batch, or 0 and the mean number of samples",
        ),
        ({"max_padding": 1.5}, r"max_padding=1\.5; expected a share of 0 to 1"),
        ({"predicted_share": -0.1}, r"predicted_share=-0\.1; expected a share of 0 to 1"),
        ({"mixture_unit": "rows"}, r"mixture_unit='rows'; choose one of samples, records, tokens"),
        ({"chat_cut": "word"}, r"chat_cut='word'; choose one of turn, drop"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(DATA, **change)
