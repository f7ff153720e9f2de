"""Which of a video's subtitles are read, by the language that their names state: `talk.de.vtt`, `talk.en-GB.vtt`."""

from __future__ import annotations

from collections.abc import Sequence

from emu_jax.data.raw.files import Skip


def _words(text: str) -> list[str]:
    return text.split()


# ISO 639-1: another word before the suffix, as in clip.hd.vtt, is no language.
LANGUAGES = frozenset(
    _words(
        "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz "
        "ee el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik "
        "io is it iu iw ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk "
        "ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc "
        "sd se sg si sk sl sm sn so sq sr ss st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve "
        "vi vo wa wo xh yi yo za zh zu"
    )
)
_PAIRS = "eng en deu de ger de fra fr fre fr spa es ita it por pt rus ru jpn ja kor ko zho zh chi zh ara ar hin hi"
THREE_LETTERS = dict(zip(_words(_PAIRS)[::2], _words(_PAIRS)[1::2], strict=True))


def choose_subtitles(names: Sequence[str], language: str) -> str:
    """The name of the subtitles in a language: stated exactly, then with another region, then without a language.

    >>> choose_subtitles(["x.de.vtt", "x.en-GB.vtt"], "en")
    'x.en-GB.vtt'

    Raises:
      Skip: all of them are in other languages.
    """
    wanted = _tag(language)

    def rank(name: str) -> int:
        tag = stated_language(name)
        if not language or tag == wanted:
            return 0
        if tag and tag.partition("-")[0] == wanted.partition("-")[0]:
            return 1
        return 3 if tag else 2

    best = min(names, key=rank)  # the first of equal ones
    if rank(best) == 3:
        stated = ", ".join(sorted({stated_language(name) for name in names}))
        raise Skip("no_subtitles", f"subtitles in {stated} only, none in {language}; set language to read them")
    return best


def stated_language(name: str) -> str:
    """The language that a file of subtitles states in its name, as a lower-case tag; "" if it states none.

    >>> [stated_language(name) for name in ("x.de.vtt", "x.en_US.srt", "x.eng.vtt", "clip.hd.vtt", "talk.vtt")]
    ['de', 'en-us', 'en', '', '']
    """
    parts = name.split(".")
    tag = _tag(parts[-2]) if len(parts) > 2 else ""
    return tag if tag.partition("-")[0] in LANGUAGES else ""


def _tag(language: str) -> str:
    first, dash, region = language.lower().replace("_", "-").partition("-")
    return THREE_LETTERS.get(first, first) + dash + region
