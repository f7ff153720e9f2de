"""Mixtures: every record in its turn, as often as its source's weight and epochs say."""

import collections
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_jax.config import load_config
from emu_jax.data.config import DataConfig
from emu_jax.data.mixture import Selection, SourceConfig, mix, pattern
from emu_jax.errors import UserError

FIELDS = {"source": "folder"}


def test_the_paper_s_batch_sizes_take_turns():
    turns = pattern([128, 128, 64, 16, 16])
    assert turns == [0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 3, 4, 0, 1, 2, 0, 1, 0, 1, 2, 0, 1]
    assert pattern([0.5, 0.25]) == [0, 1, 0]


def test_a_source_that_ends_leaves_its_turns_to_the_others():
    selection = Selection([6, 2], [1, 1])
    expected = [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (0, 3), (0, 4), (0, 5)]
    assert [selection[i] for i in range(len(selection))] == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=5))
def test_every_record_comes_once(sources):
    lengths, weights = zip(*sources, strict=True)
    selection = Selection(lengths, weights)
    found = sorted(selection[i] for i in range(len(selection)))
    assert found == [(source, number) for source, length in enumerate(lengths) for number in range(length)]


def test_endless_sources_keep_their_weights_and_places_far_away():
    selection = Selection([sys.maxsize, 3, sys.maxsize], [2, 1, 1])
    far = [selection[10**15 + i] for i in range(3000)]
    assert collections.Counter(source for source, _ in far) == {0: 2000, 2: 1000}
    assert len({*far}) == 3000


def test_weights_that_change_take_every_record_up_where_it_was():
    """Two and one until record 5, then one and three; the first source has 6 records."""
    selection = Selection([6, sys.maxsize], [1, 3], [(5, [2, 1])])
    before = [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1)]
    then = [(1, 2), (0, 3), (1, 3), (1, 4), (1, 5), (0, 4), (1, 6), (1, 7), (1, 8), (0, 5), (1, 9), (1, 10)]
    assert [selection[i] for i in range(17)] == before + then


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(0, 90),
)
def test_every_record_comes_once_whenever_weights_change(sources, end):
    lengths, before, after = zip(*sources, strict=True)
    selection = Selection(lengths, after, [(end, before)])
    found = sorted(selection[i] for i in range(len(selection)))
    assert found == [(source, number) for source, length in enumerate(lengths) for number in range(length)]


def test_epochs_are_shuffled_anew_and_whole():
    stream = mix(
        {"a": 50, "b": 20}, {"a": SourceConfig("x", epochs=2), "b": SourceConfig("x", weight=0.5, epochs=1)}, 7
    )
    assert len(stream) == 120
    found = [stream[i] for i in range(120)]
    first, second = ([n for s, n in found if s == 0][part] for part in (slice(50), slice(50, 100)))
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    assert sorted(n for s, n in found if s == 1) == list(range(20))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"wieght": 1}, r"config\.data\.mixture\.web\.wieght is no field of SourceConfig; did you mean weight\?"),
        ({"weight": -1.0}, r"config\.data\.mixture\.web: weight -1\.0, epochs 0; expected a weight and epochs of 0 or"),
        ({"epochs": -1}, r"expected a weight and epochs of 0 or more"),
        ({"weight": "x"}, r"^config\.data\.mixture\.web\.weight='x': expected float, got str$"),
        ({"weight": True}, r"^config\.data\.mixture\.web\.weight=True: expected float, got bool$"),
        ({"epochs": 1.5}, r"^config\.data\.mixture\.web\.epochs=1\.5: expected int, got float$"),
        ({"subsequences": 1}, r"^config\.data\.mixture\.web\.subsequences=1: expected bool, got int$"),
        (
            {"source": 12},
            r"^config\.data\.mixture\.web\.source=12: expected str, got int; quote it twice, as in '\"12\"'$",
        ),
        ({"split": {"x": 1}}, r"^config\.data\.mixture\.web\.split: expected str, got dict$"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(UserError, match=message):
        SourceConfig.from_dict("web", FIELDS | fields)


def test_weights_without_a_short_pattern_are_rounded():
    """Shares of 2^-1/2, 3^-1/2 and 1/100: within 1e-5 of all records."""
    weights = [2**-0.5, 3**-0.5, 0.01]
    turns = collections.Counter(pattern(weights))
    for source, weight in enumerate(weights):
        share, got = weight / sum(weights), turns[source] / turns.total()
        assert got == pytest.approx(share, abs=1e-5), f"source {source}: expected {share:.6f}, got {got:.6f}"
    with pytest.raises(UserError, match=r"of 100,000 records, weights \[1, 1e-07\] give a source none; expected"):
        pattern([1, 1e-07])


def test_weights_count_what_records_hold():
    """Records of two samples and of a half: two thirds of the samples are b's, as its weight says."""
    sources = {"a": SourceConfig("x", weight=1.0), "b": SourceConfig("x", weight=2.0)}
    stream = mix({"a": 30, "b": 30}, sources, 0, {"a": 0.5, "b": 2.0})
    records = collections.Counter(stream[i][0] for i in range(3000))
    assert (records[0], records[1]) == (2000, 1000), "1/0.5 : 2/2 records"
    assert records[1] * 2.0 / (records[0] * 0.5 + records[1] * 2.0) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["mine.source=x", "mine.wieght=2"],
            r"^config\.data\.mixture\.mine\.wieght is no field of SourceConfig; did you",
        ),
        (["mine.source=x", "mine.weight=two"], r"^config\.data\.mixture\.mine\.weight='two': expected float, got str$"),
        (["mine.source=x", "mine.epochs.x=2"], r"^config\.data\.mixture\.mine\.epochs: expected int, got ConfigDict$"),
        (["mine.weight=2"], r"^config\.data\.mixture\.mine\.source is missing; SourceConfig needs it$"),
    ],
)
def test_an_entry_of_the_command_line_is_checked_like_the_config_s_own(overrides, message):
    config = load_config("configs/quickstart.py", [f"--config.data.mixture.{text}" for text in overrides])
    with pytest.raises(UserError, match=message):
        SourceConfig.from_dict("mine", config.data.mixture.mine)


def test_an_entry_of_the_command_line_is_a_source():
    overrides = [
        "source=",
        "mixture.mine.source=fluent_emoji",
        "mixture.mine.split=heldout_concepts",
        "mixture.mine.weight=2",
    ]
    data = DataConfig.from_dict(load_config("configs/quickstart.py", [f"--config.data.{o}" for o in overrides]).data)
    assert data.sources["mine"] == SourceConfig("fluent_emoji", "heldout_concepts", weight=2.0)
    assert sorted(data.open(16)) == ["images", "mine", "questions"]


def test_an_entry_without_a_split_has_the_config_s():
    data = DataConfig.from_dict(load_config("configs/quickstart.py", ["--config.data.split=heldout_concepts"]).data)
    assert {entry.split for entry in data.sources.values()} == {"heldout_concepts"}
