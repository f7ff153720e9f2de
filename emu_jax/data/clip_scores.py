"""CLIP similarity of images and texts: pixels uint8 [H, W, 3] and texts -> unit vectors -> cosines in [-1, 1].

Images of web documents are kept or left out by these scores. The user provides the weights: a folder in the layout of
Hugging Face, with config.json, model.safetensors, the tokenizer's files and preprocessor_config.json.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from emu_jax.errors import UserError
from emu_jax.storage import check_local, failed_file

BATCH = 32  # images or texts per forward pass


class ClipScorer:
    """A CLIP model on the CPU.

    Args:
      folder: folder of the weights; pickles are not read.

    Raises:
      UserError: the weights or their libraries are missing.
    """

    def __init__(self, folder: str):
        if not (check_local(folder, "the folder of CLIP's weights") / "config.json").is_file():
            raise UserError(f"clip={folder!r}: no config.json there; expected a folder of CLIP weights (Hugging Face)")
        try:
            import torch
            from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
        except ImportError as error:
            raise UserError("CLIP scores need torch and transformers 5; run `pip install 'emu-jax[clip]'`") from error
        try:
            loaded: Any = CLIPModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            model, loading = loaded
            self._processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            line = next(iter(str(error).splitlines()), type(error).__name__)
            why = next((f"{file}: {why}" for file in _files(folder) if (why := failed_file(file))), "")
            raise UserError(why or f"clip={folder!r}: cannot be loaded ({line}); expected CLIP weights") from error
        if loading["missing_keys"]:  # they would be initialised at random
            raise UserError(
                f"clip={folder!r}: {len(loading['missing_keys'])} weights are missing, {min(loading['missing_keys'])} "
                "the first; expected the weights of a complete CLIP, both text and vision"
            )
        self._torch, self._model = torch, model.eval()
        self._max_tokens = model.config.text_config.max_position_embeddings

    def embed_images(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Pixels -> float32 unit vectors [P, D]; `BATCH` images are in memory at a time."""
        model, vectors = self._model, []
        for batch in _batched(images):
            pixels = self._processor(images=batch, return_tensors="pt")["pixel_values"]
            with self._torch.inference_mode():
                pooled = model.vision_model(pixel_values=pixels).pooler_output
                vectors.append(model.visual_projection(pooled).numpy())
        return self._unit(vectors)

    def embed_texts(self, texts: Iterable[str]) -> np.ndarray:
        """Texts, truncated to the model's context -> float32 unit vectors [T, D]."""
        model, vectors = self._model, []
        for batch in _batched(texts):
            tokens = self._tokenizer(
                batch, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
            )
            with self._torch.inference_mode():
                pooled = model.text_model(tokens["input_ids"], tokens["attention_mask"]).pooler_output
                vectors.append(model.text_projection(pooled).numpy())
        return self._unit(vectors)

    def _unit(self, vectors: list[np.ndarray]) -> np.ndarray:
        rows = np.concatenate(vectors) if vectors else np.zeros((0, self._model.config.projection_dim), np.float32)
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _files(folder: str) -> list[pathlib.Path]:
    """The files of a CLIP that transformers opens; vocabularies are texts, and may be short."""
    return sorted(file for file in pathlib.Path(folder).iterdir() if file.suffix in (".safetensors", ".json"))


def _batched(items: Iterable) -> Iterable[list]:
    items = iter(items)
    while batch := list(itertools.islice(items, BATCH)):
        yield batch


@functools.lru_cache(maxsize=1)
def load_scorer(folder: str) -> ClipScorer:
    """The scorer of a folder, loaded once per process."""
    return ClipScorer(folder)


def match(similarity: np.ndarray) -> np.ndarray:
    """Assigns a text to each image, as MMC4 was made: cosines [P, T] -> int [P].

    The assignment has the largest sum of cosines in which no text has two images. With more images than texts, each
    remaining image gets its most similar text.
    """
    from scipy.optimize import linear_sum_assignment

    texts = similarity.argmax(axis=1)
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    texts[rows] = columns
    return texts
