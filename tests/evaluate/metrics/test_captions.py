"""Caption scores against pycocoevalcap called as its own COCOEvalCap calls it, on the same captions."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from emu_jax.errors import UserError
from emu_jax.evaluate.metrics import captions
from emu_jax.evaluate.question import Question

REFERENCES = (
    ("A man riding a horse on the beach.", "A rider on horseback near the ocean, at sunset.", "Man on a brown horse"),
    ("Two dogs are playing with a red ball.", "A pair of puppies chase a ball (outside)."),
    ("A plate of food with broccoli and rice on a table.", "Broccoli, rice & chicken served on a white plate."),
    ("a woman's hand holding a cell phone", "Someone is holding up a smart-phone."),
    ('A street sign that says "Main St." on a pole.', "A green street sign in front of a building!"),
)
PREDICTIONS = (
    "a man riding a horse on the beach",
    "Two dogs\nplaying with a ball.",
    "a plate of broccoli and rice",
    "",  # a model may say nothing
    "a tall building with a street sign",
)
QUESTIONS = [Question(str(number), answers=answers) for number, answers in enumerate(REFERENCES)]

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None, reason="pycocoevalcap is not installed (the extra `test`)"
)
needs_java = pytest.mark.skipif(
    shutil.which("java") is None, reason="no java: the PTB tokenizer and METEOR are Java programs"
)


@needs_package
@needs_java
@pytest.mark.slow
def test_scores_are_pycocoevalcaps():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    meteor = Meteor()  # first, because its program takes its time to start
    figures = captions.figures(PREDICTIONS, QUESTIONS)

    tokenizer = PTBTokenizer()
    truth = tokenizer.tokenize({n: [{"caption": text} for text in texts] for n, texts in enumerate(REFERENCES)})
    found = tokenizer.tokenize({n: [{"caption": text}] for n, text in enumerate(PREDICTIONS)})
    bleu = Bleu(4).compute_score(truth, found, verbose=0)[0]
    expected = {f"BLEU-{order}": bleu[order - 1] for order in range(1, 5)}
    for name, scorer in (("CIDEr", Cider()), ("METEOR", meteor), ("ROUGE-L", Rouge())):
        expected[name] = scorer.compute_score(truth, found)[0]

    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(expected, abs=1e-6)
    for name, figure in figures.items():
        low, high = figure.interval
        assert 0.0 <= low < figure.value < high and figure.count == 5, f"{name}: {figure}"


@needs_package
@needs_java
def test_no_caption_shifts_the_others():
    """Java ends lines where pycocoevalcap does not look for it."""
    lines = [["one\u2028two", "three\x85four\r\nfive"], ["", "A Man's hat, here."], ["..."], ["", ""]]
    expected = {0: ["one two", "three four five"], 1: ["", "a man 's hat here"], 2: [""], 3: ["", ""]}
    assert captions.tokenize(lines) == expected


@needs_package
@needs_java
@pytest.mark.slow
def test_scores_depend_neither_on_the_language_nor_on_the_folder(tmp_path):
    """In German METEOR reads 0.5 as 0,5 and fails; the package may be in any folder, where nothing can be written."""
    package = Path(importlib.util.find_spec("pycocoevalcap.meteor").submodule_search_locations[0]).parent
    folder = tmp_path / "site-päckages of others"
    folder.mkdir()
    (folder / "pycocoevalcap").symlink_to(package)
    before = {path: path.stat().st_mtime_ns for path in [package / "tokenizer", package / "meteor"]}
    script = f"""
