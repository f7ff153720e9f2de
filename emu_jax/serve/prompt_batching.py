"""Encoded prompts -> arrays of a few fixed shapes, so that all programs are compiled before the first request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from emu_jax.generate.embeddings import generate_embeddings
from emu_jax.generate.model import Emu
from emu_jax.generate.prompt import embed_prompts
from emu_jax.serve.encoded_prompt import EncodedPrompt

MIN_LENGTH = 32  # positions; prompts are padded to 32, 64, … up to the context
IMAGE_BATCH_SIZES = (1, 4, 16)  # images encoded by one call


def length_buckets(context: int) -> list[int]:
    """Lengths that prompts are padded to: 32, 64, … and the context."""
    buckets, length = [], MIN_LENGTH
    while length < context:
        buckets.append(length)
        length *= 2
    return [*buckets, context]


def smallest_bucket(count: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `count`, otherwise the largest one."""
    return next((bucket for bucket in buckets if bucket >= count), buckets[-1])


class PromptBatcher:
    """Stacks and embeds prompts for one model."""

    def __init__(self, model: Emu):
        self.model = model
        self.lengths = length_buckets(model.config.llama.context)

    def encode_images(self, prompts: Sequence[EncodedPrompt]) -> list[Float[np.ndarray, "N Q D"]]:
        """The embeddings of each prompt's images, encoded together."""
        images = np.concatenate([prompt.images for prompt in prompts])
        encoded: list[np.ndarray] = []
        while len(images):
            size = smallest_bucket(len(images), IMAGE_BATCH_SIZES)
            batch = images[:size]
            padded = np.zeros((size, *batch.shape[1:]), np.uint8)
            padded[: len(batch)] = batch
            encoded += list(self.model.encode_images(padded)[: len(batch)])
            images = images[size:]
        queries, width = self.model.config.causal.queries, self.model.config.llama.width
        stacked = np.stack(encoded) if encoded else np.zeros((0, queries, width), np.float32)
        ends = np.cumsum([len(prompt.images) for prompt in prompts])
        return np.split(stacked, ends[:-1])

    def stack(
        self, prompts: Sequence[EncodedPrompt], rows: int, *, left_padded: bool
    ) -> tuple[Int[np.ndarray, "R T"], Float[np.ndarray, "R T D"], Bool[np.ndarray, "R T"], Bool[np.ndarray, "R T"]]:
        """Pads prompts to R `rows` of one length: tokens, visual embeddings, is_visual and valid."""
        length = smallest_bucket(max(len(prompt.tokens) for prompt in prompts), self.lengths)
        width = self.model.config.llama.width
        tokens = np.full((rows, length), self.model.tokenizer.pad_id, np.int32)
        visual = np.zeros((rows, length, width), np.float32)
        is_visual, valid = np.zeros((rows, length), bool), np.zeros((rows, length), bool)
        for row, (prompt, images) in enumerate(zip(prompts, self.encode_images(prompts), strict=True)):
            count = len(prompt.tokens)
            positions = slice(length - count, length) if left_padded else slice(0, count)
            shown = prompt.embedding_index >= 0
            tokens[row, positions], valid[row, positions], is_visual[row, positions] = prompt.tokens, True, shown
            visual[row, positions][shown] = images.reshape(-1, width)[prompt.embedding_index[shown]]
        valid[len(prompts) :, -1] = True  # rows of nothing but padding would have nothing to attend to
        return tokens, visual, is_visual, valid

    def warm_up(self, rows: int) -> Iterator[None]:
        """Compiles `generate_embeddings` for all lengths, one before each yield."""
        size, queries = self.model.config.vision.image_size, self.model.config.causal.queries
        nothing = np.zeros((0, size, size, 3), np.uint8)
        for length in self.lengths:
            count = min(length, self.lengths[-1] - queries)
            tokens = np.full(count, self.model.tokenizer.img_id, np.int32)
            self.generate_embeddings([EncodedPrompt(tokens, np.full(count, -1, np.int32), nothing)], [0], rows)
            yield

    def generate_embeddings(
        self, prompts: Sequence[EncodedPrompt], seeds: Sequence[int], rows: int
    ) -> Float[np.ndarray, "N Q D"]:
        """The next image's embeddings, for prompts that end in [IMG] and their seeds."""
        tokens, visual, is_visual, valid = self.stack(prompts, rows, left_padded=True)
        params = self.model.params
        with self.model.scope():
            inputs = embed_prompts(params["llama"]["embed"]["embedding"], tokens, visual, is_visual)
            filled = np.zeros(rows, np.uint32)
            filled[: len(seeds)] = seeds
            generated = generate_embeddings(params, inputs, valid, filled, config=self.model.config)
        return np.asarray(generated)[: len(prompts)]
