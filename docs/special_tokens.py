"""A griffe extension: `</s>` and `<image>` in docstrings are shown as they are, not taken for tags by a browser."""

from __future__ import annotations

import re
from typing import Any

import griffe

TOKEN = re.compile(r"(?<![`\w'])(</?s>|<image>(\*Q)?)(?![`'])")


class SpecialTokens(griffe.Extension):
    """Puts special tokens into code spans, outside of examples and drawings."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            lines = obj.docstring.value.split("\n")
            obj.docstring.value = "\n".join(line if _is_code(line) else TOKEN.sub(r"`\1`", line) for line in lines)


def _is_code(line: str) -> bool:
    return line.lstrip().startswith(">>>") or "  " in line.strip() or "─" in line