from tests.evaluate.metrics.test_captions import PREDICTIONS, QUESTIONS
from emu_jax.evaluate.metrics import captions
import pycocoevalcap.meteor
assert pycocoevalcap.meteor.__path__[0].startswith({str(folder)!r})
print(*(float(figure.value).hex() for figure in captions.figures(PREDICTIONS, QUESTIONS).values()))
"""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")]), str(Path.cwd())])
    scores = set()
    for language, locale in (("de", "C"), ("en", "C.UTF-8")):
        env = os.environ | {"PYTHONPATH": path, "LC_ALL": locale, "JAVA_TOOL_OPTIONS": f"-Duser.language={language}"}
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        scores.add(done.stdout)
    assert len(scores) == 1, scores
    assert {path: path.stat().st_mtime_ns for path in before} == before, "something was written into the package"


@needs_package
@needs_java
@pytest.mark.slow
def test_captions_of_the_same_images_are_drawn_together():
    """Each caption twice: about images of its own, and about the same ones, which say no more than one does."""
    twice, references = PREDICTIONS + PREDICTIONS, REFERENCES + REFERENCES
    shown = {
        "own": [(Path(f"{number}.jpg"),) for number in range(10)],
        "same": [(Path(f"{number % 5}.jpg"), Path("a.jpg")) for number in range(10)],
    }
    own, same = (
        captions.figures(twice, [Question(str(n), images, answers=references[n]) for n, images in enumerate(some)])
        for some in shown.values()
    )
    for name in own:
        widths = [high - low for low, high in (own[name].interval, same[name].interval)]
        print(f"{name}: width {widths[0]:.3f}, of the same images {widths[1]:.3f}")
        assert own[name].value == same[name].value and widths[1] > 1.15 * widths[0]


@needs_package
def test_bleu_of_statistics_is_pycocoevalcaps():
    """Of the whole set and of a part of it: what a resample is scored by."""
    from pycocoevalcap.bleu.bleu import Bleu

    truth = {0: ["a man rides a horse", "a man on a horse by the sea"], 1: ["two dogs play"], 2: ["a red bus"]}
    found = {0: ["a man on a horse"], 1: ["two dogs play with a ball"], 2: [""]}
    statistics = captions.bleu_statistics(truth, found)
    for rows in ([0, 1, 2], [0], [1, 2], [2]):
        expected = Bleu(4).compute_score({n: truth[n] for n in rows}, {n: found[n] for n in rows}, verbose=0)[0]
        np.testing.assert_allclose(captions.bleu_of(statistics[rows]), expected, atol=1e-12)


def test_without_java_the_error_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="apt-get install default-jre-headless"):
        captions.figures(PREDICTIONS, QUESTIONS)


def fake_java(folder: Path, monkeypatch, refused: str) -> None:
    """A java that fails where its arguments name `refused`."""
    program = folder / "java"
    program.write_text(f'#!/bin/sh\ncase "$*" in *{refused}*) exit 1;; *) exec {shutil.which("java")} "$@";; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@needs_package
@needs_java
@pytest.mark.parametrize(
    ("refused", "words"),
    [("meteor", "METEOR failed"), ("PTBTokenizer", "tokenizer failed with exit code 1"), ("-version", "java")],
)
def test_a_failing_java_is_one_line(monkeypatch, tmp_path, refused, words):
    fake_java(tmp_path, monkeypatch, refused)
    with pytest.raises(UserError, match=words) as error:
        captions.figures(PREDICTIONS, QUESTIONS)
    assert "\n" not in str(error.value)


@needs_package
@needs_java
def test_meteor_alone_is_missing_if_it_fails(monkeypatch, tmp_path, caplog):
    fake_java(tmp_path, monkeypatch, "meteor")
    missing = {}
    figures = captions.figures(PREDICTIONS, QUESTIONS, missing)
    assert list(figures) == ["CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"]
    assert list(missing) == ["METEOR"] and missing["METEOR"].startswith("METEOR failed (")
    (line,) = caplog.messages
    assert line == f"METEOR is missing from the scores: {missing['METEOR']}"


def test_references_must_be_there():
    with pytest.raises(UserError, match="question 9: its answers are not published"):
        captions.figures(["a dog"], [Question("9")])
