"""Sources of examples, mixed by weights."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.data.examples import ExamplePipeline, ExamplesConfig, Mixed, open_examples
from emu_jax.errors import UserError


class Named:
    """Examples that say whose they are."""

    def __init__(self, name: str, count: int):
        self.fingerprint, self._name, self._count = f"{name} {count}", name, count

    def __len__(self) -> int:
        return self._count

    def key(self, index: int) -> str:
        return f"{self._name}{index}"

    def examples(self, drawn):
        return [{"value": np.array([ord(self._name), index, rng.integers(100)])} for index, rng in drawn]


def data(**fields) -> ExamplesConfig:
    return ExamplesConfig.from_dict({"source": "", "split": "train", "seed": 0, "batch": 8} | fields)


def mixture(**weights) -> dict:
    return {name: {"source": name, "weight": weight} for name, weight in weights.items()}


@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0.5, 1.0, 2.0, 3.5, 7.0])), min_size=1, max_size=4),
)
def test_an_epoch_has_every_example_and_each_source_its_share(parts):
    names = "abcd"[: len(parts)]
    sources = {name: Named(name, count) for name, (count, _) in zip(names, parts, strict=True)}
    weights = {name: weight for name, (_, weight) in zip(names, parts, strict=True)}
    mixed = Mixed(sources, weights)
    drawn = [(index, np.random.default_rng(index)) for index in range(len(mixed))]
    values = [example["value"] for example in mixed.examples(drawn)]
    seen = collections.Counter((chr(who), int(index)) for who, index, _ in values)
    assert set(seen) == {(name, index) for name, source in sources.items() for index in range(len(source))}
    assert [mixed.key(index) for index, _ in drawn] == [f"{chr(who)}{index}" for who, index, _ in values]
    total, shares = sum(weights.values()), collections.Counter(chr(who) for who, _, _ in values)
    for name, weight in weights.items():
        assert abs(shares[name] - len(mixed) * weight / total) <= len(parts), (shares, weights)


def test_the_stream_has_the_shares_and_resumes():
    config = data(mixture=mixture(a=7, b=2))
    source, parts = open_examples(config, lambda name, split: Named(name, {"a": 30, "b": 50}[name]))
    assert [len(part) for part in parts] == [30, 50]
    stream = ExamplePipeline(source, config)
    values = []
    for number in range(90):
        if number == 40:
            state = stream.get_state()
        values.append(next(stream)["value"])
    shares = collections.Counter(chr(who) for who in np.concatenate(values)[:, 0])
    assert abs(shares["a"] / 720 - 7 / 9) < 0.03, shares
    again = ExamplePipeline(source, config)
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["value"], values[40])
    other = ExamplePipeline(Mixed({"a": parts[0], "b": parts[1]}, {"a": 1, "b": 1}), config)
    with pytest.raises(UserError, match="records"):
        other.set_state(state)


def test_one_source_is_read_as_it_is():
    source, parts = open_examples(data(source="a", mixture=mixture(b=1)), lambda name, split: Named(name, 3))
    assert source is parts[0] and source.fingerprint == "a 3"
    source, _ = open_examples(data(mixture=mixture(a=0, b=1)), lambda name, split: Named(name, 3))
    assert source.key(0) == "b0", "a weight of 0 leaves a source out"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"source": "a", "weigth": 1},
            r"config\.data\.mixture\.x\.weigth is no field of MixedSource; did you mean weig",
        ),
        ({"source": "a", "weight": -1.0}, r"config\.data\.mixture\.x\.weight=-1\.0; expected 0 or more"),
        (
            {"source": ""},
            r"config\.data\.mixture\.x\.source is empty; name one, or set config\.data\.mixture\.x\.weigh",
        ),
    ],
)
def test_what_cannot_be(entry, message):
    with pytest.raises(UserError, match=message):
        open_examples(data(mixture={"x": entry}), lambda name, split: Named(name, 3))
