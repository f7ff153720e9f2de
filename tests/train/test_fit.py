"""What a config leaves open is filled in by the kind and number of devices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import pretrain, quickstart
from emu_jax.chips import CHIPS
from emu_jax.errors import UserError
from emu_jax.train.fit import fit


def devices(kind: str, count: int, slices: int = 1) -> list:
    name = CHIPS[kind].kinds[0] if kind in CHIPS else kind
    return [SimpleNamespace(device_kind=name, slice_index=n * slices // count) for n in range(count)]


def chosen(config) -> tuple:
    mesh = config.train.mesh
    return mesh.slice, mesh.fsdp, config.optimizer.accumulate_steps


@pytest.mark.parametrize(
    ("kind", "count", "slices", "expected"),
    [
        ("v5e", 256, 1, (1, 128, 4)),
        ("v5p", 64, 1, (1, 16, 4)),
        ("v5p", 128, 1, (1, 16, 2)),
        ("v5p", 256, 2, (2, 16, 1)),
        ("v5p", 96, 1, None),  # 1,024 rows are no multiple of 96
        ("v6e", 256, 1, (1, 64, 2)),
        ("v5e", 64, 1, (1, 64, 16)),  # a slice smaller than the entry's FSDP
        ("cpu", 8, 1, (1, 8, 128)),
        ("cpu", 8, 2, (2, 4, 128)),
    ],
)
def test_the_published_recipe(kind, count, slices, expected):
    config = pretrain.get_config()
    if expected is None:
        with pytest.raises(UserError, match=r"batch_rows=1024 cannot be cut .* for 96 devices .* such as 1152"):
            fit(config, devices(kind, count, slices))
        return
    got = fit(config, devices(kind, count, slices))
    assert chosen(got) == expected
    kept = [got.model[part].remat for part in ("vision", "causal", "llama")]
    assert kept == (
        ["full"] * 3 if kind == "cpu" else [config.train.fits[kind][p] for p in ("vision", "causal", "llama")]
    )
    assert chosen(config) == (0, 0, 0), "the config itself stays open"


def test_what_is_set_stays():
    config = pretrain.get_config()
    config.train.mesh.fsdp, config.optimizer.accumulate_steps, config.model.llama.remat = 32, 8, "none"
    got = fit(config, devices("v5p", 64))
    assert chosen(got) == (1, 32, 8)
    assert (got.model.vision.remat, got.model.llama.remat) == (config.train.fits.v5p.vision, "none")


def test_a_plan_with_rows_of_its_own_has_one_micro_batch():
    """The config's 1,024 rows, which 12 devices could not share, do not count."""
    assert chosen(fit(pretrain.get_config(), devices("v5p", 12), rows_per_device=2)) == (1, 4, 1)


def test_a_config_that_leaves_nothing_open_is_the_same():
    config = quickstart.get_config()
    assert fit(config, devices("cpu", 1)) is config


@given(st.integers(1, 600), st.integers(1, 64), st.integers(1, 8))
def test_micro_batches_are_equal_and_fit(batch, shards, rows):
    """Beside a search through all numbers of micro-batches."""
    config = pretrain.get_config()
    config.data.batch_rows = batch
    config.train.fits = {"v5e": {"rows": rows, "fsdp": 1}}
    fitting = [
        count for count in range(1, batch + 1) if batch % (count * shards) == 0 and batch // (count * shards) <= rows
    ]
    if not fitting:
        with pytest.raises(UserError, match="cannot be cut into micro-batches"):
            fit(config, devices("v5e", shards))
    else:
        got = fit(config, devices("v5e", shards))
        assert got.optimizer.accumulate_steps == min(fitting), f"expected {min(fitting)} of {fitting}"


def test_a_batch_that_is_measured_has_no_micro_batches_yet():
    config = pretrain.get_config()
    config.data.batch_rows = 0
    with pytest.raises(
        UserError, match=r"accumulate_steps=0 is chosen for a known batch, and config\.data\.batch_rows=0"
    ):
        fit(config, devices("v5e", 8))


def test_wrong_entries():
    config = pretrain.get_config()
    config.train.fits.v5e.rows = 0
    with pytest.raises(UserError, match=r"config\.train\.fits: rows=0, fsdp=128; expected 1 or more"):
        fit(config, devices("v5e", 8))
    config.train.fits = {"v5": {"rows": 1}}
    with pytest.raises(UserError, match=r"config\.train\.fits\.v5: no known kind of chip; expected some of v4, v5e"):
        fit(config, devices("v5e", 8))
    with pytest.raises(UserError, match=r"config\.train\.fits\.v5e has no field 'rwos'|config\.train\.fits\.v5e\.rwos"):
        config.train.fits = {"v5e": {"rwos": 1}}
        fit(config, devices("v5e", 8))
