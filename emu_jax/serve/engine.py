"""The one thread that computes: requests wait in two bounded queues, and run together.

    async ──submit──▶ waiting texts ────▶ TextSlots of the chat model     one turn: read new texts, go on in all slots,
                      waiting texts ────▶ TextSlots of the plain model    begin new images, one U-Net call for all
                      waiting images ─▶ Canvas of the plain model
    async ◀──pieces, progress, result── Ticket

A model with adapters beside its weights chats with them, and writes and draws without: as it was pretrained.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Ordered
from typing import Any, Generic, TypeVar

from emu_jax.data.tokenizer import IncrementalDetokenizer
from emu_jax.generate.model import Emu, GeneratedImage, check_decoding
from emu_jax.generate.prompt import Prompt
from emu_jax.generate.text import Decoding, EndedBy, cut
from emu_jax.serve import sequences
from emu_jax.serve.canvas import Canvas, Drawing
from emu_jax.serve.limits import Limits
from emu_jax.serve.sequences import Message
from emu_jax.serve.slots import READ_TOGETHER, Start, TextSlots

log = logging.getLogger(__name__)

FAULTS = 3  # turns that fail one after the other until the server counts as broken

Event = TypeVar("Event")  # what is told while a request runs
Result = TypeVar("Result")


class Busy(Exception):
    """The queue is full."""


class Stopping(Exception):
    """The server stops: nothing new is taken, or what ran was given up."""


class TimeUp(Exception):
    """The request took longer than `Limits.seconds`."""


class Failed(Exception):
    """The model failed; the log has why."""


@dataclasses.dataclass(frozen=True)
class Written:
    """A text that is written.

    Attributes:
      prompt_tokens, new_tokens: as the model counts them, what ended the text not among the new ones.
      ended_by: as `GeneratedText` has it.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    ended_by: EndedBy


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """How a text is written; see `Emu.generate_text`.

    Attributes:
      max_new_tokens: None: what the context leaves, at most 256.
      until_image: it also ends where a model writes [IMG] that has not learnt to (`Emu.ends`).
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_length: int = 1
    seed: int = 0
    until_image: bool = False

    def check(self, limits: Limits) -> None:
        """Raises UserError for settings that cannot work, or lie beyond the limits."""
        limits.check("max_tokens", 1 if self.max_new_tokens is None else self.max_new_tokens, 1, limits.new_tokens)
        limits.check("temperature", self.temperature, 0, 100)
        limits.check("top_k", self.top_k, 0, 1_000_000)
        limits.check("min_length", self.min_length, 0, limits.new_tokens)
        limits.check("seed", self.seed, 0, 2**32 - 1)
        check_decoding(1, 1, self.temperature, self.top_p)


@dataclasses.dataclass(frozen=True)
class DrawSettings:
    """How an image is drawn; see `Emu.generate_image`."""

    sampler: str = "pndm"
    steps: int = 50
    guidance: float = 7.5
    seed: int = 0

    def check(self, limits: Limits, model: Emu) -> None:
        """Raises UserError for settings that cannot work, or lie beyond the limits."""
        limits.check("steps", self.steps, 1, limits.steps)
        limits.check("guidance", self.guidance, -limits.guidance, limits.guidance)
        limits.check("seed", self.seed, 0, 2**32 - 1)
        model.check_drawing(self.sampler, self.steps, self.guidance)


class Ticket(Generic[Event, Result]):
    """A request that waits or runs. `async for event in ticket` tells how it goes, `await ticket.result()` ends it.

    Who leaves before its end calls `cancel`, which frees its place.
    """

    def __init__(self, seconds: float):
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._end: asyncio.Future[Result] = self._loop.create_future()
        self._end.add_done_callback(lambda end: end.cancelled() or end.exception())  # it need not be asked for
        self.submitted = time.monotonic()
        self.deadline = self.submitted + seconds
        self.cancelled = False

    def cancel(self) -> None:
        """Gives the request up; its place is free before anything else runs there."""
        self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[Event]:
        while (event := await self._events.get()) is not None:
            yield event

    async def result(self) -> Result:
        """What came out.

        Raises:
          TimeUp, Failed, Stopping: nothing did.
        """
        return await asyncio.shield(self._end)

    def tell(self, event: Event) -> None:
        """From the engine's thread."""
        self._call(self._events.put_nowait, event)

    def finish(self, result: Result) -> None:
        """From the engine's thread."""
        self._call(self._settle, lambda: self._end.set_result(result))

    def fail(self, error: Exception) -> None:
        """From the engine's thread."""
        self._call(self._settle, lambda: self._end.set_exception(error))

    def _settle(self, end: Callable[[], None]) -> None:
        if not self._end.done():
            end()
            self._events.put_nowait(None)

    def _call(self, function: Callable, *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody listens
            self.cancelled = True


@dataclasses.dataclass(eq=False)
class _Text:
    """A text that waits or runs."""

    ticket: Ticket[str, Written]
    start: Start
    lane: int
    detokenizer: IncrementalDetokenizer
    until_image: bool
    ids: list[int] = dataclasses.field(default_factory=list)
    said: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class _Image:
    """An image that waits or runs."""

    ticket: Ticket[tuple[int, int], GeneratedImage]
    drawing: Drawing


@dataclasses.dataclass
class Counts:
    """What an engine has done, since its start."""

    texts: int = 0
    tokens: int = 0
    images: int = 0
    refused: int = 0
    cancelled: int = 0
    timed_out: int = 0
    failed: int = 0


class Engine:
    """A model that answers many at a time. `start` before use, `close` at the end; `async with` does both."""

    def __init__(self, model: Emu, limits: Limits | None = None):
        self.limits = limits or Limits()
        # Adapters are added to the kernels for chats, and left out for the rest: two models of one shape and one
        # compilation. Int8 kernels cannot take them in: those chat with the adapters beside.
        self.chats = sequences.chats(model)
        adapted = model.config.llama.lora_rank > 0
        self.plain = model.without_adapters() if adapted else model
        chat = model if not adapted or model.config.llama.int8 else model.merged()
        models = [chat, self.plain] if adapted and self.chats else [self.plain]
        self._lanes = [TextSlots(each, self.limits.text_slots) for each in models]
        self._chat_model, self._chat_lane, self._plain_lane = chat, 0, len(models) - 1
        self._canvas = Canvas(self.plain, self.limits.drawing_slots) if model.decoder is not None else None
        self.counts = Counts()
        self._lock = threading.Condition()
        self._texts: collections.deque[_Text] = collections.deque()
        self._images: collections.deque[_Image] = collections.deque()
        self._writing: list[dict[int, _Text]] = [{} for _ in self._lanes]
        self._drawing: dict[int, _Image] = {}
        self._stopping = False
        self._faults = 0
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------ life

    @property
    def draws(self) -> bool:
        """Whether the model has a visual decoder."""
        return self._canvas is not None

    @property
    def healthy(self) -> bool:
        """Whether requests are being computed."""
        return self._thread is not None and self._thread.is_alive() and self._faults < FAULTS

    def waiting(self) -> dict[str, int]:
        """Requests that wait, by kind."""
        return {"text": len(self._texts), "image": len(self._images)}

    def running(self) -> dict[str, int]:
        """Requests that run, by kind."""
        return {"text": sum(map(len, self._writing)), "image": len(self._drawing)}

    def start(self) -> None:
        """Compiles everything that requests need, and begins to take them."""
        began = time.monotonic()
        for lane in self._lanes:
            lane.warm_up()
        if self._canvas is not None:
            self._canvas.warm_up()
        log.info("compiled in %.0f s", time.monotonic() - began)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self, seconds: float = 10.0) -> None:
        """Takes nothing new, and gives what runs so long to end."""
        with self._lock:
            self._stopping = True
            self._give_up_at = time.monotonic() + seconds
            self._lock.notify()
        if self._thread is not None:
            self._thread.join()

    async def __aenter__(self) -> Engine:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    # ------------------------------------------------------------ requests

    async def chat(self, messages: Ordered[Message], settings: TextSettings) -> Ticket[str, Written]:
        """An answer to a conversation, in pieces of text.

        Raises:
          UserError: a request that cannot be done. Busy, Stopping: not now.
        """
        settings.check(self.limits)
        sequence = await asyncio.to_thread(sequences.conversation, self._chat_model, messages)
        return self._submit_text(sequence, settings, self._chat_lane)

    async def write(self, prompt: Prompt, settings: TextSettings) -> Ticket[str, Written]:
        """A prompt of texts and images gone on with, in pieces of text. Raises: as `chat`."""
        settings.check(self.limits)
        sequence = await asyncio.to_thread(sequences.continuation, self.plain, prompt)
        return self._submit_text(sequence, settings, self._plain_lane)

    async def draw(self, prompt: Prompt, settings: DrawSettings) -> Ticket[tuple[int, int], GeneratedImage]:
        """The image that follows a prompt; events are (U-Net calls made, in all). Raises: as `chat`."""
        settings.check(self.limits, self.plain)
        sequence = await asyncio.to_thread(sequences.continuation, self.plain, prompt, draws=True)
        drawing = Drawing(sequence, settings.sampler, settings.steps, settings.guidance, settings.seed)
        image = _Image(Ticket(self.limits.seconds), drawing)
        self._submit(self._images, image)
        return image.ticket

    def _submit_text(self, sequence: sequences.Sequence, settings: TextSettings, lane: int) -> Ticket[str, Written]:
        self.limits.check_images(len(sequence.images))
        limit = sequence.room(self.plain.config.llama.context, settings.max_new_tokens)
        decoding = Decoding(settings.min_length, 1.0, settings.temperature, settings.top_k, settings.top_p)
        start = Start(sequence, decoding, limit, settings.seed)
        detokenizer = self.plain.tokenizer.detokenizer()
        text = _Text(Ticket(self.limits.seconds), start, lane, detokenizer, settings.until_image)
        self._submit(self._texts, text)
        return text.ticket

    def _submit(self, queue: collections.deque, request: _Text | _Image) -> None:
        with self._lock:
            if self._stopping or not self.healthy:
                raise Stopping("the server is stopping; try again later")
            if len(queue) >= self.limits.waiting:
                self._purge(queue)
            if len(queue) >= self.limits.waiting:
                self.counts.refused += 1
                raise Busy(f"{len(queue)} requests are waiting already; try again in a few seconds")
            queue.append(request)
            self._lock.notify()

    # ------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (self._stopping or self._texts or self._images or self._writes() or self._drawing):
                    self._lock.wait()
                if self._stopping and (time.monotonic() > self._give_up_at or not self._busy()):
                    break
            try:
                self._turn()
                self._faults = 0
            except Exception as error:  # whatever XLA raises: its requests are told, the others go on
                log.exception("the model failed")
                self._faults += 1
                self._drop(Failed(f"the model failed ({type(error).__name__})"))
                if self._faults >= FAULTS:
                    break
        with self._lock:
            self._stopping = True
        self._drop(Stopping("the server stopped"))

    def _writes(self) -> bool:
        return any(self._writing)

    def _busy(self) -> bool:
        return bool(self._texts or self._images or self._writes() or self._drawing)

    def _drop(self, error: Exception) -> None:
        """Ends all that waits and runs with an error, and begins anew."""
        with self._lock:
            requests: list[_Text | _Image] = [*self._texts, *self._images, *self._drawing.values()]
            requests += [text for writing in self._writing for text in writing.values()]
            self._texts.clear()
            self._images.clear()
        self._writing, self._drawing = [{} for _ in self._lanes], {}
        self.counts.failed += len(requests)
        for request in requests:
            request.ticket.fail(error)
        if isinstance(error, Failed):
            for lane in self._lanes:
                lane.clear()
            if self._canvas is not None:
                self._canvas.clear()

    def _turn(self) -> None:
        with self._lock:
            self._purge(self._texts)
            self._purge(self._images)
        for number in range(len(self._lanes)):
            self._read(number)
            self._write(number)
        if self._canvas is not None:
            self._begin(self._canvas)
            self._step(self._canvas)

    def _gone(self, request: _Text | _Image) -> bool:
        """Whether nobody waits for a request any more, or not in time; then it is ended."""
        if request.ticket.cancelled:
            self.counts.cancelled += 1
            request.ticket.fail(Stopping("the request was given up"))
            return True
        if time.monotonic() > request.ticket.deadline:
            self.counts.timed_out += 1
            request.ticket.fail(TimeUp(f"the request took longer than {self.limits.seconds:g} seconds"))
            return True
        return False

    def _purge(self, queue: collections.deque) -> None:
        """Those that nobody waits for any more leave a queue. The lock is held."""
        kept = [request for request in queue if not self._gone(request)]
        queue.clear()
        queue.extend(kept)

    def _take(self, queue: collections.deque, count: int, lane: int | None = None) -> list:
        """The first requests of a queue, of one lane."""
        with self._lock:
            taken = [request for request in queue if lane is None or request.lane == lane][:count]
            for request in taken:
                queue.remove(request)
        return taken

    def _read(self, number: int) -> None:
        """Free slots take texts that wait."""
        lane, writing = self._lanes[number], self._writing[number]
        for slot, text in list(writing.items()):
            if self._gone(text):
                lane.release(slot)
                del writing[slot]
        while self._texts and (free := [slot for slot in lane.free if slot not in writing]):
            texts = self._take(self._texts, min(len(free), READ_TOGETHER[-1]), number)
            if not texts:
                return
            slots = free[: len(texts)]
            writing.update(zip(slots, texts, strict=True))  # so that an error finds them
            first = lane.read(slots, [text.start for text in texts])
            for slot, token in zip(slots, first, strict=True):
                self._add(number, slot, [token])

    def _write(self, number: int) -> None:
        lane, writing = self._lanes[number], self._writing[number]
        if writing:
            tokens = lane.write()  # [n, B]
            for slot in list(writing):
                self._add(number, slot, [token for token in tokens[:, slot].tolist() if token >= 0])

    def _add(self, number: int, slot: int, ids: list[int]) -> None:
        """New tokens of a text: tells them, and ends it where it ends."""
        text, tokenizer = self._writing[number][slot], self.plain.tokenizer
        ends = (tokenizer.eos_id, tokenizer.img_id) if text.until_image else self._lanes[number].model.ends
        ids, ended_by = cut(ids, ends)
        non_text_ids = tokenizer.non_text_ids
        pieces = [piece for id in ids if id not in non_text_ids for _, piece in text.detokenizer.add(id)]
        text.ids += ids
        self.counts.tokens += len(ids)
        over = ended_by != "length" or len(text.ids) >= text.start.limit
        if over:
            pieces += [piece for _, piece in text.detokenizer.end()]
        if said := "".join(pieces):
            text.said.append(said)
            text.ticket.tell(said)
        if over:
            self.counts.texts += 1
            prompt = len(text.start.sequence.tokens)
            text.ticket.finish(Written("".join(text.said), prompt, len(text.ids), ended_by))
            self._lanes[number].release(slot)  # [IMG] that is no end of the model's does not free it
            del self._writing[number][slot]

    def _begin(self, canvas: Canvas) -> None:
        """Free places take images that wait."""
        for place, image in list(self._drawing.items()):
            if self._gone(image):
                canvas.release(place)
                del self._drawing[place]
        free = canvas.free
        if images := self._take(self._images, len(free)) if self._images and free else []:
            places = free[: len(images)]
            self._drawing.update(zip(places, images, strict=True))
            canvas.begin(places, [image.drawing for image in images])

    def _step(self, canvas: Canvas) -> None:
        if not self._drawing:
            return
        for place, (made, calls) in canvas.step().items():
            image = self._drawing[place]
            image.ticket.tell((made, calls))
            if made == calls:
                self.counts.images += 1
                image.ticket.finish(canvas.finish(place))
                del self._drawing[place]
