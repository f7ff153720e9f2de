"""The embedded data set: counts, splits, integrity, size."""

import collections

import numpy as np
import pytest
import tensorflow_datasets as tfds

from emu_jax.data.fluent_emoji import FOLDER, SPLITS, examples, records, role_of
from emu_jax.data.images import decode_image


@pytest.fixture(scope="module")
def splits():
    return {split: examples(split, 32) for split in SPLITS}


def test_counts(splits):
    counts = {split: len(pool) for split, pool in splits.items()}
    assert counts == {"train": 3192, "heldout_combinations": 140, "heldout_concepts": 40}


def test_no_key_caption_or_image_stands_in_two_splits(splits):
    for attribute in (lambda e: e.key, lambda e: e.caption, lambda e: e.pixels.tobytes()):
        train = {attribute(e) for e in splits["train"]}
        for held_out in SPLITS[1:]:
            assert not train & {attribute(e) for e in splits[held_out]}


def test_held_out_combinations_are_of_known_roles_and_tones(splits):
    roles = collections.Counter(e.role for e in splits["train"] if e.tone)
    tones = {e.tone for e in splits["train"]}
    pairs = {(e.role, e.tone) for e in splits["train"]}
    for e in splits["heldout_combinations"]:
        assert e.caption == f"{e.role}: {e.tone}"
        assert roles[e.role] >= 3, e.caption
        assert e.tone in tones
        assert (e.role, e.tone) not in pairs


def test_held_out_concepts_share_no_image_of_their_concept(splits):
    train_heads = {e.caption.split(":")[0] for e in splits["train"]}
    for e in splits["heldout_concepts"]:
        assert not e.tone
        assert e.caption not in train_heads


def test_skin_tones_are_named_as_they_look(splits):
    """From light to dark, every tone is darker than the one before it, where nothing but a hand is shown."""
    hands = ("thumbs up", "thumbs down", "index pointing up", "crossed fingers", "oncoming fist", "palm down hand")
    tones = [f"{tone} skin tone" for tone in ("light", "medium-light", "medium", "medium-dark", "dark")]
    light = collections.defaultdict(dict)
    for e in (e for pool in splits.values() for e in pool):
        if e.role in hands:
            light[e.role][e.tone] = e.pixels.mean()
    assert sorted(light) == sorted(hands)
    for role, found in light.items():
        values = [found[tone] for tone in tones]
        assert values == sorted(values, reverse=True), (role, found)


def test_images_are_images(splits):
    for pool in splits.values():
        for e in pool:
            assert e.pixels.shape == (32, 32, 3)
            assert e.pixels.std() > 5, e.caption
    assert np.mean([e.pixels.mean() for e in splits["train"]]) == pytest.approx(190, abs=30)


def test_files_are_those_of_the_manifest_and_small():
    found = [records(split) for split in SPLITS]
    for split in found:
        split.verify()
    listed = [name for split in SPLITS for name in found[0].manifest["splits"][split]["files"]]
    assert sorted(f.name for f in FOLDER.glob("*.array_record*")) == sorted(listed)
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) <= 12_000_000
    names = {f.name for f in FOLDER.iterdir()}
    assert {"CREDITS.md", "LICENSE-fluent-emoji.txt", "LICENSE-emojibase-data.txt"} <= names


def test_tensorflow_datasets_reads_the_webp_files():
    source = tfds.builder_from_directory(FOLDER).as_data_source("heldout_concepts")
    example, record = source[3], records("heldout_concepts")[3]
    assert example["texts"] == [record.parts[1].text.encode()]
    np.testing.assert_array_equal(example["images"][0], decode_image(record.parts[0].data, "3"))


@pytest.mark.parametrize(
    ("caption", "role"),
    [
        ("cat", "cat"),
        ("flag: Germany", "flag: Germany"),
        ("woman astronaut: medium-dark skin tone", "woman astronaut"),
        ("people holding hands: light skin tone, dark skin tone", "people holding hands"),
        ("man: light skin tone, beard", "man: beard"),
        ("kiss: woman, man, medium skin tone", "kiss: woman, man"),
    ],
)
def test_a_role_is_a_caption_without_its_tones(caption, role):
    assert role_of(caption) == role
