"""Ridge regression from features to vectors, its penalty chosen by cross-validation or on other features.

    features [N, F], targets [N, K], N documents ─ Ridge.fit ─ features [M, F] -> predicted targets [M, K]

Everything is deterministic and NumPy alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

PENALTIES = 10.0 ** np.arange(-3, 3.5, 0.5)  # times the number of training items
PENALTY_FOLDS = 5


def assign_folds(keys: Sequence[str], folds: int) -> dict[str, int]:
    """Deals the keys to `folds` folds of equal size (to one), by the order of their SHA-256.

    >>> assign_folds(["a", "b", "c", "d"], 2)
    {'d': 0, 'c': 1, 'b': 0, 'a': 1}
    """
    ordered = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode("utf-8", "replace")).digest())
    return {key: place % folds for place, key in enumerate(ordered)}


@dataclasses.dataclass(frozen=True)
class Ridge:
    """Linear map from standardised features to centred targets.

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
        """features [N, F], targets [N, K], and the document of every item.

        The penalty is chosen by cross-validation over documents.
        """
        features, targets = np.asarray(features, np.float64), np.asarray(targets, np.float64)
        fold_of = assign_folds(documents, PENALTY_FOLDS)
        folds = np.array([fold_of[document] for document in documents])
        errors = np.zeros(len(PENALTIES))
        for fold in sorted(set(folds)):
            inside, outside = folds != fold, folds == fold
            if not inside.any():
                continue
            mean, scale, centre = moments(features[inside], targets[inside])
            values, basis, projected = spectrum((features[inside] - mean) / scale, targets[inside] - centre)
            turned = (features[outside] - mean) / scale @ basis
            for number, penalty in enumerate(PENALTIES):
                shrunk = projected / (values + penalty * inside.sum())[:, None]
                errors[number] += np.square(targets[outside] - centre - turned @ shrunk).sum()
        return next(cls._with_penalties(features, targets, PENALTIES[np.argmin(errors)][None]))

    @classmethod
    def fit_for(cls, features: np.ndarray, targets: np.ndarray, inputs: np.ndarray, expected: np.ndarray) -> Ridge:
        """Fitted on features [N, F] and targets [N, K] for inputs of another kind.

        The penalty is the one by which `inputs` [M, F] are mapped closest to `expected` [M, K].
        """
        features, targets = np.asarray(features, np.float64), np.asarray(targets, np.float64)

        def error(ridge: Ridge) -> float:
            return float(np.square(expected - ridge.centre - ridge(inputs)).sum())

        return min(cls._with_penalties(features, targets, PENALTIES), key=error)

    @classmethod
    def _with_penalties(cls, features: np.ndarray, targets: np.ndarray, penalties: np.ndarray) -> Iterator[Ridge]:
        mean, scale, centre = moments(features, targets)
        values, basis, projected = spectrum((features - mean) / scale, targets - centre)
        for penalty in penalties:
            weights = basis @ (projected / (values + penalty * len(features))[:, None])
            yield cls(mean, scale, centre, weights, float(penalty))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """features [N, F] -> float64 [N, K], what is predicted beyond the targets' mean."""
        return (np.asarray(features, np.float64) - self.mean) / self.scale @ self.weights


def moments(features: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and deviation of the features, mean of the targets; a constant feature keeps its scale."""
    scale = features.std(0)
    return features.mean(0), np.where(scale > 1e-9, scale, 1.0), targets.mean(0)


def spectrum(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenvalues [R] and -vectors [F, R] of x'x, and the vectors' products with x'y, [R, K]."""
    if len(x) < x.shape[1]:  # x'x has at most N eigenvalues above 0: those of xx'
        values, left = np.linalg.eigh(x @ x.T)
        kept = values > 1e-9 * values.max()
        values, basis = values[kept], x.T @ (left[:, kept] / np.sqrt(values[kept]))
    else:
        values, basis = np.linalg.eigh(x.T @ x)
    return values, basis, basis.T @ (x.T @ y)
