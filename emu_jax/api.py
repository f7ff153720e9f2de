"""The one public face: load a model, then caption, continue, embed and score.

emu = Emu.load("runs/quickstart")
emu.generate_text([[PIL.Image.open("dog.png")]])[0].text
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from emu_jax.data.tokenizer import IMG, Tokenizer
from emu_jax.errors import UserError
from emu_jax.generate import image, text
from emu_jax.generate.prompt import Prompt, PromptBatch, encode_prompts
from emu_jax.models import emu

INSTRUCT_EXTRA = 2  # [USER] and [ASSISTANT]


@dataclasses.dataclass(frozen=True)
class GeneratedText:
    """A continuation: its text, its token ids (without <s> and </s>), and score = sum of log p / length ** penalty."""

    text: str
    token_ids: list[int]
    score: float


class Emu:
    """A model ready to generate. `config`, `params`, `statistics` and `tokenizer` are open to research code."""

    def __init__(self, config: emu.EmuConfig, params: emu.Params, statistics: emu.Statistics, tokenizer: Tokenizer):
        if config.llama.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the weights have {config.llama.vocab_size}; "
                "load the tokenizer that belongs to these weights"
            )
        self.config, self.statistics, self.tokenizer = config, statistics, tokenizer
        self.params = jax.tree.map(jnp.asarray, params)
        self._encode = jax.jit(lambda params, x: emu.encode_images(params, statistics, x, config=config))
        self._embed = jax.jit(_embed_prompts)

    @classmethod
    def load(cls, path: Path | str, *, tokenizer: Path | str | None = None, vision_head_dim: int | None = None) -> Emu:
        """Loads a training work directory, one of its checkpoints, or published weights.

        Args:
          path: a work directory or checkpoint; or published files: a folder with multimodal_encoder/pytorch_model.bin,
            or a .pt, .bin or .safetensors file (LoRA is merged).
          tokenizer: SentencePiece .model; needed by published files alone.
          vision_head_dim: of published files, where it differs from the published model's 88.

        Raises:
          UserError: nothing to load there, or the parts do not fit each other.
        """
        path = Path(path)
        if not path.exists():
            raise UserError(
                f"{path}: no such file or folder; expected a work directory, a checkpoint or published weights"
            )
        if (path / "checkpoints").is_dir() or (path / "meta").is_dir():
            from emu_jax.train.checkpoint import load_for_inference

            config, params, statistics, own = load_for_inference(path)
            if tokenizer is not None:
                own = Tokenizer.load(tokenizer)
            return cls(emu.EmuConfig.from_dict(config.model), params, statistics, own)

        from emu_jax.convert.emu import VISION_HEAD_DIM, find_weights, load

        find_weights(path)
        if tokenizer is None:
            raise UserError(f"{path}: published weights need tokenizer=…, the path of LLaMA's SentencePiece .model")
        fields, params, _ = load(path, vision_head_dim=vision_head_dim or VISION_HEAD_DIM)
        config = emu.EmuConfig.from_dict(fields)
        base = Tokenizer.load(tokenizer)
        instruct = config.llama.vocab_size == base.vocab_size + INSTRUCT_EXTRA
        return cls(config, params, emu.initial_statistics(config), Tokenizer.load(tokenizer, instruct=instruct))

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """Pictures [N, H, W, 3] (float32 already normalised, or uint8), of the model's size -> float32 [N, Q, D]."""
        size = self.config.vision.image_size
        pixels = np.asarray(pixels)
        if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
            raise UserError(f"encode_images: expected [N, {size}, {size}, 3], got {list(pixels.shape)}")
        return np.asarray(self._encode(self.params, pixels))

    def generate_text(
        self,
        prompts: Sequence[Prompt],
        *,
        num_beams: int = 1,
        max_new_tokens: int = 20,
        min_length: int = 1,
        length_penalty: float = 1.0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[GeneratedText]:
        """Continues prompts that mix text and pictures, until </s> or max_new_tokens.

        Args:
          num_beams: beam search with so many beams; 1 decodes greedily, or samples when temperature is above 0.
          min_length, length_penalty: lengths count a placeholder <s>, as the reference's do.
        """
        _check_decoding(num_beams, max_new_tokens, temperature, top_p)
        inputs, valid = self._inputs(prompts, new_tokens=max_new_tokens)
        decoding = text.Decoding(min_length, length_penalty, temperature, top_k, top_p)
        static = {"config": self.config, "eos": self.tokenizer.eos_id, "max_new_tokens": max_new_tokens}
        if num_beams > 1:
            tokens, scores = text.beam_search(self.params, inputs, valid, decoding, beams=num_beams, **static)
        else:
            tokens, scores = text.generate(self.params, inputs, valid, jax.random.key(seed), decoding, **static)
        results = []
        for row, score in zip(np.asarray(tokens), np.asarray(scores), strict=True):
            ids = row.tolist()
            ids = ids[: ids.index(self.tokenizer.eos_id)] if self.tokenizer.eos_id in ids else ids
            results.append(GeneratedText(self.tokenizer.decode(ids), ids, float(score)))
        return results

    def generate_embeddings(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """The next picture's visual embeddings after each prompt: float32 [B, Q, D], generated one after the other."""
        inputs, valid = self._inputs(prompts, new_tokens=self.config.causal.queries, suffix=IMG)
        return np.asarray(image.generate_embeddings(self.params, inputs, valid, config=self.config))

    def score_candidates(self, prompt: Prompt, candidates: Sequence[str]) -> np.ndarray:
        """Summed negative log-likelihood of every candidate as the continuation of one prompt: float32 [M]."""
        if not candidates:
            raise UserError("score_candidates: no candidates; expected a list of texts")
        ids = [self.tokenizer.encode(candidate, add_bos=False) for candidate in candidates]
        longest = max(map(len, ids))
        padded = np.full((len(ids), longest), -1, np.int32)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = tokens
        inputs, valid = self._inputs([prompt], new_tokens=longest)
        return np.asarray(text.score_candidates(self.params, inputs, valid, padded, config=self.config))

    def _inputs(self, prompts: Sequence[Prompt], *, new_tokens: int, suffix: str = "") -> tuple[jax.Array, jax.Array]:
        """Embedded prompts [B, T, D] and their validity [B, T]."""
        batch = encode_prompts(
            prompts,
            self.tokenizer,
            queries=self.config.causal.queries,
            image_size=self.config.vision.image_size,
            context=self.config.llama.context,
            new_tokens=new_tokens,
            suffix=suffix,
        )
        return self._embed_batch(batch), jnp.asarray(batch.valid)

    def _embed_batch(self, batch: PromptBatch) -> jax.Array:
        words = self.params["llama"]["embed"]["embedding"]
        if not len(batch.pictures):
            return self._embed(words, batch.tokens, jnp.zeros((1, words.shape[1])), batch.sources)
        embeddings = self.encode_images(batch.pictures)  # [N, Q, D]
        return self._embed(words, batch.tokens, embeddings.reshape(-1, words.shape[1]), batch.sources)


def _embed_prompts(words: jax.Array, tokens: jax.Array, visual: jax.Array, sources: jax.Array) -> jax.Array:
    """words [V, D], tokens [B, T], visual [N*Q, D], sources [B, T] (-1: a word) -> [B, T, D] float32."""
    pictures = visual[jnp.maximum(sources, 0)]
    return jnp.where(sources[..., None] >= 0, pictures, words[tokens].astype(jnp.float32))


def _check_decoding(num_beams: int, max_new_tokens: int, temperature: float, top_p: float) -> None:
    if num_beams < 1 or max_new_tokens < 1:
        raise UserError(f"num_beams={num_beams}, max_new_tokens={max_new_tokens}; expected at least 1 of each")
    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"temperature={temperature}, top_p={top_p}; expected temperature >= 0 and 0 < top_p <= 1")
    if num_beams > 1 and temperature > 0:
        raise UserError(f"num_beams={num_beams} and temperature={temperature}; beams do not sample, choose one of them")
