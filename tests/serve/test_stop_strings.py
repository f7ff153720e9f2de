"""Stop strings in texts that arrive in pieces: the same end however a text is cut into pieces."""

from hypothesis import given
from hypothesis import strategies as st

from emu_jax.serve.stop_strings import StopStrings

LETTERS = st.text("ab\n", max_size=12)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, the longest of several; and whether there is one."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(st.lists(LETTERS, max_size=8), st.lists(st.text("ab\n", max_size=4), max_size=3))
def test_the_pieces_do_not_matter(pieces, stops):
    text, found = expected("".join(pieces), stops)
    passed, given_out = StopStrings(stops), []
    for piece in pieces:
        given_out.append(passed.add(piece))
        assert text.startswith("".join(given_out)), "what is passed on is never taken back"
    assert ("".join(given_out) + passed.end(), passed.found) == (text, found)


def test_what_cannot_begin_a_stop_string_is_passed_on_at_once():
    stops = StopStrings(["\n\n", "stop"])
    assert [stops.add(piece) for piece in ("a s", "ofa\n", "b sto", "p c", "d")] == ["a ", "sofa", "\nb ", "", ""]
    assert stops.found and stops.end() == ""
