"""A conversation: turns that mix text, images and videos in, streamed answers out.

    chat = emu.chat()
    for piece in chat.stream([Path("cat.png"), "what is this?"]):
        print(piece, end="", flush=True)
    chat.say("which colour has it?").text
    if chat.say("draw a cat").ended_by == "image":
        chat.draw().image.save("cat.png")

The conversation is one growing sequence, token by token the one that training packs from the same turns
(`data/sequence.py`):

    <s> system [USER]: question [ASSISTANT]: answer </s> [USER]: … [ASSISTANT]: [IMG] <image>*Q [/IMG] </s>

Its keys and values stay in one cache, as large as the model's context, so a turn costs only its own tokens. Slot n of
the cache holds position n. New tokens are prefilled in chunks that are padded to one of a few sizes; the next chunk
overwrites the padding's slots, and turns are taken back by lowering the count of filled slots.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from emu_jax.data.document import Image, Text
from emu_jax.data.tokenizer import ASSISTANT, USER, Tokenizer
from emu_jax.errors import UserError
from emu_jax.generate.decoder import Drawing, GeneratedImage
from emu_jax.generate.messages import (
    DEFAULT_NEW_TOKENS,
    Video,
    clean,
    default_system,
    read_message,
    tokenize_conversation,
)
from emu_jax.generate.prompt import LENGTH_BUCKET, ImageLike, embed_prompts, read_image
from emu_jax.generate.text import (
    Decoding,
    EndedBy,
    Ends,
    GeneratedText,
    beam_search,
    check_decoding,
    choose,
    truncate_at_end,
)
from emu_jax.models import emu
from emu_jax.models.llama import KVCache

PREFILL_SIZES = (32, 64, 128, 256, 512)  # positions prefilled by one call: one compiled program each
# Said beside an answer, not in it: the model must not read it in the next turn.
UNDRAWN = "an image begins here, but this model has no visual decoder to draw it"
IMAGE_BATCH = 8  # images encoded by one call, as many as a video has frames; the rest is encoded one by one

Message = str | Sequence[str | ImageLike | Video]


class ChatModel(Protocol):
    """What a chat needs of a model; `Emu` provides it."""

    config: emu.EmuConfig
    params: emu.Params
    tokenizer: Tokenizer

    @property
    def ends(self) -> Ends:
        """Token ids that end an answer."""

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """Images [N, S, S, 3] -> float32 [N, Q, D]."""

    def check_drawing(self, drawing: Drawing) -> object:
        """Raises UserError if the model cannot draw with these settings."""

    def draw_next(
        self, inputs: Float[Array, "1 T D"], valid: Bool[Array, "1 T"], drawing: Drawing, seed: int
    ) -> GeneratedImage:
        """Draws the image after an embedded prompt that ends in [IMG]."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """A message and its answer.

    Attributes:
      read: positions prefilled before the answer's first token: the message and the end of the turn before it, but not
        the conversation.
      image: the image that ends the answer, once `Chat.draw` has drawn it.
    """

    message: tuple[str | ImageLike | Video, ...]
    answer: GeneratedText
    read: int
    image: GeneratedImage | None = None


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A turn that is not in the conversation yet.

    Attributes:
      tokens, embedding_index: T ids; and at every <image>, the row of its embedding among those of all the
        conversation's images, -1 elsewhere.
      images: embeddings of the turn's images.
    """

    message: tuple[str | ImageLike | Video, ...]
    tokens: list[int]
    embedding_index: list[int]
    images: list[Float[np.ndarray, "Q D"]]


