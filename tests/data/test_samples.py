"""Samples of records: which images are predicted and which are read, weights by source, and shares of a mixture."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from emu_jax.data.config import DataConfig
from emu_jax.data.document import Document, Image, Text
from emu_jax.data.mixture import SourceConfig
from emu_jax.data.samples import Samples, read_or_predicted
from emu_jax.data.sources import PairOrder
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.data.windows import make_windows
from emu_jax.errors import UserError

QUERIES, SIZE = 2, 8
TOKENIZER = Tokenizer.train(["a red bus blue cat dog one two three four"], vocab_size=40, model_type="word")
DATA = DataConfig("", "train", 0, 64, 4, 2, 32, 0, PairOrder("random"), mixture={"one": SourceConfig("one")})


def _image(key: str) -> Image:
    return Image(np.zeros((SIZE, SIZE, 3), np.uint8), key)


IMAGE = _image("p")


@pytest.mark.parametrize(
    ("document", "share"),
    [
        (Document((IMAGE, Text("a cat"))), 0.3),
        (Document((Text("a"), IMAGE, Text("cat"), _image("q"))), 0.3),
        (Document((Text("a cat"), IMAGE)), 1.0),  # nothing that is learnt could read it
        (Document((IMAGE, Text(""))), 1.0),
        (Document((IMAGE, Text("a cat")), text_weight=0.0), 1.0),
        (Document((IMAGE, Text("a cat")), visual_weight=0.0), 0.0),
    ],
)
def test_images_are_read_or_predicted(document, share):
    rng = np.random.default_rng(0)
    drawn = [read_or_predicted(document, 0.3, rng) for _ in range(2000)]
    predicted = [found.visual_weight == 1.0 for found in drawn]
    assert np.mean(predicted) == pytest.approx(share, abs=0.03)
    assert all(dataclasses.replace(found, visual_weight=document.visual_weight) == document for found in drawn)
    assert read_or_predicted(document, 1.0, rng) is document, "as published"


class _Records:
    """A source of given documents, a list a record."""

    fingerprint = "records"
    images_fingerprint = ""
    remark = ""

    def __init__(self, records: list[list[Document]]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def read(self, indices: Sequence[int]) -> list[list[Document]]:
        return [self._records[index] for index in indices]

    def documents(self, record: list[Document], rng: np.random.Generator) -> list[Document]:
        return record

    def texts(self) -> list[str]:
        return []


def test_weights_of_a_source_scale_its_documents_losses():
    entry = SourceConfig("one", text_weight=0.5, visual_weight=3.0)
    source = _Records([[Document((IMAGE, Text("a cat")), text_weight=0.5)]])
    samples = Samples({"one": source}, TOKENIZER, dataclasses.replace(DATA, mixture={"one": entry}), QUERIES)
    [[found]] = samples([((0, 0), np.random.default_rng(0))])
    assert found.text_weights.tolist() == [0, 0, 0, 0, 0, 0.25, 0.25, 0.25]
    assert found.visual_weights.tolist() == [0, 0, 3, 3, 3, 0, 0, 0]
    with pytest.raises(UserError, match=r"config\.data\.mixture\.web\.text_weight=-1\.0; expected 0 or more"):
        SourceConfig.from_dict("web", {"source": "x", "text_weight": -1.0})


def test_pairs_of_a_source_have_an_order_of_their_own():
    entries = {"one": SourceConfig("fluent_emoji", pairs={"order": "image_first"}), "two": SourceConfig("fluent_emoji")}
    data = dataclasses.replace(DATA, pairs=PairOrder("text_first"), mixture=entries)
    opened = data.open(SIZE)
    first = {
        name: source.documents(*source.read([0]), np.random.default_rng(0))[0].parts[0]
        for name, source in opened.items()
    }
    assert isinstance(first["one"], Image) and isinstance(first["two"], Text)
    with pytest.raises(
        UserError, match=r"config\.data\.mixture\.one\.pairs\.ordr is no field of PairOrder; did you mean"
    ):
        dataclasses.replace(DATA, mixture={"one": SourceConfig("x", pairs={"ordr": "both"})})
    with pytest.raises(UserError, match=r"order='up'; choose one of"):
        dataclasses.replace(DATA, mixture={"one": SourceConfig("x", pairs={"order": "up"})})


def _story(number: int, frames: int) -> Document:
    parts = [part for frame in range(frames) for part in (Text("one two three"), _image(f"{number}#{frame}"))]
    return Document(tuple(parts), window=True)


RECORDS = {
    "pairs": [[Document((_image(str(n)), Text("a cat")))] for n in range(60)],
    "web": [[Document((Text("a red bus " * 8), _image(f"w{n}"))), Document((Text("dog"),))] for n in range(40)],
    "story": [[_story(n, 3 + n)] for n in range(30)],
}
WEIGHTS = {"pairs": 4.0, "web": 4.0, "story": 1.0}


@pytest.mark.long
@pytest.mark.parametrize("unit", ["samples", "records", "tokens"])
def test_sources_have_the_shares_that_their_weights_say(unit):
    """Records of one sample, of two, and of one that is as long as a row."""
    entries = {name: SourceConfig(name, weight=weight) for name, weight in WEIGHTS.items()}
    data = dataclasses.replace(DATA, mixture=entries, mixture_unit=unit, row_images=6, batch_rows=4)
    sources = {name: _Records(records) for name, records in RECORDS.items()}
    windows = make_windows(Samples(sources, TOKENIZER, data, QUERIES), data)
    counts = dict.fromkeys(WEIGHTS, 0)
    for window in range(60):
        for row in windows[window]:
            for sample in row:
                name = list(WEIGHTS)[sample.source]
                counts[name] += len(sample) if unit == "tokens" else 1
    if unit == "records":
        counts["web"] /= 2
    shares = {name: count / sum(counts.values()) for name, count in counts.items()}
    for name, weight in WEIGHTS.items():
        expected = weight / sum(WEIGHTS.values())
        assert shares[name] == pytest.approx(expected, rel=0.05), f"{name}: expected {expected:.3f}, got {shares}"
