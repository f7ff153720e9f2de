"""Stop strings: a text that arrives in pieces ends before the first of them."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes pieces of a text on, up to the stop string that is complete first; what may begin one is held back.

    >>> stops = StopStrings(["\\n", "end"])
    >>> [stops.add("a le"), stops.add("mon e"), stops.add("nd of"), stops.found]
    ['a l', 'emon ', '', True]

    Attributes:
      found: whether a stop string came; nothing is passed on after it.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """The text that is certain once `piece` follows."""
        if self.found:
            return ""
        text = self._held + piece
        places = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]
        if places:  # the one that ends first, and of those the longest, whatever the pieces were
            self.found, self._held = True, ""
            return text[: min(places)[1]]
        held = max((_begun(stop, text) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """The text that is held back, because nothing follows."""
        held, self._held = self._held, ""
        return held


def _begun(stop: str, text: str) -> int:
    """How many of a stop string's first characters end the text."""
    return next((count for count in range(len(stop) - 1, 0, -1) if text.endswith(stop[:count])), 0)
