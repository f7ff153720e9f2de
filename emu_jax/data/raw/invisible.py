"""Characters that are in texts and are not seen: what readers of pages and of subtitles make of them."""

# Joiners stay: emoji and several scripts are written with them.
NO_WIDTH = "\xad\u200b\u2060\ufeff\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

# For str.translate: a non-breaking space or a vertical tab becomes a space; marks of no width and controls are removed.
INVISIBLE: dict[int, str | None] = {code: None for code in (*range(32), 127, *map(ord, NO_WIDTH))}
INVISIBLE |= {ord("\xa0"): " ", ord("\v"): " "}
for _kept in "\t\n\r\f":
    del INVISIBLE[ord(_kept)]
