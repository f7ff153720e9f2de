"""Scores of a model on the embedded images: image -> caption, and caption -> visual embeddings.

Both directions are fully generative: captions are decoded greedily, and each of the Q embeddings is generated from the
model's own previous outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from emu_jax.data.embedded_chats import has_one_tone
from emu_jax.data.fluent_emoji import SPLITS, Example, examples
from emu_jax.data.padding import pad_to
from emu_jax.errors import UserError
from emu_jax.evaluate.intervals import Figure, bootstrap, share
from emu_jax.evaluate.quickstart.fixed_space import FixedSpace, Reader
from emu_jax.generate.model import Emu, GeneratedText

BATCH = 32  # prompts generated at a time
TRAIN_SAMPLE = 160  # training images scored beside the held-out ones, to tell memorising from generalising
CAPTION_TOKENS = 32  # longer than any caption

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Answer:
    """The model's outputs for one image and for its caption."""

    split: str
    example: Example
    caption: str  # generated from the image
    rank: int  # of the right image by distance to the embeddings generated from its caption; 0 is the best
    nearest: Example  # the image closest to those embeddings


@dataclasses.dataclass(frozen=True)
class Scores:
    """`figures` by name ("split: figure"), the answers behind them, and the number of images retrieval chooses from."""

    figures: dict[str, Figure]
    answers: list[Answer]
    gallery: int


def score(emu: Emu, splits: Sequence[str] = SPLITS, space: FixedSpace | None = None) -> Scores:
    """Scores splits of the embedded data set: all of a held-out split, a sample of the training images.

    Retrieval searches the images of all splits, whichever are scored.

    Args:
      space: if given, retrieval and R2 are measured in this space as well.

    Raises:
      UserError: a split is unknown.
    """
    for split in splits:
        if split not in SPLITS:
            raise UserError(f"split {split!r}: no such split; choose among {', '.join(SPLITS)}")
    pools = {split: examples(split, emu.config.vision.image_size) for split in SPLITS}
    gallery = [example for pool in pools.values() for example in pool]
    rows = {example.key: row for row, example in enumerate(gallery)}

    def write(part_of: Callable[[Example], Any], pool: Sequence[Example], about: str) -> list[GeneratedText]:
        """The texts that follow one part of every example."""
        return in_batches(
            lambda some: emu.generate_text([[part_of(e)] for e in some], max_new_tokens=CAPTION_TOKENS), pool, about
        )

    embeddings = _encode(emu, gallery)  # [G, Q, D]
    sample = np.random.default_rng(0).permutation(len(pools["train"]))[:TRAIN_SAMPLE]

    def embed(pool: Sequence[Example], about: str) -> np.ndarray:
        return np.stack(in_batches(lambda part: emu.generate_embeddings([[e.caption] for e in part]), pool, about))

    if space is not None:
        generated = embed([gallery[row] for row in sample], "training captions: embeddings")
        read = _reading(emu, embeddings, gallery, space, len(pools["train"]), generated, sample)
    figures: dict[str, Figure] = {}
    answers: list[Answer] = []
    for split in dict.fromkeys(splits):
        pool = pools[split]
        if split == "train":
            pool = [pool[row] for row in sample]
        written = write(lambda e: e.pixels, pool, f"{split}: captions")
        captions = [one.text.strip() for one in written]
        generated = embed(pool, f"{split}: embeddings")  # [n, Q, D]
        truth = np.array([rows[e.key] for e in pool])
        distance = squared_distances(generated, embeddings)  # [n, G]
        ranks = (distance < distance[np.arange(len(pool)), truth][:, None]).sum(1)
        answers += [
            Answer(split, e, caption, int(rank), gallery[row.argmin()])
            for e, caption, rank, row in zip(pool, captions, ranks, distance, strict=True)
        ]
        if emu.config.learn_image_token:
            named = write(lambda e: e.caption, pool, f"{split}: names")
            # Chance is unknown: an untrained model begins no image.
            for before, ended in (("a name", named), ("an image's caption", written)):
                figures[f"{split}: an image begins by itself after {before}"] = share(
                    [one.ended_by == "image" for one in ended]
                )
        figures |= _caption_figures(split, pool, captions, pools["train"])
        figures |= _retrieval_figures(split, ranks, len(gallery))
        figures[f"{split}: embeddings from text, autoregressive R2"] = _r2(generated, embeddings[truth])
        if space is not None:
            figures |= read(split, generated, truth)
    return Scores(figures, answers, len(gallery))


