"""`Emu`, the public API: load a model, then caption, continue, embed, score, chat and draw.

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
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Shaped

from emu_jax.checkpoints.layout import TUNED
from emu_jax.checkpoints.load import load_emu
from emu_jax.checkpoints.shipped import model_path
from emu_jax.checkpoints.store import is_checkpoint, weights_of_parts
from emu_jax.data.images import load_image, resize
from emu_jax.data.tokenizer import IMG, Tokenizer
from emu_jax.errors import UserError
from emu_jax.generate.candidates import CandidateScores
from emu_jax.generate.chat import Chat
from emu_jax.generate.decoder import Decoder, Drawing, GeneratedImage, check_seeds, consecutive_seed
from emu_jax.generate.document import IMAGE, Continuation
from emu_jax.generate.embeddings import generate_embeddings
from emu_jax.generate.prompt import ImageLike, Prompt, PromptBatch, embed_prompts, encode_prompts
from emu_jax.generate.text import (
    Decoding,
    Ends,
    GeneratedText,
    beam_search,
    check_decoding,
    generate,
    score_candidates,
    truncate_at_end,
)
from emu_jax.models import emu, lora
from emu_jax.models.paths import flatten
from emu_jax.sharding import make_mesh, sharding, tree_shardings
from emu_jax.storage import as_path

FINGERPRINT_VALUES = 64  # leading values of each parameter that enter the fingerprint
CANDIDATE_BUCKET = 8  # candidates are padded to a multiple of this many tokens, so that few shapes are compiled


class Emu:
    """A model ready to generate. `config`, `params`, `statistics` and `tokenizer` are public, for research code.

    `decoder` draws; without one, everything but images can be generated. On a `mesh` of this process's devices,
    parameters are sharded by the logical axis rules of `sharding.py`, and so are the prompts of a batch if the mesh
    divides their number. The decoder is replicated.
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

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        vision_head_dim: int | None = None,
        tuned: bool = False,
        decoder: str | os.PathLike[str] | None = None,
        safety_checker: bool = True,
        mesh: Mapping[str, int] | None = None,
        weights: str = "auto",
        rope_dtype: str | None = None,
    ) -> Emu:
        """Loads a training work directory, one of its checkpoints, or published weights.

        Args:
          path: a shipped model's name (`checkpoints/shipped.py`); a work directory or checkpoint, whose adapters stay
            beside their kernels (`merged` adds them up); or published files, whose LoRA is merged: a folder with
            multimodal_encoder/pytorch_model.bin, or a .pt, .bin or .safetensors file. Work directories and checkpoints
            may be in buckets, as gs://… or s3://….
          tokenizer: SentencePiece .model; needed only for weights without a stored tokenizer, such as published files.
          vision_head_dim: published files: head width of the vision encoder, if it differs from the published 88.
          tuned: whether to load the model in the folder `chat` of `path`, which was tuned from it, if there is one.
          decoder: folder with the visual decoder's `unet` and `vae`; by default `path`, if it has them.
          safety_checker: whether to check drawn images, if the decoder's folder has a `safety_checker`.
          mesh: axes of a mesh of this process's devices, e.g. {"data": 4, "tensor": 2}; checkpoints are restored split.
          weights: "raw" for the last step's parameters, "ema" for their exponential moving average, "auto" for the EMA
            if the run keeps one. The decoder's parameters are raw with "raw", and "auto" otherwise.
          rope_dtype: replaces the weights' `model.llama.rope_dtype`.

        Raises:
          UserError: there is nothing to load, or the parts do not fit together.
        """
        path = model_path(path)
        if decoder is None and Decoder.exists(path):
            decoder = path
        if tuned and is_checkpoint(path) and is_checkpoint(path / TUNED):
            path = path / TUNED
        draws = None
        if decoder is not None:
            draws = Decoder.load(model_path(decoder), safety_checker=safety_checker, weights=weights_of_parts(weights))
        place = None if mesh is None else make_mesh(mesh, jax.local_devices())
        loaded = load_emu(
            path,
            tokenizer=None if tokenizer is None else as_path(tokenizer),
            require_tokenizer=True,
            mesh=place,
            weights=weights,
            vision_head_dim=vision_head_dim,
        )
        assert loaded.tokenizer is not None  # it is required
        config = loaded.config
        if rope_dtype is not None:
            config = dataclasses.replace(config, llama=dataclasses.replace(config.llama, rope_dtype=rope_dtype))
        return cls(config, loaded.params, loaded.statistics, loaded.tokenizer, draws, place)

    @property
    def ends(self) -> Ends:
        """Token ids that end a text of this model: </s>, and [IMG] if it has learnt to begin images."""
        return (self.tokenizer.eos_id, self.tokenizer.img_id)[: 1 + self.config.learn_image_token]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the model: SHA-256 over the config, the tokenizer and the first values of every parameter."""
        digest = hashlib.sha256(json.dumps([self.config.to_dict(), self.tokenizer.fingerprint]).encode())
        for name, leaf in sorted(flatten(self.params).items()):
            first = leaf[(0,) * (leaf.ndim - 1)][:FINGERPRINT_VALUES] if leaf.ndim else leaf
            digest.update(name.encode() + np.asarray(first).tobytes())
        return digest.hexdigest()

    def merged(self) -> Emu:
        """This model with its adapters merged into their kernels (in float32): equal up to rounding, and faster.

        Integer kernels become floating point. Parameters without an adapter are shared, not copied.
        """
        config, params = lora.merge_model(self.config, self.params)
        return Emu(config, params, self.statistics, self.tokenizer, self.decoder, self.mesh)

    def without_adapters(self) -> Emu:
        """This model without its adapters, as before tuning; parameters are shared, not copied."""
        config, params = lora.drop_adapters(self.config, self.params)
        return Emu(config, params, self.statistics, self.tokenizer, self.decoder, self.mesh)

    def encode_images(self, pixels: Shaped[np.ndarray, " ..."]) -> Float[np.ndarray, "N Q D"]:
        """Causal embeddings, in float32, of images [N, S, S, 3]: uint8, or already normalised float32."""
        size = self.config.vision.image_size
        pixels = np.asarray(pixels)
        if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
            raise UserError(f"encode_images: expected [N, {size}, {size}, 3], got {list(pixels.shape)}")
        with self.scope():
            return np.asarray(_encode(self.params, self.statistics, self._shard(pixels), config=self.config))

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
        """Continues prompts that mix text and images, up to </s>, the beginning of an image, or max_new_tokens.

        Args:
          num_beams: number of beams of a beam search; 1 decodes greedily, or samples if the temperature is above 0.
          min_length, length_penalty: lengths count a placeholder <s>, as the reference's do.
          temperature: 0 takes the likeliest token; above 0, tokens are sampled with `seed`.
          top_k: number of likeliest tokens to sample from; 0 for all.
          top_p: total probability of the likeliest tokens to sample from.
        """
        check_decoding(num_beams, max_new_tokens, temperature, top_p)
        decoding = Decoding(min_length, length_penalty, temperature, top_k, top_p)
        return self._generate_text(prompts, self.ends, num_beams, max_new_tokens, decoding, seed)

    def _generate_text(
        self,
        prompts: Sequence[Prompt],
        ends: Ends,
        num_beams: int,
        max_new_tokens: int,
        decoding: Decoding,
        seed: int = 0,
    ) -> list[GeneratedText]:
        inputs, valid = self._inputs(prompts, new_tokens=max_new_tokens)
        static = {"config": self.config, "ends": ends, "max_new_tokens": max_new_tokens}
        with self.scope():
            if num_beams > 1:
                tokens, scores = beam_search(self.params, inputs, valid, decoding, beams=num_beams, **static)
            else:
                tokens, scores = generate(self.params, inputs, valid, jax.random.key(seed), decoding, **static)
        results = []
        for row, score in zip(np.asarray(tokens), np.asarray(scores), strict=True):
            ids, ended_by = truncate_at_end(row.tolist(), ends)
            results.append(GeneratedText(self.tokenizer.decode(ids), ids, float(score), ended_by))
        return results

    def chat(self, system: str | None = None) -> Chat:
        """A conversation with this model (`generate/chat.py`), which streams: `for piece in emu.chat().stream("hi")`.

        Args:
          system: the system message, "" for none; by default the paper's, if the first turn shows images or videos.

        Raises:
          UserError: the model was not tuned to chat: its tokenizer has no [USER] and [ASSISTANT].
        """
        return Chat(self, system)

    def generate_embeddings(
        self, prompts: Sequence[Prompt], *, seeds: Sequence[int] | None = None
    ) -> Float[np.ndarray, "B Q D"]:
        """The visual embeddings of the image that follows each prompt, in float32, generated autoregressively.

        Args:
          seeds: one per prompt (default: 0 for all), for a visual head that draws at random (`flow`, `codes`); others
            ignore it.

        Raises:
          UserError: a seed is out of range, or there are more or fewer seeds than prompts.
        """
        inputs = self._inputs(prompts, new_tokens=self.config.causal.queries, suffix=IMG)
        return self._generate_embeddings(*inputs, [0] * len(prompts) if seeds is None else seeds)

    def _generate_embeddings(
        self, inputs: Float[Array, "B T D"], valid: Bool[Array, "B T"], seeds: Sequence[int]
    ) -> Float[np.ndarray, "B Q D"]:
        check_seeds(seeds, len(inputs))
        with self.scope():
            return np.asarray(
                generate_embeddings(self.params, inputs, valid, np.asarray(seeds, np.uint32), config=self.config)
            )

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
        latents: Float[np.ndarray, "1 h w C"] | None = None,
    ) -> GeneratedImage:
        """Draws the image that follows a prompt: a text, several images (blending), or both mixed (in context).

        Args: as in `generate_images`.
        """
        drawing = dataclasses.asdict(Drawing(sampler, steps, guidance, height, width))
        return self.generate_images([prompt], seeds=[seed], latents=latents, **drawing)[0]

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
        latents: Float[np.ndarray, "B h w C"] | None = None,
    ) -> list[GeneratedImage]:
        """Draws one image per prompt, all in one batch.

        Args:
          sampler: pndm, ddim, euler or dpmpp. steps: number of sampling steps.
          guidance: scale of classifier-free guidance (CFG); its unconditional branch is the empty prompt.
          seeds: seeds of the initial noise, and of a visual head that draws at random, one per prompt (default: 0, 1,
            2, …). An image depends on its prompt and seed, not on the batch.
          height, width: pixels (default: the decoder's size).
          latents: initial noise, instead of seeds.

        Raises:
          UserError: no decoder, an unknown sampler, or settings that cannot work; before anything is compiled.
        """
        drawing = Drawing(sampler, steps, guidance, height, width)
        decoder = self.check_drawing(drawing)
        seeds = list(range(len(prompts))) if seeds is None else seeds
        return self._draw(decoder, self.generate_embeddings(prompts, seeds=seeds), drawing, seeds, latents)

    def draw_next(
        self, inputs: Float[Array, "1 T D"], valid: Bool[Array, "1 T"], drawing: Drawing, seed: int
    ) -> GeneratedImage:
        """Draws the image after one embedded prompt that ends in [IMG]; `generate_images` takes texts and images."""
        decoder = self.check_drawing(drawing)
        return self._draw(decoder, self._generate_embeddings(inputs, valid, [seed]), drawing, [seed])[0]

    def reconstruct(self, image: ImageLike, *, seed: int = 0, **drawing: Any) -> GeneratedImage:
        """Image -> its causal embeddings -> image: shows what the decoder can recover."""
        return self.reconstruct_images([image], seeds=[seed], **drawing)[0]

    def reconstruct_images(
        self, images: Sequence[ImageLike], *, seeds: Sequence[int] | None = None, **drawing: Any
    ) -> list[GeneratedImage]:
        """`reconstruct` for several images in one batch."""
        settings = Drawing(**drawing)
        decoder = self.check_drawing(settings)
        size = self.config.vision.image_size
        condition = self.encode_images(np.stack([resize(load_image(image), size) for image in images]))  # [B, Q, D]
        return self._draw(decoder, condition, settings, seeds)

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

        Drawn images enter the context as images: they are encoded like those of the document.

        Args:
          max_items: maximum number of new texts and images.
          pattern: "text" or "image" for every new item. Without it the model decides: an image follows a text that ends
            at [IMG], and </s> ends the document. Only models trained with `model.learn_image_token` write [IMG]; others
            (the published ones, for example) add one text.
          max_new_tokens: maximum length of each text.
          seed: seed of the first item's noise; the second item has the next seed, and so on.
          drawing: settings of `generate_image`.
        """
        check_decoding(1, max_new_tokens, 0.0, 1.0)
        document_ends = (self.tokenizer.eos_id, self.tokenizer.img_id)  # [IMG] is never text, whatever a model learnt
        continuation = Continuation(document, max_items, pattern)
        items: list[GeneratedText | GeneratedImage] = []
        while continuation.next is not None:
            if continuation.next == IMAGE:
                item_seed = consecutive_seed(seed, len(items))
                drawn = self.generate_image(continuation.parts, seed=item_seed, **drawing)
                continuation.add_image(drawn.image)
                items.append(drawn)
            else:
                (new,) = self._generate_text([continuation.parts], document_ends, 1, max_new_tokens, Decoding())
                is_empty = not new.token_ids
                continuation.add_text(new.text, is_empty=is_empty, begins_image=new.ended_by == "image")
                items += [] if is_empty else [new]
        return items

    @functools.cached_property
    def unconditional(self) -> Float[np.ndarray, "1 Q D"]:
        """The model's own embeddings for the empty prompt: the unconditional branch of classifier-free guidance."""
        return self.generate_embeddings([[""]])

    def check_drawing(self, drawing: Drawing) -> Decoder:
        """The decoder, if it can draw with these settings; otherwise raises UserError. Compiles nothing."""
        if self.decoder is None:
            raise UserError(
                "this model has no visual decoder; give Emu.load decoder=…, a folder that holds unet and vae"
            )
        self.decoder.check(drawing)
        return self.decoder

    def _draw(
        self,
        decoder: Decoder,
        condition: Float[np.ndarray, "B Q D"],
        drawing: Drawing,
        seeds: Sequence[int] | None,
        latents: Float[np.ndarray, "B h w C"] | None = None,
    ) -> list[GeneratedImage]:
        count = len(condition)
        seeds = list(range(count)) if seeds is None else list(seeds)
        check_seeds(seeds, count)
        noise = decoder.initial_latents(seeds, drawing.height, drawing.width)
        if latents is not None and np.shape(latents) != noise.shape:
            raise UserError(f"latents are {list(np.shape(latents))}; expected {list(noise.shape)}")
        unconditional = np.broadcast_to(self.unconditional, condition.shape)
        images, flags = decoder.draw(condition, unconditional, noise if latents is None else latents, drawing)
        return [
            GeneratedImage(PIL.Image.fromarray(image), embeddings, seed, flagged)
            for image, embeddings, seed, flagged in zip(images, condition, seeds, flags, strict=True)
        ]

    def score_candidates(self, prompt: Prompt, candidates: Sequence[str], rule: str = "sum") -> Float[np.ndarray, " M"]:
        """How unlikely every candidate is as the continuation of one prompt: the lowest score is the likeliest.

        Args:
          rule: "sum" of the negative log-likelihoods of a candidate's tokens, their mean ("tokens"), or what the
            "reference" ranks VisDial's candidates by (`candidates.py`).
        """
        return self.score_candidate_lists([prompt], [candidates])[0].by(rule)

    def score_candidate_lists(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]
    ) -> list[CandidateScores]:
        """`score_candidates` for several prompts in one batch, each with candidates of its own, by every rule."""
        if len(prompts) != len(candidates) or not all(map(len, candidates)):
            raise UserError("score_candidates: no candidates; expected a list of texts for every prompt")
        ids = [[self.tokenizer.encode(each, add_bos=False) for each in texts] for texts in candidates]
        longest = max(len(tokens) for row in ids for tokens in row)
        length = -(-longest // CANDIDATE_BUCKET) * CANDIDATE_BUCKET
        padded = np.full((len(ids), max(map(len, ids)), length), -1, np.int32)  # [B, M, N]
        for row, of_prompt in enumerate(ids):
            for column, tokens in enumerate(of_prompt):
                padded[row, column, : len(tokens)] = tokens
        inputs, valid = self._inputs(prompts, new_tokens=longest)
        with self.scope():
            scores, greedy = score_candidates(self.params, inputs, valid, padded, config=self.config)  # [B, M]
        found = []
        rows = zip(np.asarray(scores), np.asarray(greedy), ids, np.asarray(valid).sum(1), strict=True)
        for row, is_greedy, of_prompt, length in rows:
            count, lengths = len(of_prompt), np.array([len(tokens) for tokens in of_prompt])
            found.append(CandidateScores(row[:count], lengths, int(length), is_greedy[:count]))
        return found

    def _inputs(
        self, prompts: Sequence[Prompt], *, new_tokens: int, suffix: str = ""
    ) -> tuple[Float[Array, "B T D"], Bool[Array, "B T"]]:
        """Embedded prompts, left-padded, and their validity."""
        batch = encode_prompts(
            prompts,
            self.tokenizer,
            queries=self.config.causal.queries,
            image_size=self.config.vision.image_size,
            context=self.config.llama.context,
            new_tokens=new_tokens,
            suffix=suffix,
        )
        return self._shard(self._embed_batch(batch)), self._shard(batch.valid)

    def scope(self) -> contextlib.AbstractContextManager:
        """Context in which the model computes: its mesh, if it has one."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _shard(self, rows: Shaped[np.ndarray, "B ..."] | Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
        """Rows of a batch, sharded over the mesh if it divides their number."""
        if self.mesh is None:
            return jnp.asarray(rows)
        return jax.device_put(rows, sharding(self.mesh, ("batch", *(None,) * (rows.ndim - 1)), rows.shape))

    def _embed_batch(self, batch: PromptBatch) -> Float[Array, "B T D"]:
        words = self.params["llama"]["embed"]["embedding"]
        width = words.shape[1]
        images = self.encode_images(batch.images).reshape(-1, width) if len(batch.images) else np.zeros((1, width))
        return _embed(words, batch.tokens, images, batch.embedding_index)


_encode = jax.jit(emu.encode_images, static_argnames="config")


@jax.jit
def _embed(
    words: Float[Array, "V D"],
    tokens: Int[Array, "B T"],
    images: Float[Array, "E D"],
    embedding_index: Int[Array, "B T"],
) -> Float[Array, "B T D"]:
    """`embed_prompts` with visual embeddings gathered from all images' ones, E = N*Q."""
    visual = images[jnp.maximum(embedding_index, 0)]
    return embed_prompts(words, tokens, visual, embedding_index >= 0)
