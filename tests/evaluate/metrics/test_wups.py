"""WUPS, expected values printed by the official evaluation (NExT-OE's metrics.py, pywsd 1.2.4) with the same tags."""

import importlib.util
import json

import pytest

from emu_jax.errors import UserError
from emu_jax.evaluate.benchmarks import nextqa
from emu_jax.evaluate.metrics import wups
from emu_jax.evaluate.question import Question

# (prediction, answer, the prediction's lemmas without stop words, WUPS@0, WUPS@0.9)
OFFICIAL = [
    ("running dogs", "the dog runs", "run dog", 1.0, 1.0),
    ("saw men", "sees a man", "saw men", 0.019230769230769232, 0.00019230769230769233),
    ("sat on a sofa", "on the couch", "sit on sofa", 0.5, 0.05),
    ("two", "2", "two", 1.0, 1.0),
    ("to get the ball", "fetch ball", "get ball", 0.6, 0.06),
    ("blorbs", "blorb", "blorbs", 0.0, 0.0),
    ("zzz", "dog", "zzz", 0.0, 0.0),
    ("the a", "the", "", 0.0, 0.0),
    (
        "children riding happily",
        "a child rides a horse. he is happy.",
        "child rid happily",
        0.03571428571428571,
        3.571428571428572e-05,
    ),
    ("wearing red hat", "cap", "wear red hat", 0.011764705882352941, 0.00011764705882352943),
    ("cat", "dog", "cat", 0.8571428571428571, 0.08571428571428572),
    ("jump", "jumping up and down", "jump", 0.016088486676721973, 1.6088486676721972e-05),
    ("", "dog", "", 0.0, 0.0),
    ("cannot", "not", "not", 1.0, 1.0),
    ("car", "motorcar", "car", 1.0, 1.0),
    ("play guitar", "plays the piano", "play guitar", 0.9, 0.9),
]
TAGS = {
    **dict.fromkeys(("running", "wearing", "riding"), "VBG"),
    **dict.fromkeys(("saw", "sat"), "VBD"),
    **dict.fromkeys(("is", "plays"), "VBZ"),
    **dict.fromkeys(("get", "ride"), "VB"),
    **dict.fromkeys(("dogs", "men", "children"), "NNS"),
    **dict.fromkeys(("the", "a"), "DT"),
    **dict.fromkeys(("in", "on"), "IN"),
    "happily": "RB",
    "better": "JJR",
    "to": "TO",
    "two": "CD",
}


def tag(words: list[str]) -> list[tuple[str, str]]:
    """NLTK's tagger is in its data, which tests cannot count on."""
    return [(word, TAGS.get(word, "NN")) for word in words]


@pytest.fixture(scope="module")
def scorer() -> wups.Wups:
    for package in ("nltk", "wn"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (the extra `test`), which WordNet is read with or from")
    return wups.Wups(tagger=tag)


@pytest.mark.parametrize(("prediction", "answer", "content", "at_0", "at_9"), OFFICIAL)
def test_scores_are_the_official_ones(scorer, prediction, answer, content, at_0, at_9):
    assert scorer.content(prediction) == content
    assert scorer.score(prediction, [answer]) == pytest.approx(at_0, abs=1e-12)
    assert scorer.score(prediction, [answer], 0.9) == pytest.approx(at_9, abs=1e-12)


def test_the_best_of_several_answers_counts(scorer):
    assert scorer.score("cat", ["sofa", "dog", "cap"]) == scorer.score("cat", ["dog"])


def test_figures_by_type_and_group(scorer):
    questions = [
        Question("1", answers=("dog",), kind="TN"),
        Question("2", answers=("cat",), kind="TP"),
        Question("3", answers=("two",), kind="DC"),
        Question("4", answers=("car",), kind="DO"),
    ]
    figures = nextqa.figures(scorer, ["cat", "the cat", "three", "motorcar"], questions)
    near = 0.8571428571428571  # of cat and dog
    at_0 = {"WUPS@0": (near + 2) / 4, "WUPS@0 (DC)": 0.0, "WUPS@0 (DO)": 1.0, "WUPS@0 (TN)": (near + 1) / 2}
    at_0 |= {"WUPS@0 (D)": 0.5, "WUPS@0 (T)": (near + 1) / 2}
    at_9 = {name.replace("@0", "@0.9"): value for name, value in at_0.items()}
    at_9 |= {"WUPS@0.9": (0.1 * near + 2) / 4}
    at_9 |= dict.fromkeys(("WUPS@0.9 (TN)", "WUPS@0.9 (T)"), (0.1 * near + 1) / 2)
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(at_0 | at_9)


def test_nltks_tagger_is_read_from_the_given_folder(scorer, tmp_path):
    folder = tmp_path / "taggers" / wups.TAGGER
    folder.mkdir(parents=True)
    for part, content in {"weights": {}, "tagdict": {"dogs": "NNS", "running": "VBG"}, "classes": ["NN"]}.items():
        (folder / f"{wups.TAGGER}.{part}.json").write_text(json.dumps(content))
    assert wups.Wups(tmp_path).content("the dogs running") == "dog run"  # as a noun it would stay "running"


def test_missing_data_is_one_line(scorer, tmp_path, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(UserError, match="no such folder"):
        wups.Wups(tmp_path / "nowhere", tagger=tag)
    (tmp_path / "data.noun").write_text("no WordNet\n")
    with pytest.raises(UserError, match=r"cannot be read as WordNet 3\.0") as error:
        wups.Wups(tmp_path, tagger=tag)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(wups, "PACKAGE", "emu_jax_no_such_package")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"needs WordNet 3\.0, .*empty.*pip install 'emu-jax\[eval\]'"):
        wups.Wups(tmp_path / "empty", tagger=tag)


def test_missing_tagger_is_one_line(scorer, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(UserError, match=r"python -m nltk\.downloader averaged_perceptron_tagger_eng"):
        wups.Wups()
