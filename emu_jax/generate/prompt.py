"""Prompts: lists that mix text and images -> left-padded token ids and stacked images -> embeddings.

An image is a PIL image, a uint8 array [H, W, 3], a path (`storage.Path`), or an already
normalised float array [S, S, 3].
A str is text, in which the name of a special token ("[USER]") becomes that token; in a `PlainText` it stays text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL.Image import Image as PILImage

from emu_jax.data.images import load_image, resize
from emu_jax.data.tokenizer import IMAGE, IMG, IMG_END, Tokenizer
from emu_jax.errors import UserError
from emu_jax.storage import Path

ImageLike = PILImage | np.ndarray | Path
Prompt = Sequence[str | ImageLike]

LENGTH_BUCKET = 32  # prompts are padded to a multiple of this many tokens, so that few shapes are compiled
UNBOUNDED = 1 << 30  # more tokens or images than any context holds


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """B prompts, left-padded to T positions, with their N images in reading order.

    Attributes:
      tokens: int32 ids; <image> at visual positions.
      valid: False at padding.
      images: uint8, or already normalised float32.
      embedding_index: int32; at every <image>, its row among the images' embeddings [N*Q, D]; -1 elsewhere.
    """

    tokens: Int[np.ndarray, "B T"]
    valid: Bool[np.ndarray, "B T"]
    images: Float[np.ndarray, "N S S 3"] | UInt8[np.ndarray, "N S S 3"]
    embedding_index: Int[np.ndarray, "B T"]


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    *,
    queries: int,
    image_size: int,
    context: int,
    new_tokens: int,
    suffix: str = "",
) -> PromptBatch:
    """Tokenises each prompt as a whole (the reference's white-space rule looks at neighbours) and left-pads them.

    >>> tokenizer = Tokenizer.train(["a red cat", "a blue cat"], vocab_size=7, model_type="word")
    >>> image = np.zeros((20, 30, 3), np.uint8)
    >>> batch = encode_prompts([[image, "a cat"]], tokenizer, queries=2, image_size=16, context=64, new_tokens=8)
    >>> batch.tokens[0, -7:].tolist()  # <s> [IMG] <image> <image> [/IMG] a cat
    [1, 8, 10, 10, 9, 3, 4]
    >>> batch.embedding_index[0, -7:].tolist(), batch.images.shape
    ([-1, -1, 0, 1, -1, -1, -1], (1, 16, 16, 3))

    Args:
      context: maximum length of a prompt and its `new_tokens` together.
      suffix: text appended to every prompt, such as "[IMG]" to ask for an image.

    Raises:
      UserError: an empty prompt, one longer than the context, or an unreadable image.
    """
    if not prompts:
        raise UserError("no prompts: expected a list of prompts, each a list of texts and images")
    rows, images = [], []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str | PILImage | np.ndarray | Path):
            raise UserError(
                f"prompt {number}: expected a list of texts and images, got one {type(prompt).__name__}; wrap it in []"
            )
        shown = [read_image(part, image_size, f"prompt {number}") for part in prompt if not isinstance(part, str)]
        texts = spell(prompt, queries)
        if not any(texts) and not suffix:
            raise UserError(f"prompt {number} is empty; give it a text or an image")
        ids = tokenizer.encode_parts([*texts, suffix])
        if ids.count(tokenizer.image_id) != len(shown) * queries:
            raise UserError(f"prompt {number}: a text spells {IMAGE}; pass images as list items instead")
        if len(ids) + new_tokens > context:
            raise UserError(
                f"prompt {number}: {len(ids)} tokens and {new_tokens} new ones exceed the model's context of "
                f"{context}; shorten the prompt or ask for fewer tokens"
            )
        rows.append(ids)
        images += shown
    length = -(-max(map(len, rows)) // LENGTH_BUCKET) * LENGTH_BUCKET
    tokens = np.full((len(rows), length), tokenizer.pad_id, np.int32)
    valid = np.zeros((len(rows), length), bool)
    for row, ids in enumerate(rows):
        tokens[row, length - len(ids) :] = ids
        valid[row, length - len(ids) :] = True
    return PromptBatch(tokens, valid, _stack(images, image_size), embedding_index(tokens == tokenizer.image_id))


def spell(prompt: Prompt, queries: int) -> list[str]:
    """A prompt's texts, with the names of the special tokens that stand for an image in each image's place."""
    placeholder = IMG + IMAGE * queries + IMG_END
    return [part if isinstance(part, str) else placeholder for part in prompt]


def embedding_index(is_visual: Bool[np.ndarray, " ..."]) -> Int[np.ndarray, " ..."]:
    """Numbers visual positions in reading order, as int32: the row of each one's embedding; -1 elsewhere.

    >>> embedding_index(np.array([[False, True, True], [True, False, True]])).tolist()
    [[-1, 0, 1], [2, -1, 3]]
    """
    return np.where(is_visual, np.cumsum(is_visual.reshape(-1)).reshape(is_visual.shape) - 1, -1).astype(np.int32)


@jax.jit
def embed_prompts(
    words: Float[Array, "V D"],
    tokens: Int[Array, "B T"],
    visual: Float[Array, "B T D"],
    is_visual: Bool[Array, "B T"],
) -> Float[Array, "B T D"]:
    """Inputs of the language model in float32: `visual` where `is_visual`, otherwise the tokens' embeddings.

    Args:
      words: the model's token embeddings.
    """
    return jnp.where(is_visual[..., None], visual, words[tokens].astype(jnp.float32))


def read_image(image: ImageLike, size: int, where: str, reading: str = "upright") -> np.ndarray:
    """One image of a prompt -> uint8 [size, size, 3], or float32 [size, size, 3] where it is already normalised.

    Args:
      reading: one of `data.images.READINGS`.
    """
    if isinstance(image, np.ndarray) and np.issubdtype(image.dtype, np.floating):
        if image.shape != (size, size, 3):
            raise UserError(
                f"{where}: a normalised image must be [{size}, {size}, 3] for this model, got {list(image.shape)}"
            )
        return image.astype(np.float32)
    if not isinstance(image, PILImage | np.ndarray | Path):
        raise UserError(
            f"{where}: expected a text, a PIL image, an array or a pathlib.Path, got {type(image).__name__}"
        )
    return resize(load_image(image, reading), size)


def _stack(images: list[np.ndarray], size: int) -> np.ndarray:
    if not images:
        return np.zeros((0, size, size, 3), np.uint8)
    if len({image.dtype for image in images}) > 1:
        raise UserError("prompts mix uint8 images with float (already normalised) ones; use one kind")
    return np.stack(images)
