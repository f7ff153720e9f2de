"""The probe's arithmetic against plain Python, and its two parts of a source."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.data.document import Text
from emu_jax.data.prepared import Record, Records, StoredImage, file_entry, shard_name, write_manifest
from emu_jax.data.records import write_records
from emu_jax.errors import UserError
from tests.benchmarks.benchmark_probe import Item, check_settings, hold_out, items_of, retrieval
from tests.benchmarks.probe import (
    Ranks,
    Run,
    TextVectors,
    mean_with_interval,
    principal,
)


def test_ranks_of_a_matrix() -> None:
    scores = np.array(
        [
            [0.9, 0.5, 0.1],  # right one first
            [0.9, 0.5, 0.1],  # right one last
            [0.5, 0.5, 0.1],  # tied for first
            [0.2, 0.2, 0.2],  # nothing told
        ]
    )
    ranks = Ranks.of(scores, np.array([0, 2, 1, 0]))
    assert ranks.better.tolist() == [0, 2, 0, 0]
    assert ranks.tied.tolist() == [0, 0, 1, 2]
    np.testing.assert_allclose(ranks.recall(1), [1, 0, 1 / 2, 1 / 3])
    np.testing.assert_allclose(ranks.recall(2), [1, 0, 1, 2 / 3])
    np.testing.assert_allclose(ranks.reciprocal(), [1, 1 / 3, (1 + 1 / 2) / 2, (1 + 1 / 2 + 1 / 3) / 3])
    np.testing.assert_allclose(ranks.beaten(), [1, 0, 3 / 4, 1 / 2])


@given(scores=st.lists(st.integers(0, 3), min_size=1, max_size=6), k=st.integers(1, 7), data=st.data())
def test_ties_fall_at_random(scores: list[int], k: int, data: st.DataObject) -> None:
    """Recall and reciprocal rank are the means over all orders in which tied candidates can stand."""
    right = data.draw(st.integers(0, len(scores) - 1))
    orders = [sorted(order, key=lambda place: -scores[place]) for order in itertools.permutations(range(len(scores)))]
    places = [order.index(right) + 1 for order in orders]
    ranks = Ranks.of(np.array([scores], np.float64), np.array([right]))
    expected = Fraction(sum(place <= k for place in places), len(places))
    np.testing.assert_allclose(ranks.recall(k), [float(expected)], err_msg=f"{scores}, right {right}, k {k}")
    expected = sum(Fraction(1, place) for place in places) / len(places)
    np.testing.assert_allclose(ranks.reciprocal(), [float(expected)], err_msg=f"{scores}, right {right}")


def test_principal_directions_are_of_the_known_items() -> None:
    rng = np.random.default_rng(0)
    told = rng.normal(size=(50, 1)) * [1.0, 2.0, -3.0] + [5.0, 0.0, 0.0]  # one direction, on three scales
    x = np.concatenate([told + rng.normal(scale=1e-3, size=told.shape), [[5.0, 0.0, 0.0]]])
    first = principal(x, 50, 1)
    assert first.shape == (51, 1)
    np.testing.assert_allclose(abs(np.corrcoef(first[:50, 0], told[:, 1])[0, 1]), 1.0, atol=1e-4)
    np.testing.assert_allclose(first[:50].std(0), np.sqrt(3.0), atol=1e-3)  # three standardised columns in one
    assert (principal(np.concatenate([x[:50], [[9.0, 9.0, 9.0]]]), 50, 1)[:50] == first[:50]).all()


def test_text_vectors_tell_texts_apart() -> None:
    texts = ["dog: dark skin tone", "dog: light skin tone", "cat: dark skin tone"]
    vectors = TextVectors.fit(texts, 10)
    x = vectors([*texts, "DOG, dark skin tone!", "unknown"])
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), [1, 1, 1, 1, 0], atol=1e-9)
    np.testing.assert_allclose(x[3], x[0], atol=1e-9)
    assert max(x[0] @ x[1], x[0] @ x[2], x[1] @ x[2]) < 0.9


def test_interval_covers_runs_and_groups() -> None:
    """Items of one group count as one: 200 copies of 4 groups' values say as little as the 4."""
    values = np.array([0.0, 0.0, 1.0, 1.0])
    few = Run(values, np.array(list("abcd")))
    many = Run(np.repeat(values, 50), np.repeat(list("abcd"), 50))
    assert mean_with_interval([few]) == mean_with_interval([many]) == (0.5, 0.0, 1.0)
    apart = [Run(np.full(50, value), np.arange(50)) for value in (0.0, 1.0)]
    assert mean_with_interval(apart) == (0.5, 0.0, 1.0)


