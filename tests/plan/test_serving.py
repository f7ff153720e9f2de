"""Serving plans on this machine's devices, which compile as absent ones do."""

import json
import math

import pytest

from emu_jax.cli import main
from emu_jax.config import load_config
from emu_jax.errors import UserError
from emu_jax.models import emu
from emu_jax.models.paths import flatten
from emu_jax.plan.serving import plan_serving
from emu_jax.plan.topology import describe
from tests.train import tiny

SMALL = (
    "--config.unet.block_channels=(16, 16)",
    "--config.unet.attention_blocks=(True, False)",
    "--config.latent_size=8",
)
DECODER = [*SMALL, "--config.unet.layers_per_block=1", "--config.unet.heads=2", "--config.unet.groups=4"]


MODEL = ["--config.model.llama.quantised=int4", "--config.model.llama.vocab_size=300"]


def test_all_weights_are_there():
    config = load_config(tiny.__file__, MODEL)
    plan = plan_serving(config, describe("here"))
    leaves = flatten(emu.abstract(emu.EmuConfig.from_dict(config.model)))
    assert sum(plan.weights.values()) == sum(x.size * (0.5 if x.dtype == "int4" else 4) for x in leaves.values())
    assert all(program.needs > 0 for program in plan.programs[:-1])
    assert plan.fits and plan.peak > sum(plan.weights.values())


@pytest.mark.slow
def test_a_model_that_draws():
    """Stable Diffusion's VAE compiles for long."""
    plan = plan_serving(
        load_config(tiny.__file__, MODEL), describe("here"), load_config("configs/decoder.py:published", DECODER)
    )
    about = [program.about for program in plan.programs]
    assert [name.split(" ")[0] for name in about] == ["reads", "writes", "imagines", "draws", "decodes", "a"], about
    assert plan.weights["unet"] > 0 and plan.weights["vae"] > 0


@pytest.mark.long
def test_as_a_command(tmp_path, capsys):
    file = tmp_path / "plan.json"
    words = ["--config", tiny.__file__, "--topology", "here", "--serve", "--json", str(file)]
    assert main(["plan", *words, "--config.model.llama.vocab_size=300"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("serving on here: 1 chips; at most ") and "imagines an image after 512 tokens" in text, text
    programs = json.loads(file.read_text())["programs"]
    assert len(programs) == 4 and not any(math.isnan(p["seconds"] or 0) for p in programs)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--drawing", "configs/decoder.py"], "--drawing configs/decoder.py: only a served model draws; add --serve"),
        (["--serve", "--decode", "2"], "--serve: it takes no --decode"),
        (["--suggest", "--price", "1"], "--suggest: it takes no --price"),
        (["--suggest", "--serve"], "--serve: it takes no --suggest"),
    ],
)
def test_options_that_do_not_go_together(words, said, capsys):
    assert main(["plan", "--config", tiny.__file__, "--topology", "here", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_config_without_a_model():
    with pytest.raises(UserError, match="this config has no model"):
        plan_serving(load_config("configs/vae.py", []), describe("here"))
