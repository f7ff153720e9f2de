"""Which of a video's subtitles are read, by the language that their names state: `talk.de.vtt`, `talk.en-GB.vtt`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from emu_jax.data.raw.files import Skip
from emu_jax.data.raw.subtitles import SUFFIXES


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
        "vi vo wa wo xh yi yo za zh zu "
        # Of YouTube's, those with three letters alone.
        "bho ceb ckb cmn doi fil gom gsw haw hmn ilo kri lus mai mni nso sco yue"
    )
)
# ISO 639-2 -> 639-1, both where a language has two; and what YouTube calls Hebrew.
_PAIRS = (
    "iw he "
    "aar aa abk ab afr af aka ak alb sq amh am ara ar arg an arm hy asm as ava av ave ae aym ay aze az bak ba bam "
    "bm baq eu bel be ben bn bis bi bod bo bos bs bre br bul bg bur my cat ca ces cs cha ch che ce chi zh chu cu "
    "chv cv cor kw cos co cre cr cym cy cze cs dan da deu de div dv dut nl dzo dz ell el eng en epo eo est et eus "
    "eu ewe ee fao fo fas fa fij fj fin fi fra fr fre fr fry fy ful ff geo ka ger de gla gd gle ga glg gl glv gv "
    "gre el grn gn guj gu hat ht hau ha heb he her hz hin hi hmo ho hrv hr hun hu hye hy ibo ig ice is ido io iii "
    "ii iku iu ile ie ina ia ind id ipk ik isl is ita it jav jv jpn ja kal kl kan kn kas ks kat ka kau kr kaz kk "
    "khm km kik ki kin rw kir ky kom kv kon kg kor ko kua kj kur ku lao lo lat la lav lv lim li lin ln lit lt ltz "
    "lb lub lu lug lg mac mk mah mh mal ml mao mi mar mr may ms mkd mk mlg mg mlt mt mon mn mri mi msa ms mya my "
    "nau na nav nv nbl nr nde nd ndo ng nep ne nld nl nno nn nob nb nor no nya ny oci oc oji oj ori or orm om oss "
    "os pan pa per fa pli pi pol pl por pt pus ps que qu roh rm ron ro rum ro run rn rus ru sag sg san sa sin si "
    "slk sk slo sk slv sl sme se smo sm sna sn snd sd som so sot st spa es sqi sq srd sc srp sr ssw ss sun su swa "
    "sw swe sv tah ty tam ta tat tt tel te tgk tg tgl tl tha th tib bo tir ti ton to tsn tn tso ts tuk tk tur tr "
    "twi tw uig ug ukr uk urd ur uzb uz ven ve vie vi vol vo wel cy wln wa wol wo xho xh yid yi yor yo zha za zho "
    "zh zul zu"
)
THREE_LETTERS = dict(zip(_words(_PAIRS)[::2], _words(_PAIRS)[1::2], strict=True))
# Words about subtitles: talk.en.sdh.srt, talk.a.en.vtt; the latter are YouTube's names of what it has recognised.
KINDS = frozenset(_words("a asr auto cc default forced orig sdh subs subtitles"))
AUTOMATIC = frozenset(_words("a asr auto orig"))


_NO_LANGUAGE, _OTHER_LANGUAGE = 12, 14  # in the order of `choose_subtitles`


class Stated(NamedTuple):
    """What the name of a file of subtitles states.

    Attributes:
      tag: the language, as "en" or "pt-br"; "" where none is stated.
      is_automatic: whether the words were recognised by a program.
      is_forced: whether only what is in a foreign language is in them.
    """

    tag: str = ""
    is_automatic: bool = False
    is_forced: bool = False


def choose_subtitles(names: Sequence[str], language: str) -> str:
    """The name of the subtitles in a language: stated exactly, without a region, with another, without a language.

    People's subtitles precede those that a program recognised; whole ones precede forced ones. Of the same subtitles in
    several formats, the first of `SUFFIXES` is chosen. With language="" it is the first name.

    >>> choose_subtitles(["x.de.vtt", "x.a.en.vtt", "x.en-GB.vtt"], "en")
    'x.en-GB.vtt'

    Raises:
      Skip: all of them are in other languages.
    """
    if not language:
        return min(names)
    wanted = _tag(language)
    base = wanted.partition("-")[0]

    def rank(name: str) -> int:
        stated = stated_language(name)
        if not stated.tag:
            return _NO_LANGUAGE + stated.is_forced
        if stated.tag.partition("-")[0] != base:
            return _OTHER_LANGUAGE
        region = 0 if stated.tag == wanted else 1 if stated.tag == base else 2
        return 6 * stated.is_forced + 3 * stated.is_automatic + region

    def order(name: str) -> tuple[int, str, int]:
        stem, dot, suffix = name.lower().rpartition(".")
        return rank(name), stem, SUFFIXES.index(dot + suffix)

    best = min(names, key=order)
    if rank(best) == _OTHER_LANGUAGE:
        tags = ", ".join(sorted({stated_language(name).tag for name in names}))
        raise Skip("no_subtitles", f"subtitles in {tags} only, none in {language}; set language to read them")
    return best


def stated_language(name: str) -> Stated:
    """What the words between the first dot of a name and its suffix state.

    >>> [stated_language(name).tag for name in ("x.de.vtt", "x.en_US.srt", "x.eng.sdh.vtt", "clip.hd.vtt", "talk.vtt")]
    ['de', 'en-us', 'en', '', '']
    >>> stated_language("x.en-orig.vtt")
    Stated(tag='en', is_automatic=True, is_forced=False)
    """
    words = name.lower().split(".")[1:-1]
    kinds = set(_take_kinds(words))
    tag = _tag(words.pop()) if words else ""
    if not _is_language([tag]):
        return Stated("", bool(kinds & AUTOMATIC), "forced" in kinds)
    kinds.update(_take_kinds(words))
    plain = tag.removesuffix("-orig")  # YouTube's mark of the language that is spoken
    return Stated(plain, plain != tag or bool(kinds & AUTOMATIC), "forced" in kinds)


def _take_kinds(words: list[str]) -> Iterator[str]:
    """Takes the words about subtitles from the end: "hi" after a language means hearing-impaired, otherwise Hindi."""
    while words and (words[-1] in KINDS or (words[-1] == "hi" and _is_language(words[-2:-1]))):
        yield words.pop()


def _is_language(words: Sequence[str]) -> bool:
    return any(_tag(word).partition("-")[0] in LANGUAGES for word in words)


def _tag(language: str) -> str:
    first, dash, region = language.lower().replace("_", "-").partition("-")
    return THREE_LETTERS.get(first, first) + dash + region