def test_retrieval_finds_what_is_there_and_nothing_else() -> None:
    """Features that hold the text find it among copies of it that count as right; features of noise stay at chance."""
    animals, colours = ["cat", "dog", "bird", "fish", "cow"], ["red", "blue", "green", "black"]
    names = [f"{colour} {animal}" for animal in animals for colour in colours]
    items = [Item((), names[number % 20], str(number), str(number), {}) for number in range(400)]
    rng = np.random.default_rng(0)
    code = np.array([[float(word in item.text.split()) for word in animals + colours] for item in items])
    told = code @ rng.normal(size=(9, 30)) + rng.normal(scale=0.1, size=(400, 30))
    noise = rng.normal(size=(400, 30))
    found = retrieval(items[:300], told[:300], items[300:], told[300:])
    assert found["recall@1"].values.mean() == 1.0
    assert found["recall@1"].chance == 1 / 20
    lost = retrieval(items[:300], noise[:300], items[300:], noise[300:])
    assert 0.4 < lost["wrong texts beaten"].values.mean() < 0.6


def test_items_of_records() -> None:
    image = StoredImage(b"1")
    emoji = Record("k", "pair", (image, Text("nurse: dark skin tone")))
    assert list(items_of(emoji, {"nurse: dark skin tone": "1"})) == [
        Item((b"1",), "nurse: dark skin tone", "k", "nurse", {"group": "1", "role": "nurse", "tone": "dark skin tone"})
    ]
    page = Record("auto_examples/svm/a.html", "web", (Text("before"), image, image, Text("one two"), image))
    classes = {"topic": "auto_examples/svm"}
    assert [(item.text, item.group, item.classes) for item in items_of(page, {})] == [
        ("one two", page.key, classes),
        ("one two", page.key, classes),
        ("", page.key, classes),
    ]
    video = Record("part", "storyboard", (image, Text("one"), image, Text("two")))
    assert [item.text for item in items_of(video, {})] == ["one", "one two"]


def test_two_parts_of_a_source(tmp_path: Path) -> None:
    source = tmp_path / "pairs"
    source.mkdir()
    records = [Record(f"key {number}", "pair", (StoredImage(b"x"), Text(f"{number}"))) for number in range(10)]
    path = source / shard_name("pairs", "train", 0, 1)
    write_records(path, (record.serialise() for record in records))
    told = {"source": "pairs", "settings": {"images": {"image_size": 64}}}
    write_manifest(source, "pairs", {"train": {path.name: file_entry(path, 10)}}, told)
    found = []
    for fold in range(5):
        hold_out(source, fold, tmp_path / str(fold))
        train, held = (Records(tmp_path / str(fold) / part, "train") for part in ("train", "heldout"))
        assert [len(train), len(held)] == [8, 2]
        train.verify()
        keys = [held[index].key for index in range(2)]
        assert not {train[index].key for index in range(8)} & set(keys)
        found += keys
    assert sorted(found) == [record.key for record in records]
    before = (tmp_path / "0" / "train" / path.name).stat().st_mtime_ns
    hold_out(source, 0, tmp_path / "0")
    assert (tmp_path / "0" / "train" / path.name).stat().st_mtime_ns == before
    write_records(path, (record.serialise() for record in records[1:]))
    write_manifest(source, "pairs", {"train": {path.name: file_entry(path, 9)}}, told)
    with pytest.raises(UserError, match="cut from other records"):
        hold_out(source, 0, tmp_path / "0")


def test_a_folder_keeps_its_settings(tmp_path: Path) -> None:
    check_settings(tmp_path / "out", {"steps": 300, "overrides": []})
    check_settings(tmp_path / "out", {"steps": 300, "overrides": []})
    with pytest.raises(UserError, match="have steps 300, not 200; name a new folder"):
        check_settings(tmp_path / "out", {"steps": 200, "overrides": []})
