"""The one thread that computes: requests wait in three bounded queues and are batched continuously.

    async ──submit──▶ text queue ───▶ ContinuousBatcher of the chat model       one turn: prefill new texts, decode in
                                 └──▶ ContinuousBatcher of the plain model      all slots, begin new images, one U-Net
                      image queue ──▶ ImageBatcher of the plain model           call for all slots, embed a few inputs
                  embedding queue ──▶ PromptBatcher of the plain model
    async ◀──pieces, progress, result── Ticket

A model with separate adapters uses them in chats. It completes documents and draws without them, as pretrained.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from emu_jax.data.tokenizer import IncrementalDetokenizer
from emu_jax.generate.decoder import GeneratedImage
from emu_jax.generate.model import Emu
from emu_jax.generate.prompt import Prompt
from emu_jax.generate.text import Decoding, EndedBy, truncate_at_end
from emu_jax.serve.continuous_batching import PREFILL_BATCH_SIZES, ContinuousBatcher, TextRequest
from emu_jax.serve.decoders import Decoders
from emu_jax.serve.encoded_prompt import EncodedPrompt, Message, can_chat, encode_continuation, encode_conversation
from emu_jax.serve.image_batching import ImageBatcher, ImageRequest
from emu_jax.serve.limits import Limits
from emu_jax.serve.prompt_batching import IMAGE_BATCH_SIZES, PromptBatcher
from emu_jax.serve.settings import DrawSettings, TextSettings
from emu_jax.serve.stop_strings import StopStrings
from emu_jax.serve.ticket import Busy, Failed, Stopping, Ticket, TimeUp
from emu_jax.serve.token_scores import ScoredToken, Scores, by_token, scored_tokens

log = logging.getLogger(__name__)

MAX_FAULTS = 3  # consecutive failed turns after which the server is unhealthy

END = object()  # of an iterator


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished text.

    Attributes:
      prompt_tokens, new_tokens: numbers of tokens; the token that ended the text is not a new one.
      ended_by: as in `GeneratedText`, or "stop" at a stop string, which is not in the text.
      tokens: the text's tokens, if `TextSettings.scored`.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    ended_by: EndedBy | Literal["stop"]
    tokens: tuple[ScoredToken, ...] = ()


@dataclasses.dataclass(eq=False)
class _TextJob:
    """A waiting or running text; `lane` is the index of its batcher."""

    ticket: Ticket[str, Completion]
    request: TextRequest
    lane: int
    detokenizer: IncrementalDetokenizer
    until_image: bool
    stops: StopStrings
    ids: list[int] = dataclasses.field(default_factory=list)
    pieces: list[str] = dataclasses.field(default_factory=list)
    scores: list[Scores] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class _ImageJob:
    """A waiting or running image."""

    ticket: Ticket[tuple[int, int], GeneratedImage]
    request: ImageRequest


@dataclasses.dataclass(eq=False)
class _EmbeddingJob:
    """A waiting or running input to embed: an image (lane 0), or a prompt whose image is imagined (lane 1)."""

    ticket: Ticket[None, np.ndarray]
    prompt: EncodedPrompt
    lane: int


_Job = _TextJob | _ImageJob | _EmbeddingJob


@dataclasses.dataclass
class Counts:
    """Counters of an engine since its start."""

    texts: int = 0
    tokens: int = 0
    images: int = 0
    embeddings: int = 0
    refused: int = 0
    cancelled: int = 0
    timed_out: int = 0
    failed: int = 0


class Engine:
    """A model that serves many requests at a time. Call `start` before use and `close` after; or use `async with`.

    Attributes:
      compiled: set once all programs are compiled.
      decoders: decode the images of requests, in processes of their own.
    """

    def __init__(self, model: Emu, limits: Limits | None = None):
        self.limits = limits or Limits()
        self.decoders = Decoders(self.limits)
        # Adapters are merged for chats and dropped for everything else: two models of one shape and one compilation.
        # They cannot be merged into integer kernels; such models chat with separate adapters.
        self.chats = can_chat(model)
        adapted = model.config.llama.lora_rank > 0
        self.plain = model.without_adapters() if adapted else model
        chat = model if not adapted or model.config.llama.quantised else model.merged()
        models = [chat, self.plain] if adapted and self.chats else [self.plain]
        self._lanes = [ContinuousBatcher(each, self.limits.text_slots) for each in models]
        self._chat_model, self._chat_lane, self._plain_lane = chat, 0, len(models) - 1
        self._images: ImageBatcher | None = None
        if model.decoder is not None:
            self._images = ImageBatcher(self.plain, self.limits.drawing_slots, chat_model=chat if self.chats else None)
        self.counts = Counts()
        self._lock = threading.Condition()
        self._text_queue: collections.deque[_TextJob] = collections.deque()
        self._image_queue: collections.deque[_ImageJob] = collections.deque()
        self._texts: list[dict[int, _TextJob]] = [{} for _ in self._lanes]  # running, by slot
        self._drawings: dict[int, _ImageJob] = {}  # running, by slot
        self._embedder = PromptBatcher(self.plain) if self._images is None else self._images.prompts
        self._embedding_queue: collections.deque[_EmbeddingJob] = collections.deque()
        self._embedding: list[_EmbeddingJob] = []  # running
        self.compiled = threading.Event()
        self._warm_up = self._compile_all()
        self._stopping = False
        self._faults = 0
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------ life cycle

    @property
    def draws(self) -> bool:
        """Whether the model has a visual decoder."""
        return self._images is not None

    @property
    def healthy(self) -> bool:
        """Whether requests are being computed."""
        return self._thread is not None and self._thread.is_alive() and self._faults < MAX_FAULTS

    def waiting(self) -> dict[str, int]:
        """Number of waiting requests by kind."""
        return {
            "text": len(self._text_queue),
            "image": len(self._image_queue),
            "embedding": len(self._embedding_queue),
        }

    def running(self) -> dict[str, int]:
        """Number of running requests by kind."""
        return {
            "text": sum(map(len, self._texts)),
            "image": len(self._drawings),
            "embedding": len(self._embedding),
        }

    def start(self) -> None:
        """Starts the engine's thread. While no request waits, it compiles the programs that are still missing."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self, seconds: float = 10.0) -> None:
        """Refuses new requests, and gives running ones so many seconds to end."""
        with self._lock:
            self._stopping = True
            self._cancel_at = time.monotonic() + seconds
            self._lock.notify()
        if self._thread is not None:
            self._thread.join()
        self.decoders.close()

    async def __aenter__(self) -> Engine:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    # ------------------------------------------------------------ requests

    async def chat(self, messages: Sequence[Message], settings: TextSettings) -> Ticket[str, Completion]:
        """The answer to a conversation; events are pieces of text.

        Raises:
          UserError: a request that cannot work. Busy, Stopping: try again later.
        """
        settings.check(self.limits)
        prompt = await asyncio.to_thread(encode_conversation, self._chat_model, messages)
        return self._submit_text(prompt, settings, self._chat_lane)

    async def complete(self, prompt: Prompt, settings: TextSettings) -> Ticket[str, Completion]:
        """The continuation of texts and images; events are pieces of text. Raises: as `chat`."""
        settings.check(self.limits)
        encoded = await asyncio.to_thread(encode_continuation, self.plain, prompt)
        return self._submit_text(encoded, settings, self._plain_lane)

    async def draw(self, prompt: Prompt, settings: DrawSettings) -> Ticket[tuple[int, int], GeneratedImage]:
        """The image that follows a prompt; events are (U-Net calls made, calls in total). Raises: as `chat`."""
        settings.check(self.limits, self.plain)
        encoded = await asyncio.to_thread(encode_continuation, self.plain, prompt, draws=True)
        return self._submit_image(encoded, settings)

    async def draw_answer(
        self, messages: Sequence[Message], text: str, settings: DrawSettings
    ) -> Ticket[tuple[int, int], GeneratedImage]:
        """The image that the model began after `text`, in its answer to a conversation; events as of `draw`.

        Raises: as `chat`.
        """
        settings.check(self.limits, self._chat_model)
        model = self._chat_model
        encoded = await asyncio.to_thread(encode_conversation, model, messages, drawn_after=text)
        encoded.check_room(model.config.llama.context, model.config.causal.queries)
        return self._submit_image(encoded, settings, is_chat=True)

    async def embed(self, prompt: Prompt) -> Ticket[None, Float[np.ndarray, "Q D"]]:
        """Embeddings of one image, as the model sees it, or of the image that it imagines after any other prompt.

        Both are float32 [Q, D] and of one space, in which the model regresses and from which its decoder draws. They
        come from the model without adapters. Raises: as `chat`.
        """
        is_image = len(prompt) == 1 and not isinstance(prompt[0], str)
        encoded = await asyncio.to_thread(encode_continuation, self.plain, prompt, draws=not is_image)
        self.limits.check_images(len(encoded.images))
        job = _EmbeddingJob(Ticket(self.limits.seconds), encoded, 0 if is_image else 1)
        self._submit(self._embedding_queue, job)
        return job.ticket

    def _submit_image(
        self, prompt: EncodedPrompt, settings: DrawSettings, *, is_chat: bool = False
    ) -> Ticket[tuple[int, int], GeneratedImage]:
        self.limits.check_images(len(prompt.images))
        request = ImageRequest(prompt, settings.sampler, settings.steps, settings.guidance, settings.seed, is_chat)
        job = _ImageJob(Ticket(self.limits.seconds), request)
        self._submit(self._image_queue, job)
        return job.ticket

    def _submit_text(self, prompt: EncodedPrompt, settings: TextSettings, lane: int) -> Ticket[str, Completion]:
        self.limits.check_images(len(prompt.images))
        max_new_tokens = prompt.max_new_tokens(self.plain.config.llama.context, settings.max_new_tokens)
        max_new_tokens = min(max_new_tokens, self.limits.new_tokens)
        decoding = Decoding(settings.min_length, 1.0, settings.temperature, settings.top_k, settings.top_p)
        request = TextRequest(prompt, decoding, max_new_tokens, settings.seed, settings.scored)
        detokenizer, stops = self.plain.tokenizer.detokenizer(), StopStrings(settings.stop)
        job = _TextJob(Ticket(self.limits.seconds), request, lane, detokenizer, settings.until_image, stops)
        self._submit(self._text_queue, job)
        return job.ticket

    def _submit(self, queue: collections.deque, job: _Job) -> None:
        with self._lock:
            if self._stopping or not self.healthy:
                raise Stopping("the server is stopping; try again later")
            if len(queue) >= self.limits.waiting:
                self._purge(queue)
            if len(queue) >= self.limits.waiting:
                self.counts.refused += 1
                raise Busy(f"{len(queue)} requests are waiting already; try again in a few seconds")
            queue.append(job)
            self._lock.notify()

    # ------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        while True:
            with self._lock:
                while self.compiled.is_set() and not (self._stopping or self._has_work()):
                    self._lock.wait()
                if self._stopping and (time.monotonic() > self._cancel_at or not self._has_work()):
                    break
                idle = not self._has_work()
            try:
                if not idle:
                    self._turn()
                elif next(self._warm_up, END) is END:
                    self.compiled.set()
                self._faults = 0
            except Exception as error:  # whatever XLA raises, the present requests fail and later ones are served
                log.exception("the model failed")
                self._faults += 1
                self._fail_all(Failed(f"the model failed ({type(error).__name__})"))
                if self._faults >= MAX_FAULTS:
                    break
        with self._lock:
            self._stopping = True
        self._fail_all(Stopping("the server stopped"))

    def _compile_all(self) -> Iterator[None]:
        """Compiles the programs of all batchers, some before each yield."""
        began = time.monotonic()
        for lane in self._lanes:
            yield from lane.warm_up()
        if self._images is not None:
            yield from self._images.warm_up()
        else:
            yield from self._embedder.warm_up(self.limits.drawing_slots)
        log.info("all programs are compiled, after %.0f s", time.monotonic() - began)

    def _has_work(self) -> bool:
        queues = (self._text_queue, self._image_queue, self._embedding_queue)
        return any(queues) or any(self._texts) or bool(self._drawings)

    def _fail_all(self, error: Exception) -> None:
        """Ends all waiting and running requests with an error, and clears the slots."""
        with self._lock:
            jobs: list[_Job] = [*self._drawings.values(), *self._embedding]
            jobs += [job for texts in self._texts for job in texts.values()]
            for queue in (self._text_queue, self._image_queue, self._embedding_queue):
                jobs += queue
                queue.clear()
        self._texts, self._drawings, self._embedding = [{} for _ in self._lanes], {}, []
        self.counts.failed += len(jobs)
        for job in jobs:
            job.ticket.fail(error)
        if isinstance(error, Failed):
            for lane in self._lanes:
                lane.clear()
            if self._images is not None:
                self._images.clear()

    def _turn(self) -> None:
        with self._lock:
            for queue in (self._text_queue, self._image_queue, self._embedding_queue):
                self._purge(queue)
        for lane in range(len(self._lanes)):
            self._prefill(lane)
            self._decode(lane)
        if self._images is not None:
            self._begin_images(self._images)
            self._step_images(self._images)
        self._embed()

    def _has_ended(self, job: _Job) -> bool:
        """Whether a request was cancelled or is late; ends it if so."""
        if job.ticket.cancelled:
            self.counts.cancelled += 1
            job.ticket.fail(Stopping("the request was cancelled"))
            return True
        if time.monotonic() > job.ticket.deadline:
            self.counts.timed_out += 1
            job.ticket.fail(TimeUp(f"the request took longer than {self.limits.seconds:g} seconds"))
            return True
        return False

    def _purge(self, queue: collections.deque) -> None:
        """Removes cancelled and late requests from a queue; the caller holds the lock."""
        kept = [job for job in queue if not self._has_ended(job)]
        queue.clear()
        queue.extend(kept)

    def _take(self, queue: collections.deque, count: int, lane: int | None = None) -> list:
        """Takes the first requests of a lane from a queue."""
        with self._lock:
            taken = [job for job in queue if lane is None or job.lane == lane][:count]
            for job in taken:
                queue.remove(job)
        return taken

    def _release_ended(self, batcher: ContinuousBatcher | ImageBatcher, running: dict[int, Any]) -> None:
        """Frees the slots of cancelled and late requests."""
        for slot in [slot for slot, job in running.items() if self._has_ended(job)]:
            batcher.release(slot)
            del running[slot]

    def _prefill(self, lane: int) -> None:
        """Moves waiting texts into free slots."""
        batcher, texts = self._lanes[lane], self._texts[lane]
        self._release_ended(batcher, texts)
        while self._text_queue and (free := [slot for slot in batcher.free if slot not in texts]):
            jobs = self._take(self._text_queue, min(len(free), PREFILL_BATCH_SIZES[-1]), lane)
            if not jobs:
                return
            slots = free[: len(jobs)]
            texts.update(zip(slots, jobs, strict=True))  # before the call, so that an error reaches them
            first = batcher.prefill(slots, [job.request for job in jobs])
            for row, (slot, token) in enumerate(zip(slots, first, strict=True)):
                self._add_tokens(lane, slot, [token], row)

    def _decode(self, lane: int) -> None:
        """Decodes a few tokens in all slots."""
        texts = self._texts[lane]
        if texts:
            tokens = self._lanes[lane].decode()  # [n, B]
            for slot in list(texts):
                self._add_tokens(lane, slot, [token for token in tokens[:, slot].tolist() if token >= 0], slot)

    def _add_tokens(self, lane: int, slot: int, ids: list[int], row: int) -> None:
        """Emits the text of new tokens, and finishes the request at its end; `row` is where the call has its scores."""
        job, tokenizer = self._texts[lane][slot], self.plain.tokenizer
        ends = (tokenizer.eos_id, tokenizer.img_id) if job.until_image else self._lanes[lane].model.ends
        ids, ended = truncate_at_end(ids, ends)
        non_text_ids, stops = tokenizer.non_text_ids, job.stops
        text, before = "", len(job.ids)
        for id in ids:
            if stops.found:
                break
            job.ids.append(id)
            if id not in non_text_ids:
                text += "".join(stops.add(piece) for _, piece in job.detokenizer.add(id))
        self.counts.tokens += len(job.ids) - before
        if job.request.scored:
            job.scores += by_token(self._lanes[lane].scores, row)[: len(job.ids) - before]
        finished = stops.found or ended != "length" or len(job.ids) >= job.request.max_new_tokens
        if finished:
            text += "".join(stops.add(piece) for _, piece in job.detokenizer.end()) + stops.end()
        if text:
            job.pieces.append(text)
            job.ticket.emit(text)
        if finished:
            self.counts.texts += 1
            prompt_tokens = len(job.request.prompt.tokens)
            whole = "".join(job.pieces)
            scored: tuple[ScoredToken, ...] = ()
            if job.request.scored:
                scored = scored_tokens(tokenizer, whole, job.ids, job.scores, stopped=stops.found)
            ended_by: EndedBy | Literal["stop"] = "stop" if stops.found else ended
            job.ticket.finish(Completion(whole, prompt_tokens, len(job.ids), ended_by, scored))
            self._lanes[lane].release(
                slot
            )  # needed where `until_image` or a stop string ended it, no end for the batcher
            del self._texts[lane][slot]

    def _begin_images(self, batcher: ImageBatcher) -> None:
        """Moves waiting images into free slots."""
        self._release_ended(batcher, self._drawings)
        free = batcher.free
        if jobs := self._take(self._image_queue, len(free)) if self._image_queue and free else []:
            slots = free[: len(jobs)]
            self._drawings.update(zip(slots, jobs, strict=True))
            batcher.begin(slots, [job.request for job in jobs])

    def _step_images(self, batcher: ImageBatcher) -> None:
        """One U-Net call for all slots."""
        if not self._drawings:
            return
        for slot, (made, calls) in batcher.step().items():
            job = self._drawings[slot]
            job.ticket.emit((made, calls))
            if made == calls:
                self.counts.images += 1
                job.ticket.finish(batcher.finish(slot))
                del self._drawings[slot]

    def _embed(self) -> None:
        """Embeds the next images, and imagines the next prompts' images, as many as one call takes."""
        for lane, count in ((0, IMAGE_BATCH_SIZES[-1]), (1, self.limits.drawing_slots)):
            self._embedding = jobs = self._take(self._embedding_queue, count, lane)  # an error reaches them
            if not jobs:
                continue
            prompts = [job.prompt for job in jobs]
            if lane == 0:
                embedded = [image for (image,) in self._embedder.encode_images(prompts)]
            else:
                embedded = list(
                    self._embedder.generate_embeddings(prompts, [0] * len(prompts), self.limits.drawing_slots)
                )
            self.counts.embeddings += len(jobs)
            for job, each in zip(jobs, embedded, strict=True):
                job.ticket.finish(each)
            self._embedding = []
