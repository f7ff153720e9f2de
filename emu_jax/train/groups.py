"""The learning rate and weight decay of every parameter, and what is frozen: `config.optimizer.groups`.

In: entries, and the parameters' logical axes and shapes by path. Out: the `Hyperparameters` of each. A frozen parameter
has learning rate 0, whether an entry or the learning rate of its part freezes it.

    llama/lm_head/kernel               a parameter
    vision/blocks/attn/qkv/kernel      all layers of a stack's parameter, stored as one array [layers, …]
    vision/blocks/3/attn/qkv/kernel    its layer 3, counted from 0
    llama/embed/embedding[32000:]      token rows from 32,000 on; [-4:] are the last four
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emu_jax.errors import UserError

# Top levels of the parameters that take another one's learning rate: every other one is a part of its own.
SHARED_PARTS = {"ln_visual": "vision"}

# Norm scales, biases and embeddings (positions, tokens, queries, relative bias) have no weight decay.
UNDECAYED = frozenset(
    {"scale", "bias", "q_bias", "v_bias", "cls_token", "pos_embed", "queries", "relative_bias", "embedding"}
)

STACK = "/blocks/"  # in the path of every stacked parameter; patterns put a layer's number after it
ROWS = re.compile(r"(.*)\[(-?\d+)?:(-?\d+)?\]")

Axes = Mapping[str, Sequence[str | None]]  # path -> logical axes
Shapes = Mapping[str, tuple[int, ...]]  # path -> shape


def part_of(path: str) -> str:
    """The part of a parameter, which has a learning rate.

    >>> part_of("llama/final_norm/scale"), part_of("ln_visual/scale")
    ('llama', 'vision')
    """
    top = path.partition("/")[0]
    return SHARED_PARTS.get(top, top)


@dataclasses.dataclass(frozen=True)
class Group:
    """An entry of `config.optimizer.groups`; `OptimizerConfig` explains it."""

    pattern: str
    learning_rate: float
    weight_decay: float | None
    frozen: bool

    @classmethod
    def make(cls, entry: Any, where: str) -> Group:
        """A group from a tuple, or from a list as JSON has it.

        Raises:
          UserError: the entry or one of its values is malformed.
        """
        if not isinstance(entry, tuple | list) or len(entry) != 4:
            raise UserError(
                f"{where}={entry!r}; expected (pattern, learning rate factor, weight decay or None, frozen), as in "
                '(".*norm.*", 1.0, None, True)'
            )
        pattern, rate, decay, frozen = entry
        if not isinstance(pattern, str):
            raise UserError(f"{where}: pattern {pattern!r}; expected a regular expression in quotes")
        if not _number(rate):
            raise UserError(f"{where}: learning rate factor {rate!r} of {pattern}; expected 0 (frozen) or more")
        if decay is not None and not _number(decay):
            raise UserError(f"{where}: weight decay {decay!r} of {pattern}; expected 0 or more, or None")
        if not isinstance(frozen, bool):
            raise UserError(f"{where}: frozen is {frozen!r} for {pattern}; expected True or False")
        group = cls(pattern, float(rate), None if decay is None else float(decay), frozen)
        try:
            re.compile(group.expression)
        except re.error as error:
            raise UserError(f"{where}: {pattern} is not a regular expression ({error}); correct it") from error
        return group

    @property
    def expression(self) -> str:
        """The pattern without its slice of token rows."""
        found = ROWS.fullmatch(self.pattern)
        return found[1] if found else self.pattern

    @property
    def rows(self) -> slice | None:
        """The token rows that the pattern is restricted to; None: all."""
        found = ROWS.fullmatch(self.pattern)
        return slice(*(None if limit is None else int(limit) for limit in found.groups()[1:])) if found else None

    @property
    def trainable(self) -> bool:
        """Whether its parameters have a learning rate above 0."""
        return not self.frozen and self.learning_rate > 0

    def matches(self, path: str, axes: Sequence[str | None], shape: Sequence[int]) -> np.ndarray:
        """The layers or token rows of a parameter that the pattern matches: bool [n] along `axis_of`, or [1]."""
        axis = axis_of(axes)
        count = 1 if axis is None else shape[axis]
        if re.fullmatch(self.expression, path):
            matched = np.ones(count, bool)
        elif axis is not None and axes[axis] == "layers":
            names = (path.replace(STACK, f"{STACK}{layer}/", 1) for layer in range(count))
            matched = np.array([re.fullmatch(self.expression, name) is not None for name in names])
        else:
            matched = np.zeros(count, bool)
        if self.rows is not None:
            chosen = np.zeros(count, bool)
            if axis is not None and axes[axis] == "vocab":
                chosen[self.rows] = True
            matched &= chosen
        return matched


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value < float("inf")


def axis_of(axes: Sequence[str | None]) -> int | None:
    """The axis along which a parameter may belong to several groups: its layers, or its tokens."""
    return next((axes.index(name) for name in ("layers", "vocab") if name in axes), None)


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """Peak learning rate (0 where frozen) and weight decay of a parameter.

    Each is a number, or an array that broadcasts against the parameter along its layers or its tokens.
    """

    learning_rate: float | np.ndarray
    weight_decay: float | np.ndarray

    @property
    def frozen(self) -> bool:
        """Whether the whole parameter is frozen."""
        return not np.any(self.learning_rate)

    @property
    def trainable(self) -> np.ndarray | None:
        """Where the parameter is not frozen, as a bool array that broadcasts; None: everywhere."""
        trainable = np.asarray(self.learning_rate) > 0
        return None if trainable.all() else trainable


def resolve(
    groups: Sequence[Group], rates: Mapping[str, float], weight_decay: float, axes: Axes, shapes: Shapes
) -> dict[str, Hyperparameters]:
    """The hyperparameters of every parameter, by path. The first entry that matches a layer or a token row counts.

    Args:
      rates: peak learning rate of every part.
      weight_decay: default for parameters that decay.
    """
    found = {}
    for path, names in axes.items():
        shape, axis = shapes[path], axis_of(names)
        winners = _winners([group.matches(path, names, shape) for group in groups])
        rate, decay = rates[part_of(path)], 0.0 if path.rpartition("/")[2] in UNDECAYED else weight_decay
        # The last value, at index -1, is for slices that no entry matches.
        by_group = [rate * group.learning_rate if group.trainable else 0.0 for group in groups] + [rate]
        decays = [decay if group.weight_decay is None else group.weight_decay for group in groups] + [decay]
        found[path] = Hyperparameters(
            *(_along(np.array(values)[winners], axis, len(shape)) for values in (by_group, decays))
        )
    return found


def _winners(matches: Sequence[np.ndarray]) -> np.ndarray:
    """The index of the first entry that matches each slice, int [n]; -1 where none does."""
    if not matches:
        return np.full(1, -1)
    stacked = np.stack(matches)  # [groups, n]
    return np.where(stacked.any(0), stacked.argmax(0), -1)


def _along(values: np.ndarray, axis: int | None, ndim: int) -> float | np.ndarray:
    """A number where all slices of a parameter have the same value, otherwise an array that broadcasts along `axis`."""
    if axis is None or (values == values[0]).all():
        return float(values[0])
    return values.astype(np.float32).reshape([-1 if i == axis else 1 for i in range(ndim)])


def check(groups: Sequence[Group], rates: Mapping[str, float], axes: Axes, shapes: Shapes) -> None:
    """Raises UserError where an entry has no effect, or every parameter is frozen."""
    matches = {path: [group.matches(path, axes[path], shapes[path]) for group in groups] for path in axes}
    winners = {path: _winners(matched) for path, matched in matches.items()}
    for number, group in enumerate(groups):
        where = f"config.optimizer.groups[{number}], {group.pattern!r},"
        if not any(matched[number].any() for matched in matches.values()):
            raise UserError(f"{where} matches no parameter that this objective trains; {_hint(group, axes, shapes)}")
        won = [path for path, winner in winners.items() if (winner == number).any()]
        if not won:
            raise UserError(
                f"{where} has no effect: entries before it match all that it matches, and the first one counts; move "
                "it before them, or remove it"
            )
        parts = sorted({part_of(path) for path in won})
        if group.trainable and not any(rates[part] for part in parts):
            raise UserError(
                f"{where} trains nothing, because config.optimizer.learning_rate.{parts[0]} is 0; set it above 0, and "
                f"freeze the rest of {parts[0]} by a later entry with frozen=True"
            )
    if axes and all(found.frozen for found in resolve(groups, rates, 0.0, axes, shapes).values()):
        raise UserError("config.optimizer.groups freezes every parameter that this objective trains; expected fewer")


def _hint(group: Group, axes: Axes, shapes: Shapes) -> str:
    """A mend for a pattern that matches nothing."""
    whole = dataclasses.replace(group, pattern=group.expression)
    named = [path for path in axes if whole.matches(path, axes[path], shapes[path]).any()]
    if not named:
        return f"did you mean {difflib.get_close_matches(group.expression, axes, n=1, cutoff=0.0)[0]}?"
    tokens = next((path for path in named if "vocab" in axes[path]), None)
    if tokens is None:
        return f"{named[0]} has no token rows"
    return f"{tokens} has {shapes[tokens][axis_of(axes[tokens]) or 0]} tokens"
