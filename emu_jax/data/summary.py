"""What a preparation, or a dry run of one, kept and left out: counts by reason with examples, and whether it may pass.

rejects of a worker ─ count_rejects ─┬─ merge ─ Summary ─┬─ lines of a table
rejects of another ── count_rejects ─┘                   └─ Refused
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from emu_jax.data.raw.reader import Reject
from emu_jax.data.reasons import MISSING_PART_REASONS, RULE_REASONS
from emu_jax.errors import UserError

EXAMPLES = 3  # of a reason
MAX_CHARACTERS = 160  # of an example


class LeftOut(NamedTuple):
    """What was left out for one reason.

    Attributes:
      rejects: how many things.
      documents: how many of them were whole documents.
      examples: the first ones by their keys, at most `EXAMPLES`, a line each.
    """

    rejects: int
    documents: int
    examples: tuple[str, ...]


def count_rejects(rejects: Iterable[Reject]) -> dict[str, LeftOut]:
    """Rejects, by reason.

    >>> count_rejects([Reject("b", "no_text", "b: empty"), Reject("a#1", "no_text", "a blank", whole=False)])
    {'no_text': LeftOut(rejects=2, documents=1, examples=('a#1: a blank', 'b: empty'))}
    """
    found: dict[str, LeftOut] = {}
    for reject in rejects:
        before = found.get(reject.reason, LeftOut(0, 0, ()))
        examples = _first((*before.examples, _example(reject)))
        found[reject.reason] = LeftOut(before.rejects + 1, before.documents + reject.whole, examples)
    return found


def merge(parts: Iterable[Mapping[str, LeftOut]]) -> dict[str, LeftOut]:
    """The counts of several groups of rejects as one, sorted by reason; the same for any grouping."""
    groups = collections.defaultdict(list)
    for part in parts:
        for reason, left_out in part.items():
            groups[reason].append(left_out)
    return {
        reason: LeftOut(
            sum(one.rejects for one in group),
            sum(one.documents for one in group),
            _first(example for one in group for example in one.examples),
        )
        for reason, group in sorted(groups.items())
    }


def _first(examples: Iterable[str]) -> tuple[str, ...]:
    return tuple(heapq.nsmallest(EXAMPLES, examples))


def _example(reject: Reject) -> str:
    """Key and detail in one line that any terminal shows; most details begin with the key."""
    text = reject.detail if reject.detail.startswith(reject.key) else f"{reject.key}: {reject.detail}"
    text = text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Refused(UserError):
    """A preparation with too many faults, or without documents.

    Attributes:
      summary: what it kept and left out.
    """

    def __init__(self, message: str, summary: Summary):
        super().__init__(message)
        self.summary = summary


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was kept and left out.

    Attributes:
      records: number of documents that were kept.
      left_out: what was not, by reason.
    """

    records: int
    left_out: Mapping[str, LeftOut]

    @property
    def documents(self) -> int:
        """Number of documents that were read."""
        return self.records + sum(one.documents for one in self.left_out.values())

    @property
    def faults(self) -> int:
        return sum(
            one.documents if reason in MISSING_PART_REASONS else one.rejects
            for reason, one in self.left_out.items()
            if reason not in RULE_REASONS
        )

    def check(self, max_faults: float, source: str, advice: str) -> None:
        """Raises Refused for more faults than a share `max_faults` of the documents, or if nothing is left.

        Args:
          source: the reader's name.
          advice: where more is said, for the error.
        """
        listed = ", ".join(f"{reason} {one.rejects:,}" for reason, one in self.left_out.items()) or "none"
        if self.faults > max_faults * self.documents:
            raise Refused(
                f"{source}: {self.faults:,} faults in {self.documents:,} documents, more than {max_faults:.1%}; "
                f"rejects: {listed}; {advice}mend the data or raise max_faults",
                self,
            )
        if not self.records:
            raise Refused(
                f"{source}: none of {self.documents:,} documents is left; rejects: {listed}; {advice}mend the data",
                self,
            )

    def as_json(self) -> dict[str, Any]:
        """Its part of a manifest."""
        counts = {reason: {"rejects": one.rejects, "documents": one.documents} for reason, one in self.left_out.items()}
        examples = {reason: list(one.examples) for reason, one in self.left_out.items()}
        return {"documents_read": self.documents, "rejects": counts, "examples": examples}

    @classmethod
    def from_json(cls, manifest: Mapping[str, Any]) -> Summary:
        """The inverse of `as_json`."""
        left_out = {
            reason: LeftOut(counts["rejects"], counts["documents"], tuple(manifest["examples"][reason]))
            for reason, counts in manifest["rejects"].items()
        }
        return cls(manifest["documents_read"] - sum(one.documents for one in left_out.values()), left_out)

    def lines(self) -> list[str]:
        """The table: a line and examples for each reason, most frequent first."""
        if not self.left_out:
            return ["nothing was left out"]
        ranked = sorted(self.left_out.items(), key=lambda item: (-item[1].rejects, item[0]))
        cells = [(reason, f"{one.rejects:,}", f"{one.documents:,}", _counts_as(reason)) for reason, one in ranked]
        titles = ("reason", "left out", "documents", "counts as")
        widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]

        def line(row: tuple[str, str, str, str]) -> str:
            return f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}"

        examples = [[f"    {example}" for example in one.examples] for _, one in ranked]
        return [line(titles), *(text for row, some in zip(cells, examples, strict=True) for text in (line(row), *some))]


def _counts_as(reason: str) -> str:
    if reason in RULE_REASONS:
        return "rule"
    return "fault if the document is lost" if reason in MISSING_PART_REASONS else "fault"
