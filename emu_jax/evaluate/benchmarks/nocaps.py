"""NoCaps: images of unfamiliar objects to describe, with captions in COCO's format.

`nocaps_val_4500_captions.json` has the "domain" of an image, the question's kind: in-domain, near-domain or out-domain.
(The download page, which has the format, does not show the domain; code that reads the file does: unverified.)
Test: `nocaps_test_image_info.json`, without annotations.

CIDEr of a domain is that of a set of its own, whose captions alone give the document frequencies (unverified: the
server's program is not public).
"""

from __future__ import annotations

from collections.abc import Sequence

from emu_jax.evaluate.benchmarks.benchmark import Benchmark, Scoring
from emu_jax.evaluate.formats.captions import captioned, results, texts
from emu_jax.evaluate.formats.files import Entry, Files, unique
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics import captions
from emu_jax.evaluate.prompts import caption
from emu_jax.evaluate.question import Question

DOMAINS = ("in-domain", "near-domain", "out-domain")


def _read(files: Files, split: str) -> list[Question]:
    if split == "test":
        document = files.document("nocaps_test_image_info.json", "annotations/nocaps_test_image_info.json")
        images = unique(document.entries("images"), lambda entry: entry.whole("id"), "id")
        found: list[tuple[Entry, list[Entry]]] = [(image, []) for image in images.values()]
    else:
        names = "nocaps_val_4500_captions.json", "annotations/nocaps_val_4500_captions.json"
        found = captioned(files.document(*names))
    questions = []
    for image, references in found:
        name = image.text("file_name")
        domain = image.text("domain") if "domain" in image else ""
        if domain and domain not in DOMAINS:
            raise image.wrong("domain", f"one of {', '.join(DOMAINS)}")
        questions.append(
            Question(
                id=str(image.whole("id")),
                images=(files.shown(f"{split}/{name}", f"images/{name}", f"images/{split}/{name}"),),
                answers=texts(references),
                kind=domain,
            )
        )
    return questions


def metrics(predictions: Sequence[str], questions: Sequence[Question], scoring: Scoring) -> dict[str, Figure]:
    """Scores of all captions, and CIDEr of each domain where the file has several."""
    found = captions.figures(predictions, questions, scoring.missing)
    domains = [domain for domain in DOMAINS if any(question.kind == domain for question in questions)]
    for domain in domains if len(domains) > 1 else ():
        chosen = [place for place, question in enumerate(questions) if question.kind == domain]
        found[f"CIDEr ({domain})"] = captions.cider(
            [predictions[place] for place in chosen], [questions[place] for place in chosen]
        )
    return found


BENCHMARK = Benchmark(
    name="nocaps",
    splits=("val", "test"),
    split="val",
    tree=(
        "nocaps_val_4500_captions.json (split test: nocaps_test_image_info.json), here or in annotations/",
        "val/0013ea2087020901.jpg … (split test: test/…), or in images/val/ or images/",
    ),
    described="nocaps.org, page Download",
    reader=_read,
    prompt=caption,
    metrics=metrics,
    submission=results,
)
