"""Linear probes of frozen features: what `benchmark_probe` computes once encoders have given their features.

    features [N, F], texts ─ text vectors ─ ridge regression ─ predicted vectors ─ rank of the right text
    features [N, F], classes ─ one-hot ─ ridge regression ─ largest output ─ share that is right

Everything is deterministic and NumPy alone. A group is what must not be torn apart: the images of one document, or the
variants of one emoji.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from emu_jax.evaluate.metrics.ridge import moments, spectrum

WORD = re.compile(r"\w+")
TIED = 1e-9  # scores that differ by less are rounding errors of the same
DRAWS = 2000  # bootstrap resamples


# ---------------------------------------------------------------- text vectors


def words(text: str) -> list[str]:
    """Lower-case words.

    >>> words("Woman astronaut: medium-dark skin tone")
    ['woman', 'astronaut', 'medium', 'dark', 'skin', 'tone']
    """
    return WORD.findall(text.lower())


@dataclasses.dataclass(frozen=True)
class TextVectors:
    """TF-IDF of the training texts' words, projected on their first principal directions (LSA); rows of length 1.

    Attributes:
      index: word -> column. weights: float64 [V], inverse document frequencies. directions: float64 [V, K].
    """

    index: dict[str, int]
    weights: np.ndarray
    directions: np.ndarray

    @classmethod
    def fit(cls, texts: Sequence[str], dimensions: int) -> TextVectors:
        """From the training texts, each distinct one counted once."""
        texts = sorted(set(texts))
        found = collections.Counter(word for text in texts for word in set(words(text)))
        index = {word: column for column, word in enumerate(sorted(found))}
        frequencies = np.array([found[word] for word in index], np.float64)
        weights = np.log((1 + len(texts)) / (1 + frequencies)) + 1
        plain = cls(index, weights, np.eye(len(index)))
        values, directions, _ = spectrum(plain._tfidf(texts), np.zeros((len(texts), 0)))
        return cls(index, weights, directions[:, np.argsort(-values, kind="stable")[:dimensions]])

    def _tfidf(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(texts), len(self.index)))
        for row, text in zip(rows, texts, strict=True):
            for word in words(text):
                if word in self.index:  # a word that no training text has tells nothing
                    row[self.index[word]] += self.weights[self.index[word]]
        return unit(rows)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> float64 [N, K]; zeros where no word is known."""
        return unit(self._tfidf(texts) @ self.directions)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; zeros stay."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1.0)


# ---------------------------------------------------------------- principal directions


def principal(features: np.ndarray, known: int, directions: int) -> np.ndarray:
    """[N, F] -> [N, K]: the first K principal directions of the first `known` items, after standardising by them."""
    features = np.asarray(features, np.float64)
    mean, scale, _ = moments(features[:known], features[:known, :0])
    standardised = (features - mean) / scale
    values, basis, _ = spectrum(standardised[:known], standardised[:known, :0])
    return standardised @ basis[:, np.argsort(-values, kind="stable")[:directions]]


# ---------------------------------------------------------------- ranks


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Where the right candidate stands for each of N queries among M candidates.

    Attributes:
      better, tied: int64 [N], candidates with a higher score, and others with the same.
      candidates: M.
    """

    better: np.ndarray
    tied: np.ndarray
    candidates: int

    @classmethod
    def of(cls, scores: np.ndarray, right: np.ndarray) -> Ranks:
        """scores [N, M] and the right candidate of each query, int [N]; scores that differ by 1e-9 at most are tied."""
        scores = np.asarray(scores, np.float64)
        ahead = scores - np.take_along_axis(scores, np.asarray(right)[:, None], axis=1)
        return cls((ahead > TIED).sum(1), (np.abs(ahead) <= TIED).sum(1) - 1, scores.shape[1])

    def recall(self, k: int) -> np.ndarray:
        """Probability that the right one is among the first k when ties fall at random: float64 [N]."""
        return np.clip((k - self.better) / (self.tied + 1), 0.0, 1.0)

    def reciprocal(self) -> np.ndarray:
        """Expected 1 / rank when ties fall at random: float64 [N]."""
        sums = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, self.candidates + 1))])
        return (sums[self.better + self.tied + 1] - sums[self.better]) / (self.tied + 1)

    def beaten(self) -> np.ndarray:
        """Share of the wrong candidates that stand below the right one, a tie counted half: float64 [N]; chance 0.5."""
        if self.candidates == 1:
            return np.full(len(self.better), 0.5)
        return 1.0 - (self.better + self.tied / 2) / (self.candidates - 1)


def chance_reciprocal(candidates: int) -> float:
    """Mean of 1 / rank over all ranks."""
    return float(np.mean(1.0 / np.arange(1, candidates + 1)))


# ---------------------------------------------------------------- intervals


@dataclasses.dataclass(frozen=True)
class Run:
    """What one training's held-out items scored: values float64 [N], and each item's group."""

    values: np.ndarray
    groups: np.ndarray

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Sum of the values and number of the items of each group, both [G]."""
        _, place = np.unique(self.groups, return_inverse=True)
        return np.bincount(place, self.values), np.bincount(place).astype(np.float64)


def mean_with_interval(runs: Sequence[Run], seed: int = 0) -> tuple[float, float, float]:
    """Mean over all items of all runs, and its 95% interval by a bootstrap over runs and over groups in them.

    A draw takes as many runs as there are, with replacement, and of each as many groups as it has. So the interval
    tells of other seeds and of other documents together.

    >>> same = Run(np.array([1.0, 1.0]), np.array(["a", "b"]))
    >>> mean_with_interval([same, same])
    (1.0, 1.0, 1.0)
    """
    rng = np.random.default_rng(seed)
    sums = [run.sums() for run in runs]
    value = sum(total.sum() for total, _ in sums) / sum(count.sum() for _, count in sums)
    means = np.zeros(DRAWS)
    for draw in range(DRAWS):
        total = count = 0.0
        for chosen in rng.integers(0, len(runs), len(runs)):
            of_group, items = sums[chosen]
            drawn = rng.integers(0, len(items), len(items))
            total += of_group[drawn].sum()
            count += items[drawn].sum()
        means[draw] = total / count
    low, high = np.percentile(means, [2.5, 97.5])
    return float(value), float(low), float(high)