def _encode(emu: Emu, gallery: Sequence[Example]) -> np.ndarray:
    """A model's embeddings of images: [G, Q, D]."""
    encoded = in_batches(lambda part: emu.encode_images(np.stack([e.pixels for e in part])), gallery, "encode images")
    return np.stack(encoded)


def _reading(
    emu: Emu,
    embeddings: np.ndarray,
    gallery: Sequence[Example],
    space: FixedSpace,
    known: int,
    generated: np.ndarray,
    sample: np.ndarray,
) -> Callable[[str, np.ndarray, np.ndarray], dict[str, Figure]]:
    """Figures in a fixed space, from a split, embeddings generated for it [n, Q, D] and its rows of the gallery [n].

    Args:
      embeddings: the model's, of the gallery.
      known: the number of training images, with which the gallery begins.
      generated, sample: embeddings generated from the captions of some training images, and these images' rows.
    """
    size = space.emu.config.vision.image_size
    same = size == emu.config.vision.image_size
    shown = gallery if same else [example for split in SPLITS for example in examples(split, size)]
    fixed = _encode(space.emu, shown).reshape(len(gallery), -1)  # [G, K]
    keys = [example.key for example in gallery[:known]]
    reader = Reader.fit(embeddings[:known], fixed[:known], keys, generated, sample)

    def figures(split: str, generated: np.ndarray, truth: np.ndarray) -> dict[str, Figure]:
        found: dict[str, Figure] = {}
        for about, vectors in (
            ("embeddings from text", reader.read_generated(generated)),
            ("embeddings of images", reader.read_encoded(embeddings[truth])),
        ):  # [n, K]
            distance = squared_distances(vectors, fixed)  # [n, G]
            ranks = (distance < distance[np.arange(len(truth)), truth][:, None]).sum(1)
            label = f"{about} in {space.name}'s space"
            found |= _retrieval_figures(split, ranks, len(gallery), label)
            found[f"{split}: {label}, R2"] = _r2(vectors[:, None], fixed[truth][:, None])
        return found

    return figures


def in_batches(run: Callable[[Sequence[Item]], Iterable[Any]], items: Sequence[Item], about: str) -> list:
    """Runs in batches of one size, so that each function compiles once; shows a bar if `about` says what for."""
    results: list = []
    for start in tqdm(range(0, len(items), BATCH), desc=about, leave=False, disable=not about):
        part = items[start : start + BATCH]
        results += list(run(pad_to(part, BATCH)))[: len(part)]
    return results


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances: [n, Q, D] and [G, Q, D] -> [n, G]."""
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    return (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)[None, :]


def _caption_figures(
    split: str, pool: Sequence[Example], captions: Sequence[str], known: Sequence[Example]
) -> dict[str, Figure]:
    """Exact matches of caption, role and tone. Chance is a uniform guess among the known captions, roles or tones."""

    def chance(values: set) -> float:
        return 1 / len(values)

    figures = {
        f"{split}: caption exactly right": share(
            [caption == e.caption for caption, e in zip(captions, pool, strict=True)],
            chance({e.caption for e in known} | {e.caption for e in pool}),
        )
    }
    toned = [(caption, e) for caption, e in zip(captions, pool, strict=True) if has_one_tone(e)]
    if split != "heldout_concepts" and toned:
        roles, tones = ({getattr(e, name) for e in known if has_one_tone(e)} for name in ("role", "tone"))
        parts = [(caption.rpartition(": "), e) for caption, e in toned]
        figures[f"{split}: caption's role right"] = share([p[0] == e.role for p, e in parts], chance(roles))
        figures[f"{split}: caption's skin tone right"] = share([p[2] == e.tone for p, e in parts], chance(tones))
    return figures


def _retrieval_figures(
    split: str, ranks: np.ndarray, gallery: int, about: str = "embeddings from text"
) -> dict[str, Figure]:
    return {f"{split}: {about}, right image in top {k}": share(ranks < k, k / gallery) for k in (1, 5)}


def _r2(generated: np.ndarray, truth: np.ndarray) -> Figure:
    """Share of the variance between the split's images that the generated embeddings explain; both [n, Q, D].

    Chance is 0, the score of the split's mean embeddings.
    """
    error = np.square(generated - truth).sum((1, 2))  # [n]

    def r2(index: np.ndarray) -> float:
        spread = np.square(truth[index] - truth[index].mean(0)).sum()
        return float(1 - error[index].sum() / spread)

    count = len(truth)
    return Figure(r2(np.arange(count)), bootstrap(r2, count), 0.0, count)
