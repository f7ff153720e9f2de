"""The table at the end of a preparation, and what refuses one."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.data.raw.reader import Reject
from emu_jax.data.summary import EXAMPLES, MAX_CHARACTERS, Refused, Summary, count_rejects, merge

REJECTS = st.builds(
    Reject,
    st.text(max_size=3),
    st.sampled_from(["no_text", "missing_image", "cut_shard"]),
    st.text(max_size=3),
    st.booleans(),
)


@given(st.lists(REJECTS, max_size=20), st.lists(st.integers(0, 20), max_size=3))
def test_any_grouping_gives_the_counts_of_all(rejects, cuts):
    ends = sorted({0, len(rejects), *(min(cut, len(rejects)) for cut in cuts)})
    groups = [rejects[start:end] for start, end in itertools.pairwise(ends)]
    found = merge(map(count_rejects, groups))
    assert found == dict(sorted(count_rejects(rejects).items()))
    for reason, one in found.items():
        own = [reject for reject in rejects if reject.reason == reason]
        assert one.rejects == len(own) and one.documents == sum(reject.whole for reject in own)
        assert len(one.examples) == min(EXAMPLES, len(own))
    summary = Summary(7, found)
    assert Summary.from_json(json.loads(json.dumps(summary.as_json()))) == summary
    assert all(line.isprintable() for line in summary.lines())


def test_table():
    rejects = [Reject(f"{n}.tar/a\u202eb", "cut_shard", "x" * 200) for n in range(9)]
    rejects += [Reject("k#1", "missing_image", "k#1: no file", whole=False), Reject("k", "duplicate", "k: as j")]
    lines = Summary(5, count_rejects(rejects)).lines()
    start = "0.tar/a\\u202eb: "
    assert lines == [
        "reason         left out  documents  counts as",
        "cut_shard             9          9  fault",
        *(f"    {n}{start[1:]}{'x' * (MAX_CHARACTERS - len(start) + 4)}…" for n in range(3)),
        "duplicate             1          1  rule",
        "    k: as j",
        "missing_image         1          0  fault if the document is lost",
        "    k#1: no file",
    ]
    assert Summary(5, {}).lines() == ["nothing was left out"]


def test_what_is_refused():
    faulty = Summary(98, count_rejects([Reject(f"{n}", "cut_shard", "") for n in range(2)]))
    faulty.check(0.02, "pairs", "")
    with pytest.raises(
        Refused, match=r"^pairs: 2 faults in 100 documents, more than 1\.0%; rejects: cut_shard 2; mend"
    ):
        faulty.check(0.01, "pairs", "")
    rules = Summary(0, count_rejects([Reject("a", "no_text", ""), Reject("b", "too_small", "")]))
    with pytest.raises(Refused, match=r"^pairs: none of 2 documents is left; .*; see x, mend the data") as error:
        rules.check(0.0, "pairs", "see x, ")
    assert error.value.summary == rules
