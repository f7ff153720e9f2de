"""COCO captions, NoCaps and Flickr30k."""

import pytest

from emu_jax.evaluate.question import Question
from tests.evaluate.benchmarks.editing import edit, read, refused
from tests.evaluate.people import HELD_OUT, people
from tests.evaluate.samples import write_sample


@pytest.fixture
def coco(tmp_path):
    write_sample("coco", tmp_path)
    return tmp_path


def test_karpathy(coco):
    assert read("coco", coco)["73"] == Question(
        id="73",
        images=(coco / "val2014" / "COCO_val2014_000000000073.jpg",),
        answers=(
            "person in lotus position: medium skin tone",
            "A person in lotus position with medium skin tone.",
            "An emoji of a person in lotus position.",
            "An image of a person in lotus position",
            "The person in lotus position has medium skin tone.",
        ),
    )
    found = {split: list(read("coco", coco, split)) for split in ("test", "val", "train")}
    train = ["9", "25", "30", "34", "36", "49", "61", "64", "71"]  # the last is of restval
    assert found == {"test": ["42", "73", "74"], "val": ["133"], "train": train}


def test_coco_itself(coco):
    (coco / "images").mkdir()
    for folder in ("val2014", "train2014"):
        (coco / folder).rename(coco / "images" / folder)
    found = read("coco", coco, "val2014")
    assert list(found) == ["42", "73", "74", "133"]
    assert found["42"].images == (coco / "images" / "val2014" / "COCO_val2014_000000000042.jpg",)
    assert found["42"].answers == tuple(people(HELD_OUT)[0].captions)
    assert list(read("coco", coco, "train2014"))[-1] == "71"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda d: d["images"][1].update(cocoid=42),
            "images[1] has the cocoid 42 again, after images[0]; expected each",
        ),
        (
            lambda d: d["images"][2].update(sentences=[]),
            "images[2].sentences is a list of 0; expected at least one caption",
        ),
        (lambda d: d["images"][2].pop("sentences"), "images[2] has no sentences"),
        (
            lambda d: d["images"][3].update(split="dev"),
            "images[3].split is 'dev'; expected one of train, restval, val, test",
        ),
    ],
)
def test_wrong_karpathy(coco, change, expected):
    edit(coco / "dataset_coco.json", change)
    assert refused("coco", coco).startswith(f"dataset_coco.json: {expected}")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d["images"].append(d["images"][0]), "images[4] has the id 42 again, after images[0]"),
        (
            lambda d: d["annotations"].append(d["annotations"][2]),
            "annotations[20] has the id 102 again, after annotations[2]",
        ),
        (lambda d: d["annotations"][7].update(image_id=5), "annotations[7].image_id is 5; expected the id of one of"),
        (
            lambda d: d.update(annotations=d["annotations"][:5] + d["annotations"][15:]),
            "no caption of image 73 (and 1 more); expected at least one for each image",
        ),
        (lambda d: d.pop("annotations"), "the file has no annotations"),
    ],
)
def test_wrong_coco(coco, change, expected):
    edit(coco / "annotations" / "captions_val2014.json", change)
    assert refused("coco", coco, "val2014").startswith(f"annotations/captions_val2014.json: {expected}")


def test_no_image_of_the_split(coco):
    edit(coco / "dataset_coco.json", lambda d: d["images"].pop(3))
    assert refused("coco", coco, "val").startswith(
        "ROOT: holds no question of coco, split val; coco expects there: data"
    )


def test_nocaps(tmp_path):
    write_sample("nocaps", tmp_path)
    found = read("nocaps", tmp_path)
    assert {key: question.kind for key, question in found.items()} == {
        "0": "in-domain",
        "1": "near-domain",
        "2": "out-domain",
        "3": "near-domain",
    }
    assert found["0"].images == (tmp_path / "val" / "0013ea2087020901.jpg",)
    assert found["0"].answers == tuple(people(HELD_OUT)[0].captions)
    assert [(q.kind, q.answers) for q in read("nocaps", tmp_path, "test").values()] == [("", ()), ("", ())]
    edit(tmp_path / "nocaps_val_4500_captions.json", lambda d: d["images"][1].update(domain="far"))
    assert refused("nocaps", tmp_path) == (
        "nocaps_val_4500_captions.json: images[1].domain is 'far'; expected one of in-domain, near-domain, out-domain"
    )


def test_flickr30k(tmp_path):
    write_sample("flickr30k", tmp_path)
    found = read("flickr30k", tmp_path)
    assert list(found) == ["1007129816", "1007129817", "1007129818"]
    assert found["1007129817"].images == (tmp_path / "flickr30k-images" / "1007129817.jpg",)
    assert found["1007129817"].answers == tuple(people(HELD_OUT)[1].captions)
    edit(tmp_path / "dataset_flickr30k.json", lambda d: d["images"].append(d["images"][1]))
    assert refused("flickr30k", tmp_path).startswith(
        "dataset_flickr30k.json: images[13] has the filename '1007129817.jpg' again, after images[1]"
    )
