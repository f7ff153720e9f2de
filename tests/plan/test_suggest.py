"""The search for mesh, micro-batches and remat: a ranking by arithmetic, and what of it fits."""

import dataclasses
import itertools
import math

import jax
import pytest
from ml_collections import ConfigDict

from configs import models, pretrain
from emu_jax.chips import CHIPS, GIB
from emu_jax.errors import UserError
from emu_jax.plan import suggest as module
from emu_jax.plan.plan import make_plan
from emu_jax.plan.steps import planned_task, training_step
from emu_jax.plan.suggest import applied, choices, suggest
from emu_jax.plan.topology import Topology
from emu_jax.sharding import make_mesh
from emu_jax.train.fit import fit


def topology(devices: int = 8, **changes: float) -> Topology:
    """This machine's device, so many times, with the figures of a v5e chip and these changes.

    What is compiled needs devices that differ: one.
    """
    return Topology("made", dataclasses.replace(CHIPS["v5e"], **changes), devices, jax.devices()[:1] * devices)


def small() -> ConfigDict:
    """The published recipe with the debug model's sizes, eight rows a device."""
    config = pretrain.get_config()
    for part in ("vision", "causal", "llama"):
        config.model[part].update(models.debug()[part])
        config.model[part].remat = "auto"
    config.model.llama.vocab_size = 300
    config.model.update({"dtype": "float32", "loss_chunk": 16})
    config.data.update({"row_tokens": 64, "row_images": 4, "batch_rows": 64})
    return config


def test_every_choice_is_a_run_of_the_same_batch():
    config = small()
    found = choices(config, topology())
    assert len({tuple(choice.settings.items()) for choice in found}) == len(found)
    for choice in found:
        assert choice.slices * choice.data * choice.fsdp == 8
        assert choice.rows * choice.micro_batches * 8 == 64, choice
        assert fit(applied(config, choice), topology().devices) == applied(config, choice), "nothing is left open"
    for before, after in itertools.pairwise(found):
        assert before.seconds < after.seconds * (1 + module.ALIKE), (before, after)


def test_traffic_decides_where_links_are_slow():
    """A single micro-batch is best; with many, parameters are not sent for each. Free links make all meshes equal."""
    slow = choices(small(), topology(interconnect=1e3))
    assert slow[0].micro_batches == 1
    assert next(choice for choice in slow if choice.micro_batches == 8).fsdp == 1
    free = choices(small(), topology(interconnect=math.inf))
    repeats = {choice.seconds for choice in free if choice.remat["vision"] == choice.remat["llama"] == "dots"}
    assert len(repeats) == 1 and free[0].seconds in repeats


def test_what_cannot_hold_the_state_is_left_out():
    config = small()
    every = choices(config, topology())
    half = max(choice.state for choice in every) / 2
    kept = choices(config, topology(hbm=half))
    assert kept == [choice for choice in every if choice.state <= half] and 0 < len(kept) < len(every)
    assert choices(config, topology(hbm=1e3)) == []


def test_the_state_is_what_the_step_holds():
    config = small()
    for choice in choices(config, topology(1)):
        changed = applied(config, choice)
        held = training_step(planned_task(changed), make_mesh(changed.train.mesh, topology(1).devices)).held
        sums = held.get("gradient sums", 0.0)  # and two numbers beside
        assert choice.state == pytest.approx(held["parameters"] + held["optimizer"] + sums, rel=0.01), choice


def test_more_devices_may_hold_more():
    """256 does not divide the published encoder's width of 1,408, and all of them hold all of it."""
    fits = {choice.fsdp for choice in choices(pretrain.get_config(), topology(256)) if choice.micro_batches == 4}
    assert 128 in fits and 256 not in fits, fits
    large = choices(pretrain.get_config(), topology(256, hbm=95 * GIB))
    state = {choice.fsdp: choice.state for choice in large if choice.micro_batches == 4}
    assert state[128] < state[64] < state[256], state
    one, other = (module.Choice(1, 256 // fsdp, fsdp, 1, 4, {"llama": "full"}, state[fsdp]) for fsdp in (256, 128))
    assert one.needs_no_less_than(other) and not other.needs_no_less_than(one)


def test_the_arithmetic_of_a_choice():
    """One device repeats its forward pass, and sends nothing; two send parameters and gradients."""
    config = small()
    alone = {choice.remat["llama"] + choice.remat["vision"]: choice for choice in choices(config, topology(1))}
    plan = make_plan(applied(config, alone["dotsdots"]), topology(1), timed=False)
    flops = sum(plan.model_flops.values()) + plan.model_flops["causal"] / 3  # always full
    assert alone["dotsdots"].seconds == pytest.approx(flops / (197e12 * module.PRODUCT_EFFICIENCY))


@pytest.mark.long
def test_the_best_that_fit_are_compiled_and_larger_ones_are_not(monkeypatch):
    """In half of the memory of the choice that needs most, it and those that need more are left out."""
    config, planned = small(), []

    def counting(*args, **keywords):
        planned.append(plan := make_plan(*args, **keywords))
        return plan

    config.data.batch_rows = 8
    most = max(choices(config, topology(1)), key=lambda choice: (choice.rows, choice.remat["llama"] == "dots"))
    needs = make_plan(applied(config, most), topology(1), timed=False).peak
    monkeypatch.setattr(module, "make_plan", counting)
    found = suggest(config, topology(1, hbm=needs / 2), count=2)
    assert found.compiled == len(planned) <= module.TRIES <= found.ranked
    assert len(found.found) == 2 and all(plan.fits for _, plan in found.found)
    large = [choice for choice in choices(config, topology(1)) if choice.rows == most.rows]
    assert not [choice for choice, _ in found.found if choice in large], needs / GIB


def test_what_cannot_be_searched():
    config = small()
    config.data.batch_rows = 12
    with pytest.raises(UserError, match="batch_rows=12 does not divide over the 8 devices that hold rows"):
        choices(config, topology())
    config.data.batch_rows = 0
    with pytest.raises(UserError, match="--suggest needs a known batch"):
        choices(config, topology())
    config.data.batch_rows, config.train.mesh.tensor = 8, -1
    with pytest.raises(UserError, match=r"train\.mesh\.tensor=-1: --suggest searches slice, data and fsdp"):
        choices(config, topology())
    with pytest.raises(UserError, match="--suggest searches for Emu's step"):
        choices(ConfigDict({"objective": "vae"}), topology())
