"""VIST, the last photo of a story, drawn from the five sentences and the four photos before it.

It is scored as in GILL's evaluation (kohjingyu/gill, evals/generate_vist_images.py, compute_clip_similarity_vist.py):
each sentence comes before its photo, the last sentence ends the prompt, and the figure is the mean cosine of CLIP's
embeddings of the drawn and the real photo; GILL's numbers are of CLIP ViT-L/14 and the split val. Splits ending in
"-captions" show the sentences without the photos. There, sentences are separated by spaces [I].

That program stores drawings by the name of the real photo, so that of several stories with one last photo only the last
drawing is scored, several times. Here every story's own drawing is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emu_jax.data.clip_scores import load_scorer
from emu_jax.data.images import load_image
from emu_jax.errors import UserError
from emu_jax.evaluate.benchmarks.benchmark import Benchmark, Scoring
from emu_jax.evaluate.formats.files import Files
from emu_jax.evaluate.formats.vist import DESCRIBED, TREE, photo, read_stories
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics import drawings
from emu_jax.evaluate.prompts import Calls, Example, ModelCall, Part, join
from emu_jax.evaluate.question import Question

CAPTIONS = "-captions"  # ends the names of splits without photos


def _read(files: Files, split: str) -> list[Question]:
    questions = []
    for story in read_stories(files, split.removesuffix(CAPTIONS)):
        *shown, _ = (photo(files, id) for id in story.photos)  # the last one is compared with
        questions.append(
            Question(
                id=f"{story.id}/{story.photos[-1]}",
                images=() if split.endswith(CAPTIONS) else tuple(shown),
                text="\n".join(story.sentences),
            )
        )
    return questions


def prompt(question: Question, images: Sequence[Part], examples: Sequence[Example], chat: bool) -> Calls:
    """The story so far -> the file name of an image. A question's text has the sentences, one a line."""
    *before, last = question.text.split("\n")
    if images:
        parts = join(*(part for pair in zip(before, images, strict=True) for part in pair), last)
    else:
        parts = (" ".join([*before, last]),)
    return (yield ModelCall(parts, draws=True))


def metrics(predictions: Sequence[str], questions: Sequence[Question], scoring: Scoring) -> dict[str, Figure]:
    """The similarity with the real photos; its interval draws whole photos, which several stories may share.

    Raises:
      UserError: the model has a safety checker, there is no CLIP, or it cannot be used.
    """
    drawings.check_unfiltered(scoring.emu, scoring.drawn)
    if (clip := scoring.weights.clip) is None:
        raise UserError("vist_drawing: drawings are compared with photos by CLIP; give the folder of one (--clip)")
    files = BENCHMARK.files(scoring.root)
    ids = [question.id.partition("/")[2] for question in questions]
    real = [photo(files, id) for id in ids]
    files.check_shown()
    similarity = drawings.clip_similarity(
        load_scorer(str(clip)),
        (load_image(scoring.drawn / name) for name in predictions),
        (load_image(path) for path in real),
        np.unique(ids, return_inverse=True)[1],
    )
    return {f"CLIP similarity, {drawings.clip_name(clip)}": similarity}


BENCHMARK = Benchmark(
    name="vist_drawing",
    splits=("val", f"val{CAPTIONS}", "test", f"test{CAPTIONS}"),
    split="val",
    tree=TREE,
    described=DESCRIBED,
    reader=_read,
    prompt=prompt,
    predicts="image",
    metrics=metrics,
)
