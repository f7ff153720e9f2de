"""A conversation: turns that mix text, images and videos in, streamed answers out.

    chat = emu.chat()
    for piece in chat.stream([Path("cat.png"), "what is this?"]):
        print(piece, end="", flush=True)
    chat.say("which colour has it?").text

The conversation is one growing sequence, token by token what training packs of the same turns (`data/packing.py`):

    <s> system [USER]: question [ASSISTANT]: answer </s> [USER]: …

Its keys and values stay in one cache, as large as the model's context, so that a turn costs its own tokens alone. Slot
n of it holds position n. New tokens are read in pieces that are padded to one of few sizes; what the padding wrote is
written over by what comes next, and turns are taken back by counting fewer slots.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emu_jax.data.document import Document, Image, Text
from emu_jax.data.sequence import tokenize_document
from emu_jax.data.system_messages import IMAGE_SYSTEM, VIDEO_SYSTEM
from emu_jax.data.tokenizer import ASSISTANT, USER
from emu_jax.errors import UserError
from emu_jax.generate import text
from emu_jax.generate.model import Emu, GeneratedText, check_decoding
from emu_jax.generate.prompt import LENGTH_BUCKET, ImageLike, read_image
from emu_jax.generate.text import Decoding, EndedBy, Ends
from emu_jax.models import emu
from emu_jax.models.layers import Array
from emu_jax.models.llama import KVCache

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi"}
PIECES = (32, 64, 128, 256, 512)  # positions that are read at a time: programs that are compiled
IMAGES = 8  # that are encoded at a time, as many as a video has frames; what is left over goes one by one
NEW_TOKENS = 256  # of an answer, at most, if nothing else is asked for
ROW = 1 << 30  # a conversation is one row, which `_check_room` bounds


@dataclasses.dataclass(frozen=True)
class Video:
    """A video or animation, shown as `frames` images by the reference's rule (`data/frames.py`); or its images."""

    source: Path | Sequence[ImageLike]
    frames: int = 8


