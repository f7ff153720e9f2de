"""Linear probes of frozen features: what `benchmark_probe` computes once encoders have given their features.

    features [N, F], texts ─ text vectors ─ ridge regression ─ predicted vectors ─ rank of the right text
    features [N, F], classes ─ one-hot ─ ridge regression ─ largest output ─ share that is right

Everything is deterministic and NumPy alone. A group is what must not be torn apart: the images of one document, or the
variants of one emoji.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import re
from collections.abc import Sequence

import numpy as np

WORD = re.compile(r"\w+")
PENALTIES = 10.0 ** np.arange(-3, 3.5, 0.5)  # of the ridge regression, times the number of training items
PENALTY_FOLDS = 5
TIED = 1e-9  # scores that differ by less are rounding errors of the same
DRAWS = 2000  # bootstrap resamples


def assign_folds(keys: Sequence[str], folds: int) -> dict[str, int]:
    """Deals the keys to `folds` folds of equal size (to one), by the order of their SHA-256.

    >>> assign_folds(["a", "b", "c", "d"], 2)
    {'d': 0, 'c': 1, 'b': 0, 'a': 1}
    """
    ordered = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode("utf-8", "replace")).digest())
    return {key: place % folds for place, key in enumerate(ordered)}


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
        values, directions, _ = _spectrum(plain._tfidf(texts), np.zeros((len(texts), 0)))
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


# ---------------------------------------------------------------- ridge regression


@dataclasses.dataclass(frozen=True)
class Ridge:
    """Linear map from standardised features to centred targets, its penalty chosen by cross-validation over documents.

    Attributes:
      mean, scale: float64 [F], of the training features. centre: float64 [K], the targets' training mean.
      weights: float64 [F, K]. penalty: the one of `PENALTIES` that was chosen.
    """

    mean: np.ndarray
    scale: np.ndarray
    centre: np.ndarray
    weights: np.ndarray
    penalty: float

    @classmethod
    def fit(cls, features: np.ndarray, targets: np.ndarray, documents: Sequence[str]) -> Ridge:
        """features [N, F], targets [N, K], and the document of every item."""
        features, targets = np.asarray(features, np.float64), np.asarray(targets, np.float64)
        fold_of = assign_folds(documents, PENALTY_FOLDS)
        folds = np.array([fold_of[document] for document in documents])
        errors = np.zeros(len(PENALTIES))
        for fold in sorted(set(folds)):
            inside, outside = folds != fold, folds == fold
            if not inside.any():
                continue
            mean, scale, centre = _moments(features[inside], targets[inside])
            values, basis, projected = _spectrum((features[inside] - mean) / scale, targets[inside] - centre)
            turned = (features[outside] - mean) / scale @ basis
            for number, penalty in enumerate(PENALTIES):
                shrunk = projected / (values + penalty * inside.sum())[:, None]
                errors[number] += np.square(targets[outside] - centre - turned @ shrunk).sum()
        penalty = float(PENALTIES[np.argmin(errors)])
        mean, scale, centre = _moments(features, targets)
        values, basis, projected = _spectrum((features - mean) / scale, targets - centre)
        weights = basis @ (projected / (values + penalty * len(features))[:, None])
        return cls(mean, scale, centre, weights, penalty)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """features [N, F] -> float64 [N, K], what is predicted beyond the targets' mean."""
        return (np.asarray(features, np.float64) - self.mean) / self.scale @ self.weights


def _moments(features: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and deviation of the features, mean of the targets; a constant feature keeps its scale."""
    scale = features.std(0)
    return features.mean(0), np.where(scale > 1e-9, scale, 1.0), targets.mean(0)


def _spectrum(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenvalues [R] and -vectors [F, R] of x'x, and the vectors' products with x'y, [R, K]."""
    if len(x) < x.shape[1]:  # x'x has at most N eigenvalues above 0: those of xx'
        values, left = np.linalg.eigh(x @ x.T)
        kept = values > 1e-9 * values.max()
        values, basis = values[kept], x.T @ (left[:, kept] / np.sqrt(values[kept]))
    else:
        values, basis = np.linalg.eigh(x.T @ x)
    return values, basis, basis.T @ (x.T @ y)


def principal(features: np.ndarray, known: int, directions: int) -> np.ndarray:
    """[N, F] -> [N, K]: the first K principal directions of the first `known` items, after standardising by them."""
    features = np.asarray(features, np.float64)
    mean, scale, _ = _moments(features[:known], features[:known, :0])
    standardised = (features - mean) / scale
    values, basis, _ = _spectrum(standardised[:known], standardised[:known, :0])
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
