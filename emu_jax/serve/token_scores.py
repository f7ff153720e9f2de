"""Scores of tokens that were decoded: log p by the model's own distribution, for clients that ask for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from emu_jax.data.tokenizer import Tokenizer
from emu_jax.serve.continuous_batching import TokenScores

Scores = tuple[float, np.ndarray, np.ndarray]  # log p of a token, log p [K] of the likeliest ones and their ids [K]


@dataclasses.dataclass(frozen=True)
class ScoredToken:
    """A token of a finished text, with log p by the model's own distribution: whatever temperature, top-k and top-p.

    Attributes:
      id: its id; text: what it adds to the text, "" for a special token; data: the same in UTF-8 (part of a character
        has no text of its own).
      likeliest: ids and log p of the likeliest tokens in its place, the likeliest first.
    """

    id: int
    text: str
    data: bytes
    log_p: float
    likeliest: tuple[tuple[int, float], ...]


def by_token(scores: TokenScores, row: int) -> list[Scores]:
    """One row's scores for each of its tokens."""
    chosen, likeliest, ids = (np.asarray(each) for each in (scores.chosen, scores.likeliest, scores.likeliest_ids))
    chosen = chosen.reshape(-1, chosen.shape[-1])[:, row]
    rows = likeliest.reshape(-1, *likeliest.shape[-2:])[:, row], ids.reshape(-1, *ids.shape[-2:])[:, row]
    return list(zip(chosen.tolist(), *rows, strict=True))


def scored_tokens(
    tokenizer: Tokenizer, text: str, ids: Sequence[int], scores: Sequence[Scores], *, stopped: bool
) -> tuple[ScoredToken, ...]:
    """The tokens of a finished text. Their texts, joined, are the text, unless one is part of a character.

    Args:
      stopped: the text ended before a stop string, whose further tokens are left out.
    """
    tokens: list[ScoredToken] = []
    place = 0
    for id, (log_p, likeliest, others) in zip(ids, scores, strict=True):
        if stopped and place >= len(text):
            break
        piece, data = ("", b"") if id in tokenizer.non_text_ids else tokenizer.piece(id)
        if not place and piece.startswith(" ") and not text.startswith(" "):  # SentencePiece's space in front
            piece, data = piece[1:], data[1:]
        place += len(data.decode(errors="ignore"))
        pairs = [(int(other), float(p)) for other, p in zip(others, likeliest, strict=True) if np.isfinite(p)]
        tokens.append(ScoredToken(id, piece, data, log_p, tuple(pairs)))
    return tuple(tokens)
