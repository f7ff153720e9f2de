"""SentencePiece with Emu's special tokens: text <-> ids, by the rules of the reference's slow, legacy LLaMA tokenizer.

A SentencePiece model of n pieces has ids 0…n-1; [PAD], [IMG], [/IMG], <image> follow as n…n+3 and, for
instruction-tuned models, [USER], [ASSISTANT] as n+4, n+5. A legacy quirk is kept because the published weights were
trained with it: white space beside a special token is stripped, and each piece of text between special tokens is
encoded on its own, so it begins with "▁" ("[USER]:" -> 32004, 584).
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
from collections.abc import Iterable, Sequence

import sentencepiece

from emu_jax.errors import UserError
from emu_jax.storage import Path, as_path, failed_download

IMG, IMG_END, IMAGE, PAD = "[IMG]", "[/IMG]", "<image>", "[PAD]"
USER, ASSISTANT = "[USER]", "[ASSISTANT]"
ADDED = (PAD, IMG, IMG_END, IMAGE)
ADDED_INSTRUCT = (*ADDED, USER, ASSISTANT)


class PlainText(str):
    """A part of a prompt in which the names of special tokens are ordinary text: what clients and models write."""


class Tokenizer:
    """A SentencePiece model with special tokens; `instruct` adds [USER] and [ASSISTANT].

    >>> tokenizer = Tokenizer.train(["a red cat", "a blue cat"], vocab_size=7, model_type="word")
    >>> tokenizer.vocab_size, tokenizer.added
    (11, {'[PAD]': 7, '[IMG]': 8, '[/IMG]': 9, '<image>': 10})
    >>> tokenizer.encode("a cat [IMG]")
    [1, 3, 4, 8]
    >>> tokenizer.decode([1, 3, 4, 8])
    'a cat'
    """

    def __init__(self, proto: bytes, *, instruct: bool = False, where: str = "tokenizer"):
        self.proto = proto
        self.instruct = instruct
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(proto)  # the constructor would accept empty bytes
        except RuntimeError as error:
            raise UserError(f"{where}: not a SentencePiece model; expected the bytes of a .model file") from error
        self.unk_id, self.bos_id, self.eos_id = self._model.unk_id(), self._model.bos_id(), self._model.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(f"{where}: the SentencePiece model has no <s> or </s>; train it with both")
        base = self._model.get_piece_size()
        names = ADDED_INSTRUCT if instruct else ADDED
        self.added = {name: base + offset for offset, name in enumerate(names)}
        control = {self._model.id_to_piece(id): id for id in (self.unk_id, self.bos_id, self.eos_id)}
        self._special = control | self.added
        self._pattern = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")

    @classmethod
    def load(cls, path: Path | str, *, instruct: bool = False) -> Tokenizer:
        """Reads any SentencePiece `.model` file.

        Raises:
          UserError: it does not exist, or is not such a file.
        """
        path = as_path(path)
        if not path.is_file():
            inside = f"; name {path / 'tokenizer.model'}" if (path / "tokenizer.model").is_file() else ""
            raise UserError(f"tokenizer {path}: no such file; expected a SentencePiece .model{inside}")
        data = path.read_bytes()
        if why := failed_download(data[:1024], len(data)):
            raise UserError(f"tokenizer {path}: {why}")
        if data.lstrip()[:1] == b"{":
            raise UserError(
                f"tokenizer {path}: JSON, as tokenizer.json of Hugging Face is; expected the SentencePiece .model "
                "beside it, tokenizer.model"
            )
        return cls(data, instruct=instruct, where=f"tokenizer {path}")

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, model_type: str = "bpe") -> Tokenizer:
        """Trains a small tokenizer of at most `vocab_size` pieces; fewer if the texts contain no more.

        The same texts give the same model.

        Args:
          model_type: bpe or unigram encode unseen characters as bytes and are lossless. With word, rare and unseen
            words become <unk> and white space is collapsed.

        Raises:
          UserError: the texts are empty, or `vocab_size` is too small for them.
        """
        if model_type not in ("bpe", "unigram", "word"):
            raise UserError(f"config.tokenizer.model_type={model_type!r}; choose bpe, unigram or word")
        smallest = 260 if model_type != "word" else 4
        if vocab_size < smallest:
            raise UserError(f"config.tokenizer.vocab_size={vocab_size}; {model_type} needs at least {smallest}")
        lossless = model_type != "word"
        lines = [line for text in texts for line in text.splitlines() if line.strip()]
        model = io.BytesIO()
        # BPE fails if the texts contain fewer merges than requested; the error states how many they contain.
        for _ in range(2):
            try:
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=iter(lines),
                    model_writer=model,
                    vocab_size=vocab_size,
                    model_type=model_type,
                    hard_vocab_limit=False,
                    byte_fallback=lossless,
                    normalization_rule_name="identity" if lossless else "nmt_nfkc",
                    remove_extra_whitespaces=not lossless,
                    character_coverage=1.0,
                    max_sentence_length=1 << 20,  # bytes; SentencePiece silently skips longer lines
                    unk_id=0,
                    bos_id=1,
                    eos_id=2,
                    pad_id=-1,
                    num_threads=1,
                    minloglevel=2,
                )
                return cls(model.getvalue())
            except RuntimeError as error:
                if "sentences_.empty()" in str(error):
                    raise UserError("tokenizer: the texts to train it from are empty; expected captions") from error
                if too_low := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
                    raise UserError(
                        f"config.tokenizer.vocab_size={vocab_size}; the characters of these texts need at least "
                        f"{too_low.group(1)}"
                    ) from error
                if not (too_high := re.search(r"value <= (\d+)", str(error))):
                    raise
                vocab_size = int(too_high.group(1))
        raise UserError(f"config.tokenizer.vocab_size={vocab_size}: SentencePiece cannot train on these captions")

    @property
    def vocab_size(self) -> int:
        return self._model.get_piece_size() + len(self.added)

    @property
    def pad_id(self) -> int:
        return self.added[PAD]

    @property
    def img_id(self) -> int:
        return self.added[IMG]

    @property
    def img_end_id(self) -> int:
        return self.added[IMG_END]

    @property
    def image_id(self) -> int:
        return self.added[IMAGE]

    def turn_ids(self, role: str) -> list[int]:
        """Ids that begin a turn of a chat, `[USER]:` or `[ASSISTANT]:`; none for a system message.

        Raises:
          UserError: this tokenizer lacks these tokens.
        """
        if role == "system":
            return []
        name = {"user": USER, "assistant": ASSISTANT}[role]
        if name not in self.added:
            raise UserError(
                f"a chat needs the token {name}, which a tokenizer for pretraining does not have; train on chats with "
                "config.objective=instruct"
            )
        return [self.added[name], *self._model.encode(":")]

    @property
    def role_words(self) -> dict[int, list[int]]:
        """The ids of [USER] and [ASSISTANT], if they exist, with the ids of the words "user" and "assistant"."""
        words = {USER: "user", ASSISTANT: "assistant"}
        return {self.added[name]: self._model.encode(word) for name, word in words.items() if name in self.added}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the model and the special tokens' names; equal if all ids mean the same."""
        return hashlib.sha256(self.proto + "".join(self.added).encode()).hexdigest()

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Encodes a prompt, in which the names of special tokens become these tokens."""
        return self.encode_parts([text], add_bos=add_bos)

    def encode_parts(self, texts: Sequence[str], *, add_bos: bool = True) -> list[int]:
        """`encode` of the joined texts of a prompt. In a `PlainText`, names of special tokens stay ordinary text.

        >>> tokenizer = Tokenizer.train(["a red cat", "a blue cat"], vocab_size=7, model_type="word")
        >>> tokenizer.encode_parts(["a [IMG]", "a cat"]), tokenizer.encode_parts([PlainText("a [IMG]"), "a cat"])
        ([1, 3, 8, 3, 4], [1, 3, 0, 4])
        """
        ids = [self.bos_id] if add_bos else []
        chunks = [""]  # text, special, text, special, …, text
        for text in texts:
            first, *others = [text] if isinstance(text, PlainText) else self._pattern.split(text)
            chunks[-1] += first
            chunks += others
        for number, chunk in enumerate(chunks):
            if number % 2:
                ids.append(self._special[chunk])
                continue
            if number > 0:
                chunk = chunk.lstrip()
            if number < len(chunks) - 1:
                chunk = chunk.rstrip()
            ids += self._model.encode(chunk)
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Encodes training text, without <s>; names of special tokens in it stay ordinary text."""
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids to text, without special tokens."""
        return self._model.decode([int(id) for id in ids if id not in self.non_text_ids])

    @functools.cached_property
    def non_text_ids(self) -> set[int]:
        """Ids that `decode` skips."""
        return {self.bos_id, self.eos_id, *self.added.values()}

    @property
    def special(self) -> dict[int, str]:
        """The names of all special tokens, <unk> included, by id."""
        return {id: name for name, id in self._special.items()}

    def piece(self, id: int) -> tuple[str, bytes]:
        """One token as text and as UTF-8: "▁" is a space, a special token its name, part of a character "\\xe7"."""
        if id in self.non_text_ids or self._model.is_unknown(id):
            name = self.special[id]
            return name, name.encode()
        piece = self._model.id_to_piece(id)
        if self._model.is_byte(id):
            byte = bytes([int(piece[3:-1], 16)])
            return (byte.decode() if byte.isascii() else f"\\x{byte.hex()}"), byte
        text = piece.replace("▁", " ")
        return text, text.encode()

    def pieces(self, ids: Sequence[int]) -> list[tuple[list[int], str]]:
        """Ids of a text -> (ids, their text) for each piece; the bytes of one character form one piece.

        The texts, joined, are `decode(ids)`. "▁" becomes a space, except the one that SentencePiece adds in front.
        """
        detokenizer = self.detokenizer()
        found = [piece for id in ids for piece in detokenizer.add(int(id))]
        return found + detokenizer.end()

    def detokenizer(self) -> IncrementalDetokenizer:
        """`pieces` for ids that arrive one by one."""
        return IncrementalDetokenizer(self._model)


class IncrementalDetokenizer:
    """Decodes the ids of a text one by one; bytes are held back until they form a character.

    Special tokens that were added to the SentencePiece model must be left out.
    """

    def __init__(self, model: sentencepiece.SentencePieceProcessor):
        self._model = model
        self._waiting: list[int] = []
        self._empty: list[int] | None = []  # leading ids whose text is empty; None once there was text

    def add(self, id: int) -> list[tuple[list[int], str]]:
        """The pieces that this id completes, as (ids, text)."""
        is_byte = self._model.is_byte(id)
        pieces = [] if is_byte else self.end()
        self._waiting.append(id)
        if is_byte and not _is_text(bytes(int(self._model.id_to_piece(byte)[3:-1], 16) for byte in self._waiting)):
            return pieces
        return pieces + self.end()

    def end(self) -> list[tuple[list[int], str]]:
        """The piece that is held back, if any, because no more ids follow."""
        if not self._waiting:
            return []
        group, self._waiting = self._waiting, []
        if self._empty is not None:
            text = self._model.decode(self._empty + group)  # without the space in front
            self._empty = None if text else self._empty + group
        elif self._model.is_byte(group[0]) or self._model.is_unknown(group[0]) or self._model.is_control(group[0]):
            text = self._model.decode(group)
        else:
            text = self._model.id_to_piece(group[0]).replace("▁", " ")
        return [(group, text)]


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
