"""Figures in a fixed space: a model that is read in its own space loses nothing, and the words of the command."""

import numpy as np
import pytest

from emu_jax.cli import main
from emu_jax.evaluate.quickstart.captions import score
from emu_jax.evaluate.quickstart.fixed_space import FixedSpace, Reader
from emu_jax.generate.model import Emu

SPLIT = "heldout_combinations"


@pytest.mark.long
def test_a_model_in_its_own_space(trained):
    """The identity is a linear map: ridge regression finds it, and retrieval by images finds every image."""
    model = Emu.load(trained)
    figures = score(model, [SPLIT], FixedSpace("own", model)).figures
    of = f"{SPLIT}: embeddings of images in own's space"
    print({name: figure.value for name, figure in figures.items()})
    assert figures[f"{of}, R2"].value > 0.999
    assert figures[f"{of}, right image in top 5"].value == 1.0
    assert -0.1 < figures[f"{SPLIT}: embeddings from text in own's space, R2"].value < 0.5  # random: near the mean
    assert set(score(model, [SPLIT]).figures) == {name for name in figures if "space" not in name}


def test_any_invertible_map_is_read():
    rng = np.random.default_rng(0)
    fixed = rng.normal(2.0, 1.0, (300, 6))
    embeddings = (fixed @ rng.normal(size=(6, 8)) + 3.0).reshape(300, 2, 4)  # Q = 2, D = 4
    noise = rng.normal(size=(50, 2, 4))
    for added, read, most in (
        (0.0, "read_encoded", 0.01),
        (0.0, "read_generated", 0.01),
        (20.0, "read_generated", 1.1),
    ):
        generated = embeddings[200:250] + added * noise  # with much noise, the mean is the best that can be read
        keys = [str(number) for number in range(250)]
        reader = Reader.fit(embeddings[:250], fixed[:250], keys, generated, np.arange(200, 250))
        shown = embeddings[250:] + added * noise
        error = np.square(getattr(reader, read)(shown) - fixed[250:]).mean()
        assert error < most, f"{read}, noise {added}: {error:.4f} of a variance of 1; expected less than {most}"


def test_benchmarks_have_spaces_of_their_own(capsys):
    words = ["evaluate", "--model", "emu-mini", "--benchmark", "fluent", "--fixed-space", "emu-mini"]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--fixed-space" in line and "only the embedded images" in line