class Chat:
    """A conversation with a model. Chats with one model share its compiled programs. Not thread-safe.

    An answer whose stream is closed, abandoned or interrupted keeps the text streamed so far. Before the first piece of
    text, and after an error, the whole turn is taken back. Every answer is closed by </s>, as in training, also where
    it reached `max_new_tokens` or the model began an image.
    """

    def __init__(self, model: ChatModel, system: str | None = None):
        """Args: as in `Emu.chat`."""
        missing = [name for name in (USER, ASSISTANT) if name not in model.tokenizer.added]
        if missing:
            raise UserError(
                f"this model does not chat: its tokenizer has no {' and no '.join(missing)}; load an instruction-tuned "
                "one (Emu-instruct.pt, a run of configs/instruct.py), or continue prompts by generate_text"
            )
        self.model = model
        self._system = None if system is None else clean(system, "the system message")
        context = model.config.llama.context
        # A last chunk of the smallest size fits wherever it begins.
        self._capacity = -(-context // PREFILL_SIZES[0]) * PREFILL_SIZES[0] + PREFILL_SIZES[0]
        self._stream: Generator[str, None, None] | None = None
        self._turns: list[Turn] = []
        self._starts: list[int] = []  # position at which each turn begins
        self._tokens: list[int] = []
        self._embedding_index: list[int] = []
        self._images: list[np.ndarray] = []  # [Q, D] each
        self._cache: KVCache | None = None  # None before the first turn, and after an interrupted step has lost it
        self._filled = 0  # number of filled slots of the cache

    # ------------------------------------------------------------ history

    @property
    def history(self) -> tuple[Turn, ...]:
        """The finished turns."""
        return tuple(self._turns)

    @property
    def tokens(self) -> list[int]:
        """Token ids of the whole conversation."""
        return list(self._tokens)

    def undo(self) -> Turn:
        """Takes back the last turn, message and answer, and returns it.

        Raises:
          UserError: there is no turn.
        """
        self._settle()
        if not self._turns:
            raise UserError("chat: there is no turn to take back")
        self._cut(self._starts.pop())
        return self._turns.pop()

    def reset(self) -> None:
        """Takes back all turns."""
        self._settle()
        self._cut(0)
        self._turns, self._starts = [], []

    # ------------------------------------------------------------ turns

    def say(
        self,
        message: Message,
        *,
        num_beams: int = 1,
        max_new_tokens: int | None = None,
        min_length: int = 1,
        length_penalty: float = 1.0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> GeneratedText:
        """One turn: a message to the model, and its whole answer.

        Args:
          message: a text, or texts, images and videos in order; a path with the suffix of a video is a video.
          num_beams: number of beams; above 1, beam search prefills the whole conversation again.
          max_new_tokens: by default the rest of the context, at most 256.
          the others: as in `Emu.generate_text`, which gives the same answer to the whole conversation.

        Raises:
          UserError: a message that cannot be read or does not fit; the conversation is unchanged.
        """
        decoding = Decoding(int(min_length), float(length_penalty), float(temperature), int(top_k), float(top_p))
        if num_beams == 1:
            for _ in self._open(message, max_new_tokens, decoding, seed):
                pass
        else:
            check_decoding(num_beams, 1 if max_new_tokens is None else max_new_tokens, temperature, top_p)
            self._settle()
            turn = self._prepare(message)
            self._search(turn, self._check_room(turn, max_new_tokens), decoding, num_beams)
        return self._turns[-1].answer

    def stream(
        self,
        message: Message,
        *,
        max_new_tokens: int | None = None,
        min_length: int = 1,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Generator[str, None, None]:
        """`say`, with the answer in pieces of text as they are decoded; joined, they are `history[-1].answer.text`.

        Errors are raised by this call, not at the first piece. The turn begins when the first piece is taken, and the
        next call to this chat ends the stream.
        """
        decoding = Decoding(int(min_length), 1.0, float(temperature), int(top_k), float(top_p))
        return self._open(message, max_new_tokens, decoding, seed)

    def add(self, message: Message, answer: str) -> None:
        """Adds a turn with a given answer: a few-shot example, or an earlier conversation.

        Raises: as `say`.
        """
        self._settle()
        answer = clean(answer, "the answer")
        turn = self._prepare(message, answer)
        self._check_room(turn, 0)
        ids = self.model.tokenizer.encode_plain(answer)
        self._starts.append(self._append(turn))
        self._turns.append(Turn(turn.message, GeneratedText(answer, ids, 0.0, "eos"), 0))

    def draw(self, *, seed: int = 0, **drawing: Any) -> GeneratedImage:
        """Draws the image that the last answer began: its `ended_by` is "image". The image becomes part of the answer.

        The next turns read it as the model reads any image, as in `Emu.continue_document`.

        Args: as in `Emu.generate_image`.

        Raises:
          UserError: the last answer began no image, or it is drawn already; the model has no visual decoder; settings
            that cannot work; the image does not fit the context. The conversation is unchanged.
        """
        self._settle()
        model, turn = self.model, self._turns[-1] if self._turns else None
        if turn is None or turn.answer.ended_by != "image" or turn.image is not None:
            reason = "there is no answer yet" if turn is None else "the last answer began none, or it is drawn already"
            raise UserError(f"chat: there is no image to draw ({reason}); draw where an answer's ended_by is 'image'")
        settings = Drawing(**drawing)
        model.check_drawing(settings)
        queries = model.config.causal.queries
        room = model.config.llama.context - len(self._tokens)
        if room < queries + 2:
            raise UserError(
                f"chat: an image of {queries + 2} tokens does not fit the model's context of "
                f"{model.config.llama.context} after {len(self._tokens)}; take turns back, or reset the chat"
            )
        end = len(self._tokens) - 1  # position of </s>, which comes after the image
        opened = [*self._tokens[:end], model.tokenizer.img_id]
        drawn = model.draw_next(*self._embed(opened), settings, seed)
        (embedded,) = self._encode([read_image(drawn.image, model.config.vision.image_size, "the drawn image")])
        self._cut(end)
        first = len(self._images) * queries
        self._images.append(embedded)
        self._tokens += [model.tokenizer.img_id, *[model.tokenizer.image_id] * queries, model.tokenizer.img_end_id]
        self._embedding_index += [-1, *range(first, first + queries), -1]
        self._append_text([model.tokenizer.eos_id])
        self._turns[-1] = dataclasses.replace(turn, image=drawn)
        return drawn

    def _open(
        self,
        message: Message,
        max_new_tokens: int | None,
        decoding: Decoding,
        seed: int,
    ) -> Generator[str, None, None]:
        tokens = 1 if max_new_tokens is None else max_new_tokens
        check_decoding(1, tokens, float(decoding.temperature), float(decoding.top_p))
        self._settle()
        turn = self._prepare(message)
        self._stream = self._answer(turn, self._check_room(turn, max_new_tokens), decoding, seed)
        return self._stream

    def _settle(self) -> None:
        """Ends the answer that is being streamed, if there is one."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    # ------------------------------------------------------------ messages

    def _prepare(self, message: Message, answer: str | None = None) -> _Prepared:
        """Reads a message and tokenises it, and a given answer with its </s>, as in training; changes nothing."""
        model, where = self.model, f"turn {len(self._turns) + 1}"
        queries = model.config.causal.queries
        if isinstance(message, str):
            message = [message]
        elif not isinstance(message, list | tuple):
            raise UserError(f"{where}: expected a text or a list of texts, images and videos; wrap it in []")
        parts, videos = read_message(message, model.config.vision.image_size, where)
        shown = [part.pixels for part in parts if isinstance(part, Image)]
        system = default_system(parts, videos) if self._system is None else self._system
        if system and not self._tokens:
            parts.insert(0, Text(system, "system"))
        parts.append(Text(answer or "", "assistant"))
        ids, index = tokenize_conversation(parts, model.tokenizer, queries)
        index = np.where(index >= 0, index + len(self._images) * queries, -1)
        kept = slice(1 if self._tokens else 0, len(ids) if answer is not None else -1)  # one <s>; no </s> yet
        return _Prepared(tuple(message), ids.tolist()[kept], index.tolist()[kept], self._encode(shown))

    def _encode(self, shown: list[np.ndarray]) -> list[np.ndarray]:
        """Images [S, S, 3] -> embeddings [Q, D] each, in batches of one of two sizes."""
        embeddings: list[np.ndarray] = []
        while shown:
            batch = shown[:IMAGE_BATCH]
            if len(batch) < IMAGE_BATCH or len({image.dtype for image in batch}) > 1:
                batch = batch[:1]
            embeddings += list(self.model.encode_images(np.stack(batch)))
            shown = shown[len(batch) :]
        return embeddings

    def _check_room(self, turn: _Prepared, max_new_tokens: int | None) -> int:
        """Maximum number of tokens of the answer.

        Raises:
          UserError: the turn does not fit the context.
        """
        context = self.model.config.llama.context
        room = context - len(self._tokens) - len(turn.tokens)
        wanted = min(DEFAULT_NEW_TOKENS, max(room, 1)) if max_new_tokens is None else max_new_tokens
        if wanted > room:
            raise UserError(
                f"turn {len(self._turns) + 1}: its {len(turn.tokens)} tokens after {len(self._tokens)}, and {wanted} "
                f"new ones, exceed the model's context of {context}; take turns back, reset the chat, or ask for fewer"
            )
        return wanted

    # ------------------------------------------------------------ the sequence

    def _append(self, turn: _Prepared) -> int:
        """Appends a turn to the sequence, to be prefilled later; returns its first position."""
        start = len(self._tokens)
        self._tokens += turn.tokens
        self._embedding_index += turn.embedding_index
        self._images += turn.images
        return start

    def _append_text(self, ids: Sequence[int]) -> None:
        self._tokens += ids
        self._embedding_index += [-1] * len(ids)

    def _cut(self, start: int) -> None:
        """Removes everything from position `start`."""
        del self._tokens[start:], self._embedding_index[start:]
        queries = self.model.config.causal.queries
        del self._images[sum(index >= 0 for index in self._embedding_index) // queries :]
        self._filled = min(self._filled, start)

    def _finish(self, start: int, message: tuple, read: int, answer: GeneratedText) -> None:
        """Closes the answer, whose tokens are in the sequence, and records the turn that began at `start`."""
        self._append_text([self.model.tokenizer.eos_id])
        self._starts.append(start)
        self._turns.append(Turn(message, answer, read))

    def _visual(self, first: int, last: int, length: int) -> tuple[Float[np.ndarray, "1 T D"], Bool[np.ndarray, "1 T"]]:
        """Images' embeddings at positions [first, last), padded to T = `length`, and where there are any."""
        visual = np.zeros((1, length, self.model.config.llama.width), np.float32)
        is_visual = np.zeros((1, length), bool)
        queries = self.model.config.causal.queries
        for offset, index in enumerate(self._embedding_index[first:last]):
            if index >= 0:
                visual[0, offset], is_visual[0, offset] = self._images[index // queries][index % queries], True
        return visual, is_visual

    # ------------------------------------------------------------ decoding

    def _answer(self, turn: _Prepared, count: int, decoding: Decoding, seed: int) -> Generator[str, None, None]:
        ends, non_text_ids = self.model.ends, self.model.tokenizer.non_text_ids
        detokenizer = self.model.tokenizer.detokenizer()
        start = self._append(turn)
        first = len(self._tokens)
        read = first - self._slots_filled()
        ids: list[int] = []
        scores: list[float] = []
        ended_by: EndedBy = "length"
        delivered = 0  # ids whose text the consumer has received
        whole = False
        try:
            for token, score in self._decode(count, decoding, seed):
                scores.append(score)
                if token in ends:
                    ended_by = truncate_at_end([token], ends)[1]
                    break
                ids.append(token)
                self._append_text([token])
                piece = "" if token in non_text_ids else "".join(string for _, string in detokenizer.add(token))
                if piece:
                    delivered = len(ids)
                    yield piece
            delivered, whole = len(ids), True
            if piece := "".join(string for _, string in detokenizer.end()):
                yield piece
        except Exception:  # whatever failed, the turn is taken back
            delivered = 0
            raise
        finally:  # also where the consumer closes the stream, or the user interrupts
            if whole or delivered:
                self._cut(first + delivered)
                total = sum(scores if whole else scores[:delivered])
                score = total / (1 + delivered) ** decoding.length_penalty
                words, why = self.model.tokenizer.decode(ids[:delivered]), ended_by if whole else "closed"
                answer = GeneratedText(words, ids[:delivered], float(score), why)
                self._finish(start, turn.message, read, answer)
            else:
                self._cut(start)
            self._stream = None

    def _decode(self, count: int, decoding: Decoding, seed: int) -> Iterator[tuple[int, float]]:
        """Yields at most `count` tokens with their log p; the caller appends each to the sequence before the next."""
        model = self.model
        static = {"config": model.config, "ends": model.ends}
        key = jax.random.key(seed)
        hidden = self._catch_up()
        token, score = _first_token(model.params, hidden, key, decoding, **static)
        for number in range(1, count + 1):
            yield int(token[0]), float(score[0])
            if number == count:
                break
            cache, self._cache = self._cache, None  # it is donated: an interruption loses it
            slot = np.int32(self._filled)
            token, score, self._cache = _next_token(
                model.params, cache, slot, token, np.int32(number), key, decoding, **static
            )
            self._filled += 1

    def _slots_filled(self) -> int:
        return self._filled if self._cache is not None else 0

    def _catch_up(self) -> Float[Array, "1 D"]:
        """Prefills the positions that the cache lacks; returns the last position's hidden state."""
        model = self.model
        self._filled = self._slots_filled()
        if self._cache is None:
            self._cache = emu.bind(model.config, model.params).llama.init_cache(1, self._capacity, model.config.dtype)
        while (first := self._filled) < len(self._tokens):
            left = len(self._tokens) - first
            fitting = [size for size in PREFILL_SIZES if first + size <= self._capacity]
            size = min((size for size in fitting if size >= left), default=fitting[-1])
            last = first + min(left, size)
            tokens = np.full((1, size), model.tokenizer.pad_id, np.int32)
            tokens[0, : last - first] = self._tokens[first:last]
            visual, is_visual = self._visual(first, last, size)
            cache, self._cache = self._cache, None
            slot, count = np.int32(first), np.int32(last - first)
            hidden, self._cache = _prefill_chunk(
                model.params, cache, slot, tokens, visual, is_visual, count, config=model.config
            )
            self._filled = last
        return hidden

    def _embed(self, ids: Sequence[int]) -> tuple[Float[Array, "1 T D"], Bool[Array, "1 T"]]:
        """The conversation's first tokens, or all of them and more text, as one left-padded prompt."""
        length, model = len(ids), self.model
        padded = -(-length // LENGTH_BUCKET) * LENGTH_BUCKET
        tokens = np.full((1, padded), model.tokenizer.pad_id, np.int32)
        tokens[0, padded - length :] = ids
        visual, is_visual = (np.roll(x, padded - length, axis=1) for x in self._visual(0, length, padded))
        inputs = embed_prompts(model.params["llama"]["embed"]["embedding"], tokens, visual, is_visual)
        return inputs, jnp.arange(padded)[None] >= padded - length

    def _search(self, turn: _Prepared, count: int, decoding: Decoding, beams: int) -> None:
        """A turn by beam search, with a cache of its own; the chat's cache takes the answer with the next turn."""
        model = self.model
        start = self._append(turn)
        try:
            length = len(self._tokens)
            inputs, valid = self._embed(self._tokens)
            static = {"config": model.config, "ends": model.ends, "max_new_tokens": count, "beams": beams}
            new_tokens, scores = beam_search(model.params, inputs, valid, decoding, **static)
            ids, ended_by = truncate_at_end(np.asarray(new_tokens)[0].tolist(), model.ends)
        except BaseException:
            self._cut(start)
            raise
        self._append_text(ids)
        answer = GeneratedText(model.tokenizer.decode(ids), ids, float(scores[0]), ended_by)
        self._finish(start, turn.message, length, answer)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _prefill_chunk(
    params: emu.Params,
    cache: KVCache,
    slot: Int[Array, ""],
    tokens: Int[Array, "1 T"],
    visual: Float[Array, "1 T D"],
    is_visual: Bool[Array, "1 T"],
    count: Int[Array, ""],
    *,
    config: emu.EmuConfig,
) -> tuple[Float[Array, "1 D"], KVCache]:
    """Prefills the first `count` of T positions into the slots from `slot`; returns the last one's hidden state."""
    llama = emu.bind(config, params).llama
    offsets = jnp.arange(tokens.shape[1])[None]  # [1, T]
    words = params["llama"]["embed"]["embedding"]
    inputs = embed_prompts(words, tokens, visual, is_visual).astype(config.dtype)
    cache = dataclasses.replace(cache, index=slot)
    hidden, cache = llama.decode(inputs, slot + offsets, cache, offsets < count)
    return jnp.take(hidden, count - 1, axis=1), cache


@functools.partial(jax.jit, static_argnames=("config", "ends"))
def _first_token(
    params: emu.Params,
    hidden: Float[Array, "1 D"],
    key: Key[Array, ""],
    decoding: Decoding,
    *,
    config: emu.EmuConfig,
    ends: Ends,
) -> tuple[Int[Array, " 1"], Float[Array, " 1"]]:
    """The answer's first token, and its log p."""
    return choose(emu.bind(config, params).llama, hidden, jnp.zeros((), jnp.int32), key, decoding, ends)


@functools.partial(jax.jit, static_argnames=("config", "ends"), donate_argnames="cache")
def _next_token(
    params: emu.Params,
    cache: KVCache,
    slot: Int[Array, ""],
    token: Int[Array, " 1"],
    count: Int[Array, ""],
    key: Key[Array, ""],
    decoding: Decoding,
    *,
    config: emu.EmuConfig,
    ends: Ends,
) -> tuple[Int[Array, " 1"], Float[Array, " 1"], KVCache]:
    """Decodes the answer's token number `count` into a slot; returns the next token, its log p, and the cache."""
    llama = emu.bind(config, params).llama
    inputs = llama.embed(token[:, None]).astype(config.dtype)  # [1, 1, D]
    cache = dataclasses.replace(cache, index=slot)
    hidden, cache = llama.decode(inputs, slot[None, None], cache)
    return *choose(llama, hidden[:, 0], count, key, decoding, ends), cache
