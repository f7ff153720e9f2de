"""Figures in a fixed space: a model that is read in its own space loses nothing, and the words of the command."""

import numpy as np

from emu_jax.cli import main
from emu_jax.evaluate.quickstart.captions import score
from emu_jax.evaluate.quickstart.fixed_space import FixedSpace, read, reader
from emu_jax.generate.model import Emu

SPLIT = "heldout_combinations"


def test_a_model_in_its_own_space(trained):
    """The identity is a linear map: ridge regression finds it, and retrieval by images finds every image."""
    model = Emu.load(trained)
    figures = score(model, [SPLIT], FixedSpace("own", model)).figures
    of = f"{SPLIT}: embeddings of images in own's space"
    print({name: figure.value for name, figure in figures.items()})
    assert figures[f"{of}, R2"].value > 0.999
    assert figures[f"{of}, right image in top 5"].value == 1.0
    for name in ("right image in top 1", "right image in top 5"):
        own = figures[f"{SPLIT}: embeddings from text, {name}"].value
        assert abs(figures[f"{SPLIT}: embeddings from text in own's space, {name}"].value - own) <= 0.02
    assert set(score(model, [SPLIT]).figures) == {name for name in figures if "space" not in name}


def test_any_invertible_map_is_read():
    rng = np.random.default_rng(0)
    fixed = rng.normal(2.0, 1.0, (300, 6))
    embeddings = (fixed @ rng.normal(size=(6, 8)) + 3.0).reshape(300, 2, 4)  # Q = 2, D = 4
    ridge = reader(embeddings[:250], fixed[:250], [str(number) for number in range(250)])
    error = np.square(read(ridge, embeddings[250:]) - fixed[250:]).mean()
    assert error < 0.01, f"the smallest penalty leaves less than 1% of a variance of 1; got {error:.4f}"


def test_benchmarks_have_spaces_of_their_own(capsys):
    words = ["evaluate", "--model", "emu-mini", "--benchmark", "fluent", "--fixed-space", "emu-mini"]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--fixed-space" in line and "only the embedded images" in line
