"""The learning rate and weight decay of every parameter, and what is frozen: `config.optimizer.groups`.

In: entries, and the parameters' logical axes and shapes by path. Out: `Hyperparameters` of each. Whether by an entry or
by the learning rate of its part, a parameter that is frozen has learning rate 0.

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

# Top level of the parameters -> the part whose learning rate it takes.
PARTS = {
    "vision": "vision",
    "ln_visual": "vision",
    "causal": "causal",
    "llama": "llama",
    "unet": "unet",
    "vae": "vae",
}

# Norm scales, biases and tables that are looked up (positions, tokens, queries, relative bias) do not decay.
UNDECAYED = frozenset(
    {"scale", "bias", "q_bias", "v_bias", "cls_token", "pos_embed", "queries", "relative_bias", "embedding"}
)

STACK = "/blocks/"  # in the path of every parameter of a stack; a layer's number is written behind it
ROWS = re.compile(r"(.*)\[(-?\d+)?:(-?\d+)?\]")

Axes = Mapping[str, Sequence[str | None]]  # path -> logical axes
Shapes = Mapping[str, tuple[int, ...]]  # path -> shape


def part_of(path: str) -> str:
    """The part of a parameter.

    >>> part_of("ln_visual/scale")
    'vision'
    """
    return PARTS[path.partition("/")[0]]


@dataclasses.dataclass(frozen=True)
class Group:
    """One entry of `config.optimizer.groups`; `OptimizerConfig` says what it means."""

    pattern: str
    learning_rate: float
    weight_decay: float | None
    frozen: bool

    @classmethod
    def make(cls, entry: Any, where: str) -> Group:
        """Checks an entry: a tuple, or a list as JSON has it.

        Raises:
          UserError: it is none, or one of its values cannot be.
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
            raise UserError(f"{where}: {pattern} is no regular expression ({error}); correct it") from error
        return group

    @property
    def expression(self) -> str:
        """The pattern without its token rows."""
        found = ROWS.fullmatch(self.pattern)
        return found[1] if found else self.pattern

    @property
    def rows(self) -> slice | None:
        """The token rows it is restricted to."""
        found = ROWS.fullmatch(self.pattern)
        return slice(*(None if limit is None else int(limit) for limit in found.groups()[1:])) if found else None

    @property
    def trains(self) -> bool:
        """Whether it asks for a learning rate above 0."""
        return not self.frozen and self.learning_rate > 0

    def matches(self, path: str, axes: Sequence[str | None], shape: Sequence[int]) -> np.ndarray:
        """Which layers or token rows of a parameter it matches: bool [n] along `axis_of`, or [1]."""
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
    """Of one parameter: its peak learning rate, 0 where it is frozen, and its weight decay.

    Each is a number, or an array that broadcasts against the parameter along its layers or its tokens.
    """

    learning_rate: float | np.ndarray
    weight_decay: float | np.ndarray

    @property
    def frozen(self) -> bool:
        """Whether all of it is."""
        return not np.any(self.learning_rate)

    @property
    def trained(self) -> np.ndarray | None:
        """What of it is not frozen, as a bool array that broadcasts; None: all of it."""
        trained = np.asarray(self.learning_rate) > 0
        return None if trained.all() else trained


def resolve(
    groups: Sequence[Group], rates: Mapping[str, float], weight_decay: float, axes: Axes, shapes: Shapes
) -> dict[str, Hyperparameters]:
    """The hyperparameters of every parameter, by path: of each layer and token row, the first entry that matches it.

    Args:
      rates: the peak learning rate of every part. weight_decay: of what decays and no entry gives another.
    """
    found = {}
    for path, names in axes.items():
        shape, axis = shapes[path], axis_of(names)
        winners = _winners([group.matches(path, names, shape) for group in groups])
        rate, decay = rates[part_of(path)], 0.0 if path.rpartition("/")[2] in UNDECAYED else weight_decay
        # One more, for what no entry matches: winner -1.
        of_groups = [rate * group.learning_rate if group.trains else 0.0 for group in groups] + [rate]
        decays = [decay if group.weight_decay is None else group.weight_decay for group in groups] + [decay]
        found[path] = Hyperparameters(
            *(_along(np.array(values)[winners], axis, len(shape)) for values in (of_groups, decays))
        )
    return found


def _winners(matches: Sequence[np.ndarray]) -> np.ndarray:
    """The number of the first entry that matches each slice, int [n]; -1 where none does."""
    if not matches:
        return np.full(1, -1)
    stacked = np.stack(matches)  # [groups, n]
    return np.where(stacked.any(0), stacked.argmax(0), -1)


def _along(values: np.ndarray, axis: int | None, ndim: int) -> float | np.ndarray:
    """One value of all of a parameter's slices as a number, several as an array that broadcasts along `axis`."""
    if axis is None or (values == values[0]).all():
        return float(values[0])
    return values.astype(np.float32).reshape([-1 if i == axis else 1 for i in range(ndim)])


def check(groups: Sequence[Group], rates: Mapping[str, float], axes: Axes, shapes: Shapes) -> None:
    """Raises UserError where an entry changes nothing, or nothing would learn."""
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
        if group.trains and not any(rates[part] for part in parts):
            raise UserError(
                f"{where} trains nothing, because config.optimizer.learning_rate.{parts[0]} is 0; set it above 0, and "
                f"freeze the rest of {parts[0]} by a later entry with frozen=True"
            )
    if axes and all(found.frozen for found in resolve(groups, rates, 0.0, axes, shapes).values()):
        raise UserError("config.optimizer.groups freezes every parameter that this objective trains; expected fewer")


def _hint(group: Group, axes: Axes, shapes: Shapes) -> str:
    """What to write instead of a pattern that matches nothing."""
    whole = dataclasses.replace(group, pattern=group.expression)
    named = [path for path in axes if whole.matches(path, axes[path], shapes[path]).any()]
    if not named:
        return f"did you mean {difflib.get_close_matches(group.expression, axes, n=1, cutoff=0.0)[0]}?"
    tokens = next((path for path in named if "vocab" in axes[path]), None)
    if tokens is None:
        return f"{named[0]} has no token rows"
    return f"{tokens} has {shapes[tokens][axis_of(axes[tokens]) or 0]} tokens"
