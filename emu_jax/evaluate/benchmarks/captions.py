"""Images to describe: COCO captions, NoCaps and Flickr30k.

A question has one image and all its reference captions as `answers`.

COCO, Karpathy's splits: `dataset_coco.json` of "Deep Visual-Semantic Alignments", used are
    {"images": [{"cocoid", "filepath": "val2014", "filename", "split", "sentences": [{"raw"}]}]}
with the splits train and restval, which together are `train` here, val and test (5000 images, the field's test set).
COCO, its own: `captions_val2014.json` and `captions_train2014.json` (splits val2014 and train2014), used are
    {"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}
NoCaps: `nocaps_val_4500_captions.json`, as COCO's, with "domain" of an image: in-domain, near-domain or out-domain,
the question's kind. (The download page, which has the format, does not show the domain; code that reads the file does:
unverified.) Test: `nocaps_test_image_info.json`, without annotations.
Flickr30k: Karpathy's `dataset_flickr30k.json`, as his COCO's without "cocoid" and "filepath". The release's own
`results_20130124.token` has no splits and is not read.

Results are COCO's: [{"image_id": int, "caption": str}].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from emu_jax.errors import UserError
from emu_jax.evaluate.benchmarks.benchmark import Benchmark, Prediction
from emu_jax.evaluate.benchmarks.files import Entry, Files, more, unique
from emu_jax.evaluate.question import Question

KARPATHY = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
DOMAINS = ("in-domain", "near-domain", "out-domain")


def captioned(document: Entry) -> list[tuple[Entry, list[Entry]]]:
    """COCO's format of captions -> its images, each with its annotations in the file's order.

    Raises:
      UserError: two images or two annotations share an id, an image has no caption, or a caption no image.
    """
    images = unique(document.entries("images"), lambda entry: entry.whole("id"), "id")
    found: dict[int, list[Entry]] = {key: [] for key in images}
    for annotation in unique(document.entries("annotations"), lambda entry: entry.whole("id"), "id").values():
        if (key := annotation.whole("image_id")) not in found:
            raise annotation.wrong("image_id", "the id of one of the file's images")
        found[key].append(annotation)
    if bare := [key for key, captions in found.items() if not captions]:
        raise UserError(
            f"{document.path}: no caption of image {bare[0]}{more(bare)}; expected some of every image of the file"
        )
    return [(images[key], captions) for key, captions in found.items()]


def _texts(captions: Sequence[Entry]) -> tuple[str, ...]:
    return tuple(caption.text("caption") for caption in captions)


def results(questions: Sequence[Question], predictions: Mapping[str, Prediction]) -> list[dict]:
    """COCO's format of results."""
    return [{"image_id": int(question.id), "caption": predictions[question.id]} for question in questions]


# ---------------------------------------------------------------- COCO


def coco_names(folder: str, file: str) -> tuple[str, str]:
    """Where COCO's images stand: beside the annotations, or under images/."""
    return f"{folder}/{file}", f"images/{folder}/{file}"


def _read_coco(files: Files, split: str) -> list[Question]:
    if split in KARPATHY:
        document = files.document("dataset_coco.json", "annotations/dataset_coco.json")
        entries = _karpathy(document, split)
        known = unique(entries, lambda entry: entry.whole("cocoid"), "cocoid")
        return [
            Question(
                id=str(key),
                images=(files.shown(*coco_names(entry.text("filepath"), entry.text("filename"))),),
                answers=_sentences(entry),
            )
            for key, entry in known.items()
        ]
    document = files.document(f"captions_{split}.json", f"annotations/captions_{split}.json")
    return [
        Question(
            id=str(image.whole("id")),
            images=(files.shown(*coco_names(split, image.text("file_name"))),),
            answers=_texts(captions),
        )
        for image, captions in captioned(document)
    ]


