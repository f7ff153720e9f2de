"""The one public face: load a model, then caption, continue, embed, score and draw.

emu = Emu.load("runs/quickstart")
emu.generate_text([[PIL.Image.open("dog.png")]])[0].text
emu.generate_image(["a dog wearing glasses"]).image
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jax.sharding import Mesh
from PIL.Image import Image as PILImage

from emu_jax.checkpoints.load import load_emu
from emu_jax.checkpoints.store import weights_of_parts
from emu_jax.data.images import load_image, resize
from emu_jax.data.tokenizer import IMG, Tokenizer
from emu_jax.errors import UserError
from emu_jax.generate import embeddings as image
from emu_jax.generate import text
from emu_jax.generate.decoder import Decoder
from emu_jax.generate.prompt import ImageLike, Prompt, PromptBatch, encode_prompts
from emu_jax.generate.text import EndedBy, Ends
from emu_jax.models import emu, lora
from emu_jax.models.paths import flatten
from emu_jax.sharding import make_mesh, sharding, tree_shardings

FINGERPRINT_VALUES = 64
TUNED = "chat"  # folder of a tuned model in the work directory of the one it was tuned from
CANDIDATE_BUCKET = 8  # candidates are padded to a multiple of so many tokens, so that few shapes are compiled

if TYPE_CHECKING:
    from emu_jax.generate.chat import Chat


@dataclasses.dataclass(frozen=True)
class GeneratedText:
    """A continuation.

    Attributes:
      token_ids: without <s> and what ended it. score: sum of log p / length ** penalty.
      ended_by: "eos" where the model wrote </s>, "image" where it began an image, "length" where it had no more tokens;
        "closed": an answer whose stream was left.
    """

    text: str
    token_ids: list[int]
    score: float
    ended_by: EndedBy | Literal["closed"]


@dataclasses.dataclass(frozen=True)
class GeneratedImage:
    """A drawn image, the embeddings [Q, D] it was drawn from, and its seed.

    `flagged` is what the safety checker said, and a flagged image is black; None: no checker looked at it.
    """

    image: PILImage
    embeddings: np.ndarray
    seed: int
    flagged: bool | None = None


class Emu:
    """A model ready to generate. `config`, `params`, `statistics` and `tokenizer` are open to research code.

    `decoder` draws; without one everything but images can be generated. On a `mesh` of this process's devices
    parameters are split by the one table of `sharding.py`, and a batch's prompts where their number divides; the
    decoder stays whole.
    """

    def __init__(
        self,
        config: emu.EmuConfig,
        params: emu.Params,
        statistics: emu.Statistics,
        tokenizer: Tokenizer,
        decoder: Decoder | None = None,
        mesh: Mesh | None = None,
    ):
        if config.llama.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the weights have {config.llama.vocab_size}; "
                "load the tokenizer that belongs to these weights"
            )
        if decoder is not None:
            decoder.check_condition(config.causal.queries, config.llama.width)
        self.config, self.statistics, self.tokenizer, self.decoder = config, statistics, tokenizer, decoder
        self.mesh = mesh
        if mesh is None:
            self.params = jax.tree.map(jnp.asarray, params)
        else:
            self.params = jax.device_put(params, tree_shardings(mesh, emu.logical_axes(config), params))
        self._encode = jax.jit(lambda params, x: emu.encode_images(params, statistics, x, config=config))
        self._embed = jax.jit(_embed_prompts)

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        tokenizer: Path | str | None = None,
        vision_head_dim: int | None = None,
        decoder: Path | str | None = None,
        safety_checker: bool = True,
        mesh: Mapping[str, int] | None = None,
        weights: str = "auto",
    ) -> Emu:
        """Loads a training work directory, one of its checkpoints, or published weights.

        Args:
          path: a work directory or checkpoint (adapters that were trained stay beside their kernels; `merged` adds them
            up); or published files, whose LoRA is merged: a folder with multimodal_encoder/pytorch_model.bin, or a .pt,
            .bin or .safetensors file.
          tokenizer: SentencePiece .model; needed only for weights without a stored tokenizer, such as published files.
          vision_head_dim: published files: head width of the vision encoder, if it differs from the published 88.
          decoder: folder with the visual decoder's `unet` and `vae`; by default `path`, if it has them.
          safety_checker: whether to check drawn images, if the decoder's folder has a `safety_checker`.
          mesh: axes of a mesh of this process's devices, e.g. {"data": 4, "tensor": 2}; checkpoints are restored split.
          weights: "raw" for the last step's parameters, "ema" for their exponential moving average, "auto" for the EMA
            if the run keeps one. The decoder's parameters are raw with "raw", and "auto" otherwise.

        Raises:
          UserError: there is nothing to load, or the parts do not fit together.
        """
        path = Path(path)
        if decoder is None and Decoder.exists(path):
            decoder = path
        draws = None
        if decoder is not None:
            draws = Decoder.load(Path(decoder), safety_checker=safety_checker, weights=weights_of_parts(weights))
        place = None if mesh is None else make_mesh(mesh, jax.local_devices())
        loaded = load_emu(
            path,
            tokenizer=tokenizer,
            require_tokenizer=True,
            mesh=place,
            weights=weights,
            vision_head_dim=vision_head_dim,
        )
        assert loaded.tokenizer is not None  # it is required
        return cls(loaded.config, loaded.params, loaded.statistics, loaded.tokenizer, draws, place)

    @property
    def ends(self) -> Ends:
        """Token ids with which this model ends a text: </s>, and [IMG] where it has learnt to begin images."""
        return (self.tokenizer.eos_id, self.tokenizer.img_id)[: 1 + self.config.learn_image_token]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells models apart: SHA-256 over the config, the tokenizer and the first values of every parameter."""
        digest = hashlib.sha256(json.dumps([self.config.to_dict(), self.tokenizer.fingerprint]).encode())
        for name, leaf in sorted(flatten(self.params).items()):
            first = leaf[(0,) * (leaf.ndim - 1)][:FINGERPRINT_VALUES] if leaf.ndim else leaf
            digest.update(name.encode() + np.asarray(first).tobytes())
        return digest.hexdigest()

    def merged(self) -> Emu:
        """This model with its adapters added to their kernels (in float32): the same up to rounding, and faster.

        Int8 kernels become floating point. What has no adapter is shared, not copied.
        """
        config, params = lora.merge_model(self.config, self.params)
        return Emu(config, params, self.statistics, self.tokenizer, self.decoder, self.mesh)

    def without_adapters(self) -> Emu:
        """This model without its adapters, as it was before it was tuned; its parameters are shared, not copied."""
        config, params = lora.drop_adapters(self.config, self.params)
        return Emu(config, params, self.statistics, self.tokenizer, self.decoder, self.mesh)

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """Images [N, H, W, 3] (float32 already normalised, or uint8), of the model's size -> float32 [N, Q, D]."""
        size = self.config.vision.image_size
        pixels = np.asarray(pixels)
        if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
            raise UserError(f"encode_images: expected [N, {size}, {size}, 3], got {list(pixels.shape)}")
        with self.scope():
            return np.asarray(self._encode(self.params, self._split(pixels)))

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
        """Continues prompts that mix text and images, until </s>, an image that the model begins, or max_new_tokens.

        Args:
          num_beams: beam search with so many beams; 1 decodes greedily, or samples when temperature is above 0.
          min_length, length_penalty: lengths count a placeholder <s>, as the reference's do.
          temperature: 0 takes the likeliest token; above, one is drawn, by `seed`, of the `top_k` likeliest (0: all)
            that make up the probability `top_p`.
        """
        check_decoding(num_beams, max_new_tokens, temperature, top_p)
        decoding = text.Decoding(min_length, length_penalty, temperature, top_k, top_p)
        return self._generate_text(prompts, self.ends, num_beams, max_new_tokens, decoding, seed)

    def _generate_text(
        self,
        prompts: Sequence[Prompt],
        ends: Ends,
        num_beams: int,
        max_new_tokens: int,
        decoding: text.Decoding,
        seed: int = 0,
    ) -> list[GeneratedText]:
        inputs, valid = self._inputs(prompts, new_tokens=max_new_tokens)
        static = {"config": self.config, "ends": ends, "max_new_tokens": max_new_tokens}
        with self.scope():
            if num_beams > 1:
                tokens, scores = text.beam_search(self.params, inputs, valid, decoding, beams=num_beams, **static)
            else:
                tokens, scores = text.generate(self.params, inputs, valid, jax.random.key(seed), decoding, **static)
        results = []
        for row, score in zip(np.asarray(tokens), np.asarray(scores), strict=True):
            ids, ended_by = text.cut(row.tolist(), ends)
            results.append(GeneratedText(self.tokenizer.decode(ids), ids, float(score), ended_by))
        return results

    def chat(self, system: str | None = None) -> Chat:
        """A conversation with this model (`generate/chat.py`), which streams: `for piece in emu.chat().stream("hi")`.

        Args:
          system: the system message, "" for none; by default the paper's, if the first turn shows images or videos.

        Raises:
          UserError: the model was not tuned to chat: it has no [USER] and [ASSISTANT].
        """
        from emu_jax.generate.chat import Chat

        return Chat(self, system)

    def generate_embeddings(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """The next image's visual embeddings after each prompt: float32 [B, Q, D], generated one after the other."""
        inputs, valid = self._inputs(prompts, new_tokens=self.config.causal.queries, suffix=IMG)
        with self.scope():
            return np.asarray(image.generate_embeddings(self.params, inputs, valid, config=self.config))

    def generate_image(
        self,
        prompt: Prompt,
        *,
        sampler: str = "pndm",
        steps: int = 50,
        guidance: float = 7.5,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        latents: np.ndarray | None = None,
    ) -> GeneratedImage:
        """Draws the image that follows a prompt: one text; several images (blending); both mixed (in context).

        Args: as `generate_images` takes them; latents: [1, h, w, C].
        """
        settings: dict[str, Any] = {
            "sampler": sampler,
            "steps": steps,
            "guidance": guidance,
            "height": height,
            "width": width,
        }
        return self.generate_images([prompt], seeds=[seed], latents=latents, **settings)[0]

    def generate_images(
        self,
        prompts: Sequence[Prompt],
        *,
        sampler: str = "pndm",
        steps: int = 50,
        guidance: float = 7.5,
        seeds: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: np.ndarray | None = None,
    ) -> list[GeneratedImage]:
        """Draws one image a prompt, all in one batch.

        Args:
          sampler, steps: pndm, ddim, euler or dpmpp, and how many steps.
          guidance: how far to go from what the model draws for the empty prompt towards the prompt's image.
          seeds: of the initial noise, one a prompt (default: 0, 1, 2, …); a seed and a prompt make an image.
          height, width: pixels (default: the decoder's size).
          latents: float [B, h, w, C], the initial noise itself instead of seeds.

        Raises:
          UserError: no decoder, an unknown sampler, or settings that cannot work; before anything is compiled.
        """
        decoder = self.check_drawing(sampler, steps, guidance, height, width)
        embeddings = self.generate_embeddings(prompts)
        settings = {"sampler": sampler, "steps": steps, "guidance": guidance}
        return self._draw(decoder, embeddings, seeds, height, width, latents, settings)

    def reconstruct(self, image: ImageLike, *, seed: int = 0, **drawing: Any) -> GeneratedImage:
        """Image -> its causal embeddings -> image: what the decoder alone can do."""
        return self.reconstruct_images([image], seeds=[seed], **drawing)[0]

    def reconstruct_images(
        self,
        images: Sequence[ImageLike],
        *,
        sampler: str = "pndm",
        steps: int = 50,
        guidance: float = 7.5,
        seeds: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> list[GeneratedImage]:
        """`reconstruct` for several images in one batch."""
        decoder = self.check_drawing(sampler, steps, guidance, height, width)
        size = self.config.vision.image_size
        embeddings = self.encode_images(np.stack([resize(load_image(image), size) for image in images]))  # [B, Q, D]
        settings = {"sampler": sampler, "steps": steps, "guidance": guidance}
        return self._draw(decoder, embeddings, seeds, height, width, None, settings)

    def continue_document(
        self,
        document: Prompt,
        *,
        max_items: int = 4,
        pattern: Sequence[str] | None = None,
        max_new_tokens: int = 32,
        seed: int = 0,
        **drawing: Any,
    ) -> list[GeneratedText | GeneratedImage]:
        """Continues a document with texts and images in turn.

        Args:
          pattern: "text" or "image" for every item to come. Without it the model decides: a text ends where it writes
            [IMG], and an image follows; </s> ends the reply. Only models trained with `model.learn_image_token` write
            [IMG]: the published ones and others reply with one text.
          drawing: settings of `generate_image`.

        Drawn images enter the context as the images they are.
        """
        if max_items < 1 or any(kind not in ("text", "image") for kind in pattern or ()):
            raise UserError(
                f"continue_document: max_items={max_items}, pattern={pattern}; expected at least 1, and text or image"
            )
        check_decoding(1, max_new_tokens, 0.0, 1.0)
        ends = (self.tokenizer.eos_id, self.tokenizer.img_id)  # whatever a model has learnt, an image is no text
        parts: list[str | ImageLike] = list(document)
        items: list[GeneratedText | GeneratedImage] = []
        kinds = list(pattern)[:max_items] if pattern is not None else None
        kind = kinds[0] if kinds else "text"
        while len(items) < (max_items if kinds is None else len(kinds)):
            if kind == "image":
                drawn = self.generate_image(parts, seed=seed + len(items), **drawing)
                items.append(drawn)
                parts.append(drawn.image)
                kind = "text"
            else:
                written = self._generate_text([parts], ends, 1, max_new_tokens, text.Decoding())[0]
                if written.token_ids:
                    items.append(written)
                    parts.append(written.text)
                if kinds is None and written.ended_by != "image":
                    break
                if kinds is not None and not written.token_ids:
                    break  # the model has nothing more to say
                kind = "image"
            if kinds is not None and len(items) < len(kinds):
                kind = kinds[len(items)]
        return items

    @functools.cached_property
    def unconditional(self) -> np.ndarray:
        """The model's own embeddings for the empty prompt, [1, Q, D]: what guidance leads away from."""
        return self.generate_embeddings([[""]])

    def check_drawing(
        self, sampler: str, steps: int, guidance: float, height: int | None = None, width: int | None = None
    ) -> Decoder:
        """The decoder, if it can draw with these settings; else raises UserError. Compiles nothing."""
        if self.decoder is None:
            raise UserError(
                "this model has no visual decoder; give Emu.load decoder=…, a folder that holds unet and vae"
            )
        self.decoder.check(sampler, steps, guidance, height or self.decoder.size, width or self.decoder.size)
        return self.decoder

    def _draw(
        self,
        decoder: Decoder,
        embeddings: np.ndarray,
        seeds: Sequence[int] | None,
        height: int | None,
        width: int | None,
        latents: np.ndarray | None,
        settings: dict[str, Any],
    ) -> list[GeneratedImage]:
        count = len(embeddings)
        seeds = list(range(count)) if seeds is None else list(seeds)
        if len(seeds) != count or min(seeds) < 0:
            raise UserError(f"seeds={seeds}; expected {count} of them, one a prompt, each 0 or more")
        drawn = decoder.initial_latents(seeds, height or decoder.size, width or decoder.size)
        if latents is not None and np.shape(latents) != drawn.shape:
            raise UserError(f"latents are {list(np.shape(latents))}; expected {list(drawn.shape)}")
        unconditional = np.broadcast_to(self.unconditional, embeddings.shape)
        start = drawn if latents is None else latents
        images, flags = decoder.draw(embeddings, unconditional, start, **settings)
        return [
            GeneratedImage(PIL.Image.fromarray(image), embedding, seed, flagged)
            for image, embedding, seed, flagged in zip(images, embeddings, seeds, flags, strict=True)
        ]

    def score_candidates(self, prompt: Prompt, candidates: Sequence[str]) -> np.ndarray:
        """Summed negative log-likelihood of every candidate as the continuation of one prompt: float32 [M]."""
        return self.score_candidate_lists([prompt], [candidates])[0]

    def score_candidate_lists(self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """`score_candidates` of several prompts in one batch, each with candidates of its own: float32 [M] each."""
        if len(prompts) != len(candidates) or not all(len(some) for some in candidates):
            raise UserError("score_candidates: no candidates; expected a list of texts for every prompt")
        ids = [[self.tokenizer.encode(text, add_bos=False) for text in some] for some in candidates]
        # Few shapes: as many places as the longest list has, of a multiple of so many tokens.
        longest = -(-max(len(tokens) for some in ids for tokens in some) // CANDIDATE_BUCKET) * CANDIDATE_BUCKET
        padded = np.full((len(ids), max(map(len, ids)), longest), -1, np.int32)  # [B, M, N]
        for row, some in enumerate(ids):
            for place, tokens in enumerate(some):
                padded[row, place, : len(tokens)] = tokens
        inputs, valid = self._inputs(prompts, new_tokens=max(len(tokens) for some in ids for tokens in some))
        with self.scope():
            scores = text.score_candidates(self.params, inputs, valid, padded, config=self.config)  # [B, M]
        return [row[: len(some)] for row, some in zip(np.asarray(scores), ids, strict=True)]

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
        return self._split(self._embed_batch(batch)), self._split(batch.valid)

    def scope(self) -> contextlib.AbstractContextManager:
        """In which the model computes: its mesh, where it has one."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _split(self, rows: np.ndarray | jax.Array) -> jax.Array:
        """An array [B, …], its rows over the mesh where they divide."""
        if self.mesh is None:
            return jnp.asarray(rows)
        return jax.device_put(rows, sharding(self.mesh, ("batch", *(None,) * (rows.ndim - 1)), rows.shape))

    def _embed_batch(self, batch: PromptBatch) -> jax.Array:
        words = self.params["llama"]["embed"]["embedding"]
        if not len(batch.images):
            return self._embed(words, batch.tokens, jnp.zeros((1, words.shape[1])), batch.sources)
        embeddings = self.encode_images(batch.images)  # [N, Q, D]
        return self._embed(words, batch.tokens, embeddings.reshape(-1, words.shape[1]), batch.sources)


def _embed_prompts(words: jax.Array, tokens: jax.Array, visual: jax.Array, sources: jax.Array) -> jax.Array:
    """words [V, D], tokens [B, T], visual [N*Q, D], sources [B, T] (-1: a word) -> [B, T, D] float32."""
    images = visual[jnp.maximum(sources, 0)]
    return jnp.where(sources[..., None] >= 0, images, words[tokens].astype(jnp.float32))


def check_decoding(num_beams: int, max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raises UserError for settings that cannot work."""
    if num_beams < 1 or max_new_tokens < 1:
        raise UserError(f"num_beams={num_beams}, max_new_tokens={max_new_tokens}; expected at least 1 of each")
    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"temperature={temperature}, top_p={top_p}; expected temperature >= 0 and 0 < top_p <= 1")
    if num_beams > 1 and temperature > 0:
        raise UserError(f"num_beams={num_beams} and temperature={temperature}; beams do not sample, choose one of them")
