"""Documents -> token sequences, cut if a document is longer than a row.

A document becomes `<s> text [IMG] <image>*Q [/IMG] text … </s>`; a chat becomes
`<s> system [USER]: question [ASSISTANT]: answer </s> [USER]: …`. Cuts teach nothing false: `</s>` is only present where
the document or an answer really ends, and every learnt answer comes after its question and images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from emu_jax.data.document import Document, Image, Text
from emu_jax.data.system_messages import SYSTEM_MESSAGES
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError

LEARNT_ROLES = ("", "assistant")  # roles whose texts are learnt and whose images are regression targets
CHAT_CUTS = ("turn", "drop")


@dataclasses.dataclass(frozen=True)
class TokenizedDocument:
    """One sequence of T positions: a document, or a piece of one that was too long for a row.

    Attributes:
      tokens: int32 [T].
      text_weights: float32 [T], weight of classifying this token from the position before it; 0 for the first token,
        [PAD], <image> and [/IMG], and for [IMG] unless it is learnt.
      visual_weights: float32 [T], weight of regressing this position's input embedding; 0 except at <image> and [/IMG].
      slots: int32 [T], index into `images` at every <image>, -1 elsewhere.
      continues: whether this is a later piece of a document that was cut.
      cut: whether something of the document after this piece was cut off.
      source: number of the document's source.
      record: index of its record there.
    """

    tokens: np.ndarray
    text_weights: np.ndarray
    visual_weights: np.ndarray
    slots: np.ndarray
    images: tuple[Image, ...]
    continues: bool = False
    cut: bool = False
    source: int = 0
    record: int = 0

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class _Span:
    """A text, which is divided only if it is longer than a row, or an image, which is never divided.

    Attributes:
      mark: tokens of the mark that begins a turn here, such as `[USER]:`; kept together with the first token after it.
      learnt: whether each token is a target of the classification.
      target: whether each token is a target of the regression.
      role: the speaker.
      opens: whether an exchange, a question with its answer, begins here.
    """

    mark: list[int]
    tokens: list[int]
    learnt: list[bool]
    target: list[bool]
    image: Image | None
    role: str
    opens: bool

    def __len__(self) -> int:
        return len(self.mark) + len(self.tokens)

    def part(self, first: int, last: int) -> _Span:
        """The span of tokens [first, last); the first of several parts keeps the mark."""
        fields = {name: getattr(self, name)[first:last] for name in ("tokens", "learnt", "target")}
        return dataclasses.replace(self, mark=[] if first else self.mark, **fields)

    def followed_by(self, token: int, learnt: bool) -> _Span:
        """The span with one more token."""
        return dataclasses.replace(
            self, tokens=[*self.tokens, token], learnt=[*self.learnt, learnt], target=[*self.target, False]
        )


class _Sequence:
    """A sequence under construction."""

    def __init__(self, spans: Iterable[_Span], tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.tokens, self._learnt, self._target, self._slots = [tokenizer.bos_id], [False], [False], [-1]
        self.images: list[Image] = []
        for span in spans:
            self.add(span)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, span: _Span, before: Iterable[_Span] = ()) -> None:
        """Appends a span; the spans `before` are put between its mark and its tokens."""
        self._append(span.mark, [False] * len(span.mark), [False] * len(span.mark), None)
        for image in before:
            self._append(image.tokens, image.learnt, image.target, image.image)
        self._append(span.tokens, span.learnt, span.target, span.image)

    def _append(self, tokens: list[int], learnt: list[bool], target: list[bool], image: Image | None) -> None:
        slots = [len(self.images) if token == self._tokenizer.image_id else -1 for token in tokens]
        self.tokens += tokens
        self._learnt += learnt
        self._target += target
        self._slots += slots if image is not None else [-1] * len(tokens)
        self.images += [image] if image is not None else []

    def finish(self, document: Document, source: int, continues: bool, cut: bool) -> TokenizedDocument:
        return TokenizedDocument(
            tokens=np.array(self.tokens, np.int32),
            text_weights=np.array(self._learnt, np.float32) * document.text_weight,
            visual_weights=np.array(self._target, np.float32) * document.visual_weight,
            slots=np.array(self._slots, np.int32),
            images=tuple(self.images),
            continues=continues,
            cut=cut,
            source=source,
        )


def tokenize_document(
    document: Document,
    tokenizer: Tokenizer,
    *,
    queries: int,
    row_tokens: int,
    row_images: int,
    source: int = 0,
    chat_cut: str = "turn",
    learn_image_token: bool = False,
    rng: np.random.Generator | None = None,
) -> list[TokenizedDocument]:
    """A document -> one sequence, several if it is longer than a row, or none if nothing of it can be learnt.

    >>> tokenizer = Tokenizer.train(["a red cat", "a blue cat"], vocab_size=7, model_type="word")
    >>> cat = Image(np.zeros((4, 4, 3), np.uint8), "cat.png")
    >>> (found,) = tokenize_document(Document((cat, Text("a cat"))), tokenizer, queries=2, row_tokens=16, row_images=1)
    >>> found.tokens.tolist()  # <s> [IMG] <image> <image> [/IMG] a cat </s>
    [1, 8, 10, 10, 9, 3, 4, 2]
    >>> found.text_weights.astype(int).tolist()
    [0, 0, 0, 0, 0, 1, 1, 1]
    >>> found.visual_weights.astype(int).tolist()
    [0, 0, 1, 1, 1, 0, 0, 0]

    A document is cut between texts and images, as late as possible; only a text that is longer than a row is cut
    between tokens. Every piece begins with <s>; only the last one ends in </s>. A document with a `window` gives one
    piece of at most a row, which begins at random. `max_tokens` truncates a document in the same way.

    A chat is cut only before a [USER] mark. A later piece repeats the system message and, after its first [USER] mark,
    all images of the chat so far, because its questions may refer to them. An answer that is longer than a row is
    truncated, without </s>. A question that does not fit a row with its images is left out together with its answer. A
    question without an answer is left out if it does not fit the piece before it. (The prompts are the reference's; the
    </s> after every answer and the rules for cuts are inferred.)

    Args:
      queries: Q, embeddings per image.
      row_tokens, row_images: S and I, the capacity of a row.
      source: number of the document's source.
      chat_cut: "turn" cuts chats as described; "drop" leaves out everything after the first cut.
      learn_image_token: label [IMG] from the position before it, so that the model learns when an image comes.
      rng: draws the window of a document that has one.

    Raises:
      UserError: a row cannot hold one image, or the tokenizer lacks the tokens of chats.
    """
    if row_tokens < queries + 4 or row_images < 1:
        raise UserError(
            f"config.data.row_tokens={row_tokens}, row_images={row_images}: a row must hold <s>, one image of "
            f"{queries + 2} tokens and </s>: at least {queries + 4} tokens and 1 image"
        )
    spans = _spans(document, tokenizer, queries, learn_image_token)
    row = (row_tokens, row_images)
    whole = 1 + sum(map(len, spans)) <= min(row_tokens, document.max_tokens or row_tokens)
    if whole and sum(span.image is not None for span in spans) <= row_images:
        pieces, cut = [_Sequence(spans, tokenizer)], [False]
    elif any(span.opens for span in spans):
        pieces, cut = _cut_chat(spans, tokenizer, row, once=chat_cut == "drop")
    else:
        pieces, cut = _cut_plain(spans, tokenizer, row, document.max_tokens, rng if document.window else None)
    found = enumerate(zip(pieces, cut, strict=True))
    return [piece.finish(document, source, number > 0, more) for number, (piece, more) in found]


# ---- a document's spans ----------------------------------------------------------------------------------------------


def _spans(document: Document, tokenizer: Tokenizer, queries: int, learn_image_token: bool) -> list[_Span]:
    """The spans after <s>; the last one includes the final </s>."""
    spans: list[_Span] = []
    turns, role, asked, learns = _turns(document), "", False, True
    for index, part in enumerate(document.parts):
        role = turns[index] or role
        asked |= role == "user"
        learns = role in LEARNT_ROLES and (asked or not role)  # no answer without its question
        mark = tokenizer.turn_ids(turns[index]) if turns[index] else []
        if isinstance(part, Text):
            ids = _text_ids(document, index, part, tokenizer)
            span = _Span(mark, ids, [learns] * len(ids), [False] * len(ids), None, role, turns[index] == "user")
            if role == "assistant" and index + 1 < len(turns) and turns[index + 1]:
                span = span.followed_by(tokenizer.eos_id, learns)
        else:
            ids = [tokenizer.img_id, *[tokenizer.image_id] * queries, tokenizer.img_end_id]
            learnt = [learns and learn_image_token, *[False] * (queries + 1)]
            target = [False, *[learns] * (queries + 1)]
            span = _Span(mark, ids, learnt, target, part, role, turns[index] == "user")
        spans.append(span)
    if not spans:
        spans.append(_Span([], [], [], [], None, "", False))
    spans[-1] = spans[-1].followed_by(tokenizer.eos_id, learns)
    return spans


def _text_ids(document: Document, index: int, part: Text, tokenizer: Tokenizer) -> list[int]:
    """Ids of `part`, the text at `index`. Like the reference, it strips white space beside images."""
    text, role = part.text, part.role
    if role == "system" and text in SYSTEM_MESSAGES:
        return tokenizer.encode(text, add_bos=False)
    if index > 0 and isinstance(document.parts[index - 1], Image):
        text = text.lstrip()
    if index + 1 < len(document.parts) and isinstance(document.parts[index + 1], Image):
        text = text.rstrip()
    return tokenizer.encode_plain(text)


def _turns(document: Document) -> list[str]:
    """For each part, the role whose turn begins there, or "". An image belongs to the turn of the text after it."""
    roles, role = [], ""
    for part in reversed(document.parts):
        role = part.role if isinstance(part, Text) else role
        roles.append(role)
    roles.reverse()
    return [role if role != before else "" for before, role in zip(["", *roles], roles, strict=False)]


# ---- cuts ------------------------------------------------------------------------------------------------------------


def _cut_plain(
    spans: list[_Span], tokenizer: Tokenizer, row: tuple[int, int], max_tokens: int, rng: np.random.Generator | None
) -> tuple[list[_Sequence], list[bool]]:
    """Pieces of a document without turns, and whether something was cut off after each. `rng` draws one window."""
    row_tokens, row_images = row
    truncated = False
    if max_tokens:
        spans, truncated = _truncated(spans, max_tokens - 1)
    spans = [part for span in spans for part in _divided(span, row_tokens - 1)]
    begin = 0
    if rng is not None:
        begin = int(rng.integers(_last_window(spans, row_tokens - 1, row_images) + 1))
    pieces = [_Sequence([], tokenizer)]
    for place in range(begin, len(spans)):
        span, piece = spans[place], pieces[-1]
        full = len(piece.images) == row_images and span.image is not None
        if full or len(piece) + len(span) > row_tokens:
            if rng is not None:
                return pieces, [True]
            pieces.append(_Sequence([], tokenizer))
        pieces[-1].add(span)
    return pieces, [True] * (len(pieces) - 1) + [truncated]


def _truncated(spans: list[_Span], room: int) -> tuple[list[_Span], bool]:
    """The first `room` tokens, without an image that would be divided; and whether something was left out."""
    kept: list[_Span] = []
    for span in spans:
        if len(span) > room:
            if span.image is None and room:
                kept.append(span.part(0, room))
            elif span.image is not None and len(span) == room + 1 and span is spans[-1]:
                kept.append(span.part(0, room))  # all but </s>
            return kept, True
        kept.append(span)
        room -= len(span)
    return kept, False


def _divided(span: _Span, room: int) -> list[_Span]:
    """Divides a text that is longer than a row into parts that fit; its </s> is never a part on its own."""
    parts, first = [], 0
    while len(span.tokens) - first > room:
        last = first + room - (len(span.tokens) - first == room + 1)
        parts.append(span.part(first, last))
        first = last
    return [*parts, span.part(first, len(span.tokens)) if first else span]


def _last_window(spans: Sequence[_Span], room: int, row_images: int) -> int:
    """The index of the first span from which the rest of the document fits a row."""
    for place in range(len(spans) - 1, -1, -1):
        room -= len(spans[place])
        row_images -= spans[place].image is not None
        if room < 0 or row_images < 0:
            return place + 1
    return 0


def _cut_chat(
    spans: list[_Span], tokenizer: Tokenizer, row: tuple[int, int], *, once: bool
) -> tuple[list[_Sequence], list[bool]]:
    """Pieces of a chat, cut before [USER] marks, and whether something was cut off after each.

    Args:
      once: leave out everything after the first cut.
    """
    row_tokens, row_images = row
    opening = [place for place, span in enumerate(spans) if span.opens]
    system = [span for span in spans[: opening[0]] if span.role == "system"]
    shown = [_bare(span) for span in spans[: opening[0]] if span.image is not None]
    pieces: list[_Sequence] = []
    piece: _Sequence | None = None  # the last piece, while it can be extended
    missing = False  # whether something was left out since the last piece began
    for first, last in zip(opening, [*opening[1:], len(spans)], strict=True):
        exchange = spans[first:last]
        images = [span for span in exchange if span.image is not None]
        if (
            piece is not None
            and len(piece) + sum(map(len, exchange)) <= row_tokens
            and len(piece.images) + len(images) <= row_images
        ):
            for span in exchange:
                piece.add(span)
        elif once and pieces:
            missing = True
            break
        else:
            opened, whole = _opened(exchange, shown, system, tokenizer, row)
            pieces += [] if opened is None else [opened]
            piece, missing = (opened if whole else None), not whole
        shown += [_bare(span) for span in images]
    return pieces, [*[True] * (len(pieces) - 1), missing][: len(pieces)]


def _opened(
    exchange: list[_Span], shown: list[_Span], system: list[_Span], tokenizer: Tokenizer, row: tuple[int, int]
) -> tuple[_Sequence | None, bool]:
    """A piece that begins with this exchange, and whether it holds all of it; None if no answer fits."""
    row_tokens, row_images = row
    answer = next((place for place, span in enumerate(exchange) if span.role == "assistant"), len(exchange))
    piece = _Sequence(system, tokenizer)
    for place, span in enumerate(exchange[:answer]):
        piece.add(span, shown if place == 0 else ())
    if len(piece) > row_tokens or len(piece.images) > row_images or answer == len(exchange):
        return None, False
    for place, span in enumerate(exchange[answer:]):
        room = row_tokens - len(piece)
        if len(span) <= room and (span.image is None or len(piece.images) < row_images):
            piece.add(span)
            continue
        if span.image is None and room > len(span.mark):
            piece.add(span.part(0, room - len(span.mark)))
        elif place == 0:
            return None, False
        return piece, False
    return piece, True


def _bare(span: _Span) -> _Span:
    """An image that is repeated before a later question: an input, not a target."""
    nothing = [False] * len(span.tokens)
    return dataclasses.replace(span, mark=[], learnt=nothing, target=nothing)