def _karpathy(document: Entry, split: str) -> list[Entry]:
    known = [name for names in KARPATHY.values() for name in names]
    chosen = []
    for entry in document.entries("images"):
        if (name := entry.text("split")) not in known:
            raise entry.wrong("split", f"one of {', '.join(known)}")
        if name in KARPATHY[split]:
            chosen.append(entry)
    return chosen


def _sentences(entry: Entry) -> tuple[str, ...]:
    if not (captions := tuple(sentence.text("raw") for sentence in entry.entries("sentences"))):
        raise entry.wrong("sentences", "at least one caption")
    return captions


COCO = Benchmark(
    name="coco",
    task="caption",
    splits=("test", "val", "train", "val2014", "train2014"),
    split="test",
    shots="train",
    tree=(
        "dataset_coco.json (splits test, val and train) or captions_val2014.json and captions_train2014.json (splits "
        "val2014 and train2014), here or in annotations/",
        "val2014/COCO_val2014_000000000042.jpg …",
        "train2014/COCO_train2014_000000000009.jpg … (splits train and train2014)",
        "both folders here or in images/",
    ),
    described="cocodataset.org, page Download (2014 images and annotations); Andrej Karpathy's page of Deep "
    "Visual-Semantic Alignments, caption_datasets.zip",
    reader=_read_coco,
    submission=results,
)


# ---------------------------------------------------------------- NoCaps


def _read_nocaps(files: Files, split: str) -> list[Question]:
    if split == "test":
        document = files.document("nocaps_test_image_info.json", "annotations/nocaps_test_image_info.json")
        images = unique(document.entries("images"), lambda entry: entry.whole("id"), "id")
        found: list[tuple[Entry, list[Entry]]] = [(image, []) for image in images.values()]
    else:
        names = "nocaps_val_4500_captions.json", "annotations/nocaps_val_4500_captions.json"
        found = captioned(files.document(*names))
    questions = []
    for image, captions in found:
        name = image.text("file_name")
        domain = image.text("domain") if "domain" in image else ""
        if domain and domain not in DOMAINS:
            raise image.wrong("domain", f"one of {', '.join(DOMAINS)}")
        questions.append(
            Question(
                id=str(image.whole("id")),
                images=(files.shown(f"{split}/{name}", f"images/{name}", f"images/{split}/{name}"),),
                answers=_texts(captions),
                kind=domain,
            )
        )
    return questions


NOCAPS = Benchmark(
    name="nocaps",
    task="caption",
    splits=("val", "test"),
    split="val",
    shots="",
    tree=(
        "nocaps_val_4500_captions.json (split test: nocaps_test_image_info.json), here or in annotations/",
        "val/0013ea2087020901.jpg … (split test: test/…), or in images/val/ or images/",
    ),
    described="nocaps.org, page Download",
    reader=_read_nocaps,
    submission=results,
)


# ---------------------------------------------------------------- Flickr30k


def _read_flickr30k(files: Files, split: str) -> list[Question]:
    document = files.document("dataset_flickr30k.json", "annotations/dataset_flickr30k.json")
    known = unique(_karpathy(document, split), lambda entry: entry.text("filename"), "filename")
    return [
        Question(
            id=Path(name).stem,
            images=(files.shown(f"flickr30k-images/{name}", f"flickr30k_images/{name}", f"images/{name}"),),
            answers=_sentences(entry),
        )
        for name, entry in known.items()
    ]


FLICKR30K = Benchmark(
    name="flickr30k",
    task="caption",
    splits=("test", "val", "train"),
    split="test",
    shots="train",
    tree=(
        "dataset_flickr30k.json, here or in annotations/",
        "flickr30k-images/1007129816.jpg …, or the same in flickr30k_images/ or images/",
    ),
    described="Flickr30k's page of the University of Illinois (images); Andrej Karpathy's page of Deep "
    "Visual-Semantic Alignments, caption_datasets.zip",
    reader=_read_flickr30k,
)
