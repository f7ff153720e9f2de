"""VIST, story continuation: the last sentence of a story, after four photos with a sentence each.

The story comes in the order of GILL's evaluation (kohjingyu/gill, evals/generate_vist_images.py), each sentence before
its photo; the last photo is not shown. `vist_drawing` asks for that photo. The prompts are ours [I].
"""

from __future__ import annotations

from collections.abc import Sequence

from emu_jax.data.system_messages import IMAGE_SYSTEM
from emu_jax.data.tokenizer import ASSISTANT, USER
from emu_jax.evaluate.benchmarks.benchmark import Benchmark
from emu_jax.evaluate.formats.files import Files
from emu_jax.evaluate.formats.vist import DESCRIBED, TREE, photo, read_stories
from emu_jax.evaluate.metrics import captions
from emu_jax.evaluate.prompts import CAPTION, Calls, Example, ModelCall, Part, caption_of, join
from emu_jax.evaluate.question import Question

ASKS = " please continue the story with one sentence."


def _read(files: Files, split: str) -> list[Question]:
    return [
        Question(
            id=story.id,
            images=tuple(photo(files, id) for id in story.photos[:-1]),
            text="\n".join(story.sentences[:-1]),
            answers=(story.sentences[-1],),
        )
        for story in read_stories(files, split)
    ]


def prompt(question: Question, images: Sequence[Part], examples: Sequence[Example], chat: bool) -> Calls:
    """A sentence. A question's text has the earlier ones, one a line."""
    sentences = question.text.split("\n")
    story = join(*(part for pair in zip(sentences, images, strict=True) for part in pair))
    parts = join(IMAGE_SYSTEM, f" {USER}: ", story, f"{ASKS} {ASSISTANT}:") if chat else story
    return caption_of((yield ModelCall(parts, CAPTION)))


BENCHMARK = Benchmark(
    name="vist",
    splits=("test", "val"),
    split="test",
    tree=TREE,
    described=DESCRIBED,
    reader=_read,
    prompt=prompt,
    metrics=lambda predictions, questions, scoring: captions.figures(predictions, questions),
)