@dataclasses.dataclass(frozen=True)
class Turn:
    """A message and its answer.

    `read` counts the positions that went through the model before the answer's first token: the message, and what
    ended the turn before; not the conversation.
    """

    message: tuple[str | ImageLike | Video, ...]
    answer: GeneratedText
    read: int


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A turn before it is said.

    Attributes:
      tokens, sources: T ids, and image number * Q + query at every <image>, -1 elsewhere.
      images: float32 [Q, D] each.
    """

    message: tuple[str | ImageLike | Video, ...]
    tokens: list[int]
    sources: list[int]
    images: list[np.ndarray]


class Chat:
    """A conversation with a model; several of one model share its compiled programs. Not for several threads.

    An answer whose stream is closed, left or interrupted ends with what was said; before its first piece of text, and
    where an error stops it, the turn is taken back whole. An answer that reaches `max_new_tokens`, or an image that the
    model begins, is closed by </s>, as all answers of training are.
    """

    def __init__(self, model: Emu, system: str | None = None):
        """Args: as `Emu.chat` takes them."""
        missing = [name for name in (USER, ASSISTANT) if name not in model.tokenizer.added]
        if missing:
            raise UserError(
                f"this model does not chat: its tokenizer has no {' and no '.join(missing)}; load an instruction-tuned "
                "one (Emu-instruct.pt, a run of configs/instruct.py), or continue prompts by generate_text"
            )
        self.model = model
        self._system = None if system is None else clean(system, "the system message")
        context = model.config.llama.context
        # A last piece of the smallest size fits wherever it begins.
        self._capacity = -(-context // PIECES[0]) * PIECES[0] + PIECES[0]
        self._stream: Generator[str, None, None] | None = None
        self._turns: list[Turn] = []
        self._starts: list[int] = []  # positions before each turn
        self._tokens: list[int] = []
        self._sources: list[int] = []
        self._images: list[np.ndarray] = []  # [Q, D] each
        self._cache: KVCache | None = None  # None before the first turn, and where an interrupted step has lost it
        self._filled = 0  # slots that hold the first positions

    # ------------------------------------------------------------ what was said

    @property
    def history(self) -> tuple[Turn, ...]:
        """The turns that are finished."""
        return tuple(self._turns)

    @property
    def tokens(self) -> list[int]:
        """The whole conversation, as it is read."""
        return list(self._tokens)

    def undo(self) -> Turn:
        """Takes back the last turn, message and answer, and returns it.

        Raises:
          UserError: there is none.
        """
        self._settle()
        if not self._turns:
            raise UserError("chat: there is no turn to take back")
        self._cut(self._starts.pop())
        return self._turns.pop()

    def reset(self) -> None:
        """Takes back everything."""
        self._settle()
        self._cut(0)
        self._turns, self._starts = [], []

    # ------------------------------------------------------------ turns

    def say(
        self,
        message: str | Sequence[str | ImageLike | Video],
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
          message: a text, or texts, images and videos in order; a path that ends like a video is one.
          num_beams: beam search with so many beams, which reads the whole conversation anew.
          max_new_tokens: by default what the context leaves, at most 256.
          the others: as `Emu.generate_text` takes them, which gives the same answer to the whole conversation.

        Raises:
          UserError: a message that cannot be read or does not fit; the conversation is then as it was.
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
        message: str | Sequence[str | ImageLike | Video],
        *,
        max_new_tokens: int | None = None,
        min_length: int = 1,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Generator[str, None, None]:
        """`say`, but the answer comes in pieces of text, as it is decoded; joined they are `history[-1].answer.text`.

        Errors are raised here, not at the first piece. The turn counts once pieces are taken, and the stream ends where
        the conversation goes on without it.
        """
        decoding = Decoding(int(min_length), 1.0, float(temperature), int(top_k), float(top_p))
        return self._open(message, max_new_tokens, decoding, seed)

    def add(self, message: str | Sequence[str | ImageLike | Video], answer: str) -> None:
        """A turn whose answer is given: an example to go by, or a conversation of before.

        Raises: as `say`.
        """
        self._settle()
        answer = clean(answer, "the answer")
        turn = self._prepare(message, answer)
        self._check_room(turn, 0)
        ids = self.model.tokenizer.encode_plain(answer)
        self._starts.append(self._append(turn))
        self._turns.append(Turn(turn.message, GeneratedText(answer, ids, 0.0, "eos"), 0))

    def _open(
        self,
        message: str | Sequence[str | ImageLike | Video],
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
        """Ends the answer that is under way, if one is."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    # ------------------------------------------------------------ messages

    def _prepare(self, message: str | Sequence[str | ImageLike | Video], answer: str | None = None) -> _Prepared:
        """Reads a message and tokenises it as training does; changes nothing. With an answer, that and its </s> too."""
        model, where = self.model, f"turn {len(self._turns) + 1}"
        queries = model.config.causal.queries
        if isinstance(message, str):
            message = [message]
        elif not isinstance(message, list | tuple):
            raise UserError(f"{where}: expected a text or a list of texts, images and videos; wrap it in []")
        parts, videos = read_message(model, message, where)
        shown = [part.pixels for part in parts if isinstance(part, Image)]
        system = default_system(parts, videos) if self._system is None else self._system
        if system and not self._tokens:
            parts.insert(0, Text(system, "system"))
        parts.append(Text(answer or "", "assistant"))
        rows: dict[str, Any] = {"row_tokens": ROW, "row_images": ROW}
        (found,) = tokenize_document(Document(tuple(parts)), model.tokenizer, queries=queries, **rows)
        tokens, slots = found.tokens.tolist(), found.slots
        # Images are numbered through the conversation, and so are their <image> tokens in reading order.
        first = len(self._images) * queries
        sources = np.where(slots >= 0, first + np.cumsum(slots >= 0) - 1, -1).tolist()
        kept = slice(1 if self._tokens else 0, len(tokens) if answer is not None else -1)  # one <s>; no </s> yet
        return _Prepared(tuple(message), tokens[kept], sources[kept], self._encode(shown))

    def _encode(self, shown: list[np.ndarray]) -> list[np.ndarray]:
        """Images [S, S, 3] -> [Q, D] each, in batches of two sizes alone."""
        embeddings: list[np.ndarray] = []
        while shown:
            batch = shown[:IMAGES]
            if len(batch) < IMAGES or len({image.dtype for image in batch}) > 1:
                batch = batch[:1]
            embeddings += list(self.model.encode_images(np.stack(batch)))
            shown = shown[len(batch) :]
        return embeddings

    def _check_room(self, turn: _Prepared, max_new_tokens: int | None) -> int:
        """How many tokens the answer may have.

        Raises:
          UserError: the turn does not fit the context.
        """
        context = self.model.config.llama.context
        room = context - len(self._tokens) - len(turn.tokens)
        wanted = min(NEW_TOKENS, max(room, 1)) if max_new_tokens is None else max_new_tokens
        if wanted > room:
            raise UserError(
                f"turn {len(self._turns) + 1}: its {len(turn.tokens)} tokens after {len(self._tokens)}, and {wanted} "
                f"new ones, exceed the model's context of {context}; take turns back, reset the chat, or ask for fewer"
            )
        return wanted

    # ------------------------------------------------------------ the sequence

    def _append(self, turn: _Prepared) -> int:
        """Adds a turn to the sequence, to be read later; its first position."""
        start = len(self._tokens)
        self._tokens += turn.tokens
        self._sources += turn.sources
        self._images += turn.images
        return start

    def _append_words(self, ids: Sequence[int]) -> None:
        self._tokens += ids
        self._sources += [-1] * len(ids)

    def _cut(self, start: int) -> None:
        """Leaves the first `start` positions."""
        del self._tokens[start:], self._sources[start:]
        queries = self.model.config.causal.queries
        del self._images[sum(source >= 0 for source in self._sources) // queries :]
        self._filled = min(self._filled, start)

    def _finish(self, start: int, message: tuple, read: int, answer: GeneratedText) -> None:
        """Closes the answer, which is in the sequence, and books the turn that began at `start`."""
        self._append_words([self.model.tokenizer.eos_id])
        self._starts.append(start)
        self._turns.append(Turn(message, answer, read))

    def _visual(self, first: int, last: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings float32 [1, length, D] of the images at positions first…last, and bool [1, length] where."""
        visual = np.zeros((1, length, self.model.config.llama.width), np.float32)
        is_visual = np.zeros((1, length), bool)
        queries = self.model.config.causal.queries
        for place, source in enumerate(self._sources[first:last]):
            if source >= 0:
                visual[0, place], is_visual[0, place] = self._images[source // queries][source % queries], True
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
        said = 0  # ids whose text the consumer has
        whole = False
        try:
            for token, score in self._decode(count, decoding, seed):
                scores.append(score)
                if token in ends:
                    ended_by = text.cut([token], ends)[1]
                    break
                ids.append(token)
                self._append_words([token])
                piece = "" if token in non_text_ids else "".join(string for _, string in detokenizer.add(token))
                if piece:
                    said = len(ids)
                    yield piece
            said, whole = len(ids), True
            if piece := "".join(string for _, string in detokenizer.end()):
                yield piece
        except Exception:  # whatever failed: nothing of this turn is kept
            said = 0
            raise
        finally:  # also where the consumer stops, or the user interrupts
            if whole or said:
                self._cut(first + said)
                total = sum(scores if whole else scores[:said])
                score = total / (1 + said) ** decoding.length_penalty
                words, why = self.model.tokenizer.decode(ids[:said]), ended_by if whole else "closed"
                answer = GeneratedText(words, ids[:said], float(score), why)
                self._finish(start, turn.message, read, answer)
            else:
                self._cut(start)
            self._stream = None

    def _decode(self, count: int, decoding: Decoding, seed: int) -> Iterator[tuple[int, float]]:
        """At most `count` tokens and their log p; who takes them appends them to the sequence before the next."""
        model = self.model
        static = {"config": model.config, "ends": model.ends}
        key = jax.random.key(seed)
        hidden = self._catch_up()
        token, score = _first(model.params, hidden, key, decoding, **static)
        for number in range(1, count + 1):
            yield int(token[0]), float(score[0])
            if number == count:
                break
            cache, self._cache = self._cache, None  # it is donated: an interruption loses it
            place = np.int32(self._filled)
            token, score, self._cache = _next(
                model.params, cache, place, token, np.int32(number), key, decoding, **static
            )
            self._filled += 1

    def _slots_filled(self) -> int:
        return self._filled if self._cache is not None else 0

    def _catch_up(self) -> Array:
        """Reads what the cache lacks of the sequence: the hidden state [1, D] of its last position."""
        model = self.model
        self._filled = self._slots_filled()
        if self._cache is None:
            self._cache = emu.bind(model.config, model.params).llama.init_cache(1, self._capacity, model.config.dtype)
        while (first := self._filled) < len(self._tokens):
            left = len(self._tokens) - first
            fitting = [size for size in PIECES if first + size <= self._capacity]
            size = min((size for size in fitting if size >= left), default=fitting[-1])
            last = first + min(left, size)
            tokens = np.full((1, size), model.tokenizer.pad_id, np.int32)
            tokens[0, : last - first] = self._tokens[first:last]
            visual, is_visual = self._visual(first, last, size)
            cache, self._cache = self._cache, None
            place, count = np.int32(first), np.int32(last - first)
            hidden, self._cache = _read(
                model.params, cache, place, tokens, visual, is_visual, count, config=model.config
            )
            self._filled = last
        return hidden

    def _search(self, turn: _Prepared, count: int, decoding: Decoding, beams: int) -> None:
        """A turn by beam search, whose cache is another one; the chat's reads the answer with the next turn."""
        model = self.model
        start = self._append(turn)
        try:
            length = len(self._tokens)
            padded = -(-length // LENGTH_BUCKET) * LENGTH_BUCKET
            tokens = np.full((1, padded), model.tokenizer.pad_id, np.int32)
            tokens[0, padded - length :] = self._tokens
            visual, is_visual = (np.roll(x, padded - length, axis=1) for x in self._visual(0, length, padded))
            words = model.params["llama"]["embed"]["embedding"][tokens].astype(jnp.float32)
            inputs = jnp.where(is_visual[..., None], visual, words)
            valid = jnp.arange(padded)[None] >= padded - length
            static = {"config": model.config, "ends": model.ends, "max_new_tokens": count, "beams": beams}
            found, scores = text.beam_search(model.params, inputs, valid, decoding, **static)
            ids, ended_by = text.cut(np.asarray(found)[0].tolist(), model.ends)
        except BaseException:
            self._cut(start)
            raise
        self._append_words(ids)
        answer = GeneratedText(model.tokenizer.decode(ids), ids, float(scores[0]), ended_by)
        self._finish(start, turn.message, length, answer)


def read_message(model: Emu, message: Sequence[str | ImageLike | Video], where: str) -> tuple[list[Text | Image], int]:
    """A user's message -> its texts and images as training has them, and how many videos it shows.

    Raises:
      UserError: it is empty, or something in it cannot be read.
    """
    parts: list[Text | Image] = []
    videos = 0
    for part in message:
        if isinstance(part, str):
            part = clean(part, where, strip=False)
            if parts and isinstance(parts[-1], Text):
                part = parts[-1].text + part
                del parts[-1]
            parts.append(Text(part, "user"))
            continue
        if isinstance(part, Video) or (isinstance(part, Path) and part.suffix.lower() in VIDEO_SUFFIXES):
            video = part if isinstance(part, Video) else Video(part)
            images, videos = read_video(video), videos + 1
        else:
            images = [part]
        parts += [Image(read_image(image, model.config.vision.image_size, where), "") for image in images]
    # White space around texts is left out, as `data/raw/chats.py` does.
    parts = [Text(part.text.strip(), "user") if isinstance(part, Text) else part for part in parts]
    if not any(isinstance(part, Image) or part.text for part in parts):
        raise UserError(f"{where}: the message is empty; expected a text, an image or a video")
    if isinstance(parts[-1], Image):
        parts.append(Text("", "user"))  # whose turn the image belongs to
    return parts, videos


def default_system(parts: Sequence[Text | Image], videos: int) -> str:
    """The paper's system message for a conversation whose first message has these parts; "" without images."""
    return VIDEO_SYSTEM if videos else IMAGE_SYSTEM if any(isinstance(part, Image) for part in parts) else ""


def read_video(video: Video) -> Sequence[ImageLike]:
    """A video's images.

    Raises:
      UserError: no video, a cut one, or one without the wanted frames.
    """
    if not isinstance(video.source, Path):
        if isinstance(video.source, str) or not len(video.source):
            raise UserError(f"Video({video.source!r}): expected a pathlib.Path or a list of images")
        return list(video.source)
    if video.frames < 1:
        raise UserError(f"{video.source}: frames={video.frames}; expected at least 1")
    try:
        from emu_jax.data.video import VideoError, read_frames
    except ModuleNotFoundError as error:
        raise UserError(f"{video.source}: videos are read by PyAV, which is missing; pip install av") from error
    if not video.source.is_file():
        raise UserError(f"{video.source}: no such video file")
    try:
        return read_frames(video.source, video.frames)
    except VideoError as error:
        raise UserError(f"{video.source}: {error.detail}; expected a whole video or animation") from error
    except OSError as error:
        raise UserError(f"{video.source}: cannot be read ({error.strerror})") from error


def clean(text: str, where: str, *, strip: bool = True) -> str:
    """Text as training takes it (`data/raw/files.py`): without NULs and white space around it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: not Unicode text ({error.reason} at character {error.start})") from error
    text = text.replace("\0", "")
    return text.strip() if strip else text


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _read(
    params: emu.Params,
    cache: KVCache,
    place: Array,
    tokens: Array,
    visual: Array,
    is_visual: Array,
    count: Array,
    *,
    config: emu.EmuConfig,
) -> tuple[Array, KVCache]:
    """Writes the first `count` of T positions into the slots from `place` on: the last one's hidden state [1, D].

    tokens int32 [1, T], visual float32 [1, T, D] where is_visual bool [1, T].
    """
    llama = emu.bind(config, params).llama
    offsets = jnp.arange(tokens.shape[1])[None]  # [1, T]
    inputs = jnp.where(is_visual[..., None], visual, llama.embed(tokens).astype(jnp.float32)).astype(config.dtype)
    cache = dataclasses.replace(cache, index=place)
    hidden, cache = llama.decode(inputs, place + offsets, cache, offsets < count)
    return jnp.take(hidden, count - 1, axis=1), cache


@functools.partial(jax.jit, static_argnames=("config", "ends"))
def _first(
    params: emu.Params, hidden: Array, key: Array, decoding: Decoding, *, config: emu.EmuConfig, ends: Ends
) -> tuple[Array, Array]:
    """hidden [1, D] -> the answer's first token int32 [1] and its log p [1]."""
    return text.choose(emu.bind(config, params).llama, hidden, jnp.zeros((), jnp.int32), key, decoding, ends)


@functools.partial(jax.jit, static_argnames=("config", "ends"), donate_argnames="cache")
def _next(
    params: emu.Params,
    cache: KVCache,
    place: Array,
    token: Array,
    count: Array,
    key: Array,
    decoding: Decoding,
    *,
    config: emu.EmuConfig,
    ends: Ends,
) -> tuple[Array, Array, KVCache]:
    """Writes the answer's token int32 [1] into slot `place`: the next one after `count`, its log p, the cache."""
    llama = emu.bind(config, params).llama
    inputs = llama.embed(token[:, None]).astype(config.dtype)  # [1, 1, D]
    cache = dataclasses.replace(cache, index=place)
    hidden, cache = llama.decode(inputs, place[None, None], cache)
    return *text.choose(llama, hidden[:, 0], count, key, decoding, ends), cache
