"""SentencePiece with Emu's special tokens: text <-> ids, with the reference's slow, legacy LLaMA rules.

A SentencePiece model of n pieces gives ids 0…n-1; [PAD], [IMG], [/IMG], <image> follow as n…n+3 and, for
instruction-tuned models, [USER], [ASSISTANT] as n+4, n+5. A legacy quirk is kept because the published weights were
trained with it: white space beside a special token is stripped, and every piece of text between special tokens is
encoded alone, so it begins with "▁" ("[USER]:" -> 32004, 584).
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from emu_jax.errors import UserError

IMG, IMG_END, IMAGE, PAD = "[IMG]", "[/IMG]", "<image>", "[PAD]"
USER, ASSISTANT = "[USER]", "[ASSISTANT]"
ADDED = (PAD, IMG, IMG_END, IMAGE)
ADDED_INSTRUCT = (*ADDED, USER, ASSISTANT)


class Tokenizer:
    """Wraps a SentencePiece model; `instruct` adds [USER] and [ASSISTANT].

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
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(proto)  # the constructor would take empty bytes for "load nothing"
        except RuntimeError as error:
            raise UserError(f"{where}: not a SentencePiece model; expected the bytes of a .model file") from error
        self.unk_id, self.bos_id, self.eos_id = self._pieces.unk_id(), self._pieces.bos_id(), self._pieces.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(f"{where}: the SentencePiece model has no <s> or </s>; train it with both")
        base = self._pieces.get_piece_size()
        names = ADDED_INSTRUCT if instruct else ADDED
        self.added = {name: base + offset for offset, name in enumerate(names)}
        control = {self._pieces.id_to_piece(id): id for id in (self.unk_id, self.bos_id, self.eos_id)}
        self._special = control | self.added
        self._pattern = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")

    @classmethod
    def load(cls, path: Path | str, *, instruct: bool = False) -> Tokenizer:
        """Reads any SentencePiece `.model` file."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"tokenizer {path}: no such file; expected a SentencePiece .model")
        return cls(path.read_bytes(), instruct=instruct, where=f"tokenizer {path}")

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, model_type: str = "bpe") -> Tokenizer:
        """A small tokenizer from captions: at most `vocab_size` pieces (fewer when the texts hold no more).

        `model_type` is bpe or unigram, which spell what the texts lack in bytes and give every text back as it was,
        or word, where rare and unseen words become <unk> and white space is folded. The same texts give the same model.
        """
        if model_type not in ("bpe", "unigram", "word"):
            raise UserError(f"config.tokenizer.model_type={model_type!r}; choose bpe, unigram or word")
        smallest = 260 if model_type != "word" else 4
        if vocab_size < smallest:
            raise UserError(f"config.tokenizer.vocab_size={vocab_size}; {model_type} needs at least {smallest}")
        lossless = model_type != "word"
        lines = [line for text in texts for line in text.splitlines() if line.strip()]
        model = io.BytesIO()
        # BPE stops with an error when the texts hold fewer merges than asked for; it names how many they hold.
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
                    max_sentence_length=1 << 20,  # bytes; SentencePiece leaves out longer lines without a word
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
        return self._pieces.get_piece_size() + len(self.added)

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
        """What begins a turn of a chat, `[USER]:` or `[ASSISTANT]:`; a system message has nothing in front.

        Raises:
          UserError: this tokenizer has no such tokens.
        """
        if role == "system":
            return []
        name = {"user": USER, "assistant": ASSISTANT}[role]
        if name not in self.added:
            raise UserError(
                f"a chat needs the token {name}, which the tokenizer of pretraining has not; train on chats with "
                "config.objective=instruct"
            )
        return [self.added[name], *self._pieces.encode(":")]

    @property
    def role_words(self) -> dict[int, list[int]]:
        """Of [USER] and [ASSISTANT], where there are any: the ids that spell the word they stand for."""
        words = {USER: "user", ASSISTANT: "assistant"}
        return {self.added[name]: self._pieces.encode(word) for name, word in words.items() if name in self.added}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the model and the special tokens' names: equal when ids mean the same."""
        return hashlib.sha256(self.proto + "".join(self.added).encode()).hexdigest()

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Text in which special tokens' names stand for themselves (prompts) -> ids."""
        ids = [self.bos_id] if add_bos else []
        chunks = self._pattern.split(text)  # text, special, text, special, …, text
        for number, chunk in enumerate(chunks):
            if number % 2:
                ids.append(self._special[chunk])
                continue
            if number > 0:
                chunk = chunk.lstrip()
            if number < len(chunks) - 1:
                chunk = chunk.rstrip()
            ids += self._pieces.encode(chunk)
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Training text -> ids without <s>; names of special tokens in it stay ordinary text."""
        return self._pieces.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text; special tokens leave nothing."""
        return self._pieces.decode([int(id) for id in ids if id not in self.silent])

    @functools.cached_property
    def silent(self) -> set[int]:
        """Ids that `decode` leaves out."""
        return {self.bos_id, self.eos_id, *self.added.values()}

    @property
    def special(self) -> dict[int, str]:
        """Ids that spell no text, and their names."""
        return {id: name for name, id in self._special.items()}

    def spell(self, ids: Sequence[int]) -> list[tuple[list[int], str]]:
        """Ids of a text -> which of them spell what: each its piece, but bytes together a character.

        The spellings, joined, are `decode(ids)`; "▁" is a space, and none where SentencePiece adds it in front.
        """
        spelling = Spelling(self._pieces)
        spelt = [group for id in ids for group in spelling.add(int(id))]
        return spelt + spelling.end()

    def spelling(self) -> Spelling:
        """`spell` for ids that come one by one."""
        return Spelling(self._pieces)


class Spelling:
    """Ids of a text, one by one -> what is spelt so far: bytes wait until they are a character.

    Special tokens that were added to the SentencePiece model spell nothing and must be left out.
    """

    def __init__(self, pieces: sentencepiece.SentencePieceProcessor):
        self._pieces = pieces
        self._waiting: list[int] = []
        self._silent: list[int] | None = []  # ids that have spelt nothing; None once one has

    def add(self, id: int) -> list[tuple[list[int], str]]:
        """The groups of ids that are finished with this one, and their texts."""
        is_byte = self._pieces.is_byte(id)
        spelt = [] if is_byte else self.end()
        self._waiting.append(id)
        if is_byte and not _is_text(bytes(int(self._pieces.id_to_piece(byte)[3:-1], 16) for byte in self._waiting)):
            return spelt
        return spelt + self.end()

    def end(self) -> list[tuple[list[int], str]]:
        """What waits still, as no more comes."""
        if not self._waiting:
            return []
        group, self._waiting = self._waiting, []
        if self._silent is not None:
            text = self._pieces.decode(self._silent + group)  # which leaves out the space in front
            self._silent = None if text else self._silent + group
        elif self._pieces.is_byte(group[0]) or self._pieces.is_unknown(group[0]) or self._pieces.is_control(group[0]):
            text = self._pieces.decode(group)
        else:
            text = self._pieces.id_to_piece(group[0]).replace("▁", " ")
        return [(group, text)]


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
