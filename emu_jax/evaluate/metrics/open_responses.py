r"""MMMU's rule for open questions: an answer is right if a part of it that may be the answer matches a reference.

The rules are those of MMMU's program (mmmu/utils/eval_utils.py: parse_open_response, eval_open), with its oddities:

    response ─ lines ─ the shortest end of each line after "is ", "answer ", … ─ and every number in these ends
    "The ratio is 1,200 m." ─ "1,200 m" ─ "1,200", "200" ─ 1200.0, 200.0

Texts match if they hold the reference, numbers if they are equal after rounding to two decimals. The response is lower
case before it is split, so that the program's pattern for ends of sentences, `\.\s(?=[A-Z])`, never matches; and a
whole response is searched where it has none of the words. "1,200" is 200 as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

BEFORE_ANSWERS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
BEFORE_LAST = (*BEFORE_ANSWERS, "=")  # in the last line an equation counts, too
MARKS = (":", ",", ".", "!", "?", ";", "'")
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,200
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.2e3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",  # 1.2
)

Value = str | float


def normalised(text: str) -> list[Value]:
    """A number rounded to two decimals, or a text in lower case; a single letter with a space on either side.

    >>> normalised("1,200.456"), normalised(" Tampa "), normalised("B")
    ([1200.46], ['tampa'], [' b', 'b '])
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def parts(response: str) -> list[Value]:
    """What in a response may be its answer, each once.

    >>> parts("The ratio is 1,200 m.")
    ['1,200 m', 1200.0, 200.0]
    >>> parts("x is 3 m")
    ['3 m', 3.0]
    """
    lines = response.strip().strip(".").lower().split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        end = _shortest_end(line, BEFORE_LAST if number == len(lines) else BEFORE_ANSWERS)
        if end and end not in MARKS:
            found.append(end)
    found = found or ["\n".join(lines)]
    numbers = [match for text in found for pattern in NUMBERS for match in re.findall(pattern, text)]
    return list(dict.fromkeys(value for text in [*found, *numbers] for value in normalised(text)))


def _shortest_end(line: str, words: Sequence[str]) -> str:
    """The shortest end of a line after the last of one of `words`; "" if it has none of them.

    As in the program, an empty end is replaced by that of the next word.
    """
    shortest = ""
    for word in words:
        if word in line:
            end = line.rsplit(word, 1)[1].strip()
            if not shortest or len(end) < len(shortest):
                shortest = end
    return shortest


def is_right(response: str, answers: Sequence[str]) -> bool:
    """Whether a part of the response matches an answer.

    >>> is_right("It is about 3.4286 cm", ["24/7", "3.429"]), is_right("It is 3.4", ["3.429"])
    (True, False)
    """
    references = [value for answer in answers for value in normalised(answer)]
    return any(_matches(part, references) for part in parts(response))


def _matches(part: Value, references: Sequence[Value]) -> bool:
    if isinstance(part, str):
        return any(isinstance(reference, str) and reference in part for reference in references)
    return part in references
