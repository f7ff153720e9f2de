"""Speed against PyTorch (same model, float32, same threads): `python -m tests.benchmarks.benchmark_speed`."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from emu_jax.models.emu import Batch, EmuConfig, SpecialIds


def synthetic_batch(
    config: EmuConfig, ids: SpecialIds, *, rows: int, row_tokens: int, row_images: int, seed: int = 0
) -> Batch:
    """A packed batch like the quick start's, in numpy: every picture captioned once, every second one also drawn."""
    random = np.random.default_rng(seed)
    size, queries = config.vision.image_size, config.causal.queries
    images = random.integers(0, 256, (rows, row_images, size, size, 3), np.uint8)
    tokens = np.full((rows, row_tokens), ids.pad, np.int32)
    fields = {name: np.zeros((rows, row_tokens), np.float32) for name in ("text_weights", "visual_weights")}
    segments, slots = np.zeros_like(tokens), np.full_like(tokens, -1)
    picture = [ids.img, *[ids.image] * queries, ids.img_end]
    for row in range(rows):
        at = 0
        for document in range(row_images + row_images // 2):
            drawn = document >= row_images
            text = random.integers(3, ids.pad, random.integers(4, 8)).tolist()
            body = [1, *text, *picture, 2] if drawn else [1, *picture, *text, 2]
            end = at + len(body)
            if end > row_tokens:
                break
            here = np.asarray(body)
            tokens[row, at:end] = here
            segments[row, at:end] = document + 1
            slots[row, at:end] = np.where(here == ids.image, document % row_images, -1)
            labelled = (here < ids.pad) & (np.arange(len(body)) > 0)
            fields["text_weights"][row, at:end] = labelled * (0.3 if drawn else 1.0)
            fields["visual_weights"][row, at:end] = ((here == ids.image) | (here == ids.img_end)) * float(drawn)
            at = end
    return Batch(images=images, tokens=tokens, segments=segments, slots=slots, **fields)


def torch_batch(batch: Batch) -> list[torch.Tensor]:
    """The six fields as tensors, in `TorchEmu.forward`'s order."""
    tensors = [torch.from_numpy(np.asarray(getattr(batch, field.name))) for field in dataclasses.fields(batch)]
    return [x if x.dtype in (torch.uint8, torch.float32) else x.long() for x in tensors]
