"""`model.float32_gradients`: weight gradients that are never rounded to bfloat16, in a product or over devices."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import models
from emu_jax.models import emu
from emu_jax.models.layers import Array, add_float32, project, project_float32
from emu_jax.models.paths import flatten
from emu_jax.sharding import make_mesh, tree_shardings
from emu_jax.train.global_batch import batch_shardings
from tests.models.reference_batch import reference_batch

ROOT = Path(__file__).parents[2]
IDS = emu.SpecialIds(pad=64, img=65, img_end=66, image=67)
ROW = [1, 5, 9, IDS.img, *[IDS.image] * 4, IDS.img_end, 12, 30, 31, 2]
# Gradients that are always float32: norms compute in float32, the token head sums chunks, tokens are looked up.
ALWAYS_FLOAT32 = re.compile(r".*norm.*|ln_visual/.*|llama/(lm_head/kernel|embed/embedding)|causal/relative_bias")


def config(on: bool, remat: str = "none") -> emu.EmuConfig:
    size = models.debug()
    for part in (size.vision, size.causal, size.llama):
        part.update({"layers": 1, "remat": remat})
    size.llama.lora_rank = 2
    return emu.EmuConfig.from_dict(size.to_dict() | {"dtype": "bfloat16", "float32_gradients": on})


def batch(rows: int) -> emu.Batch:
    images = np.random.default_rng(0).integers(0, 256, (rows, 1, 16, 16, 3), np.uint8)
    tokens = np.array([ROW] * rows, np.int32)
    return reference_batch(jnp.asarray(images), jnp.asarray(tokens), jnp.ones_like(tokens), IDS)


def gradients(c: emu.EmuConfig) -> tuple[float, dict[str, np.ndarray]]:
    """The loss and its gradients by path, rounded wherever the program rounds: the CPU compiler may skip that."""
    params = jax.tree.map(lambda leaf: leaf + 0.01, emu.init(c, jax.random.key(0)))  # adapters of 0 have no gradient
    arguments = params, emu.initial_statistics(c), batch(2)
    objective = jax.jit(jax.value_and_grad(emu.loss, has_aux=True), static_argnames=("config", "ids"))
    compiled = objective.lower(*arguments, config=c, ids=IDS).compile({"xla_allow_excess_precision": False})
    (loss, _), grads = compiled(*arguments)
    return float(loss), {name: np.asarray(leaf) for name, leaf in flatten(grads).items()}


def rounded(value: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(value).astype(jnp.bfloat16).astype(jnp.float32))


def test_a_product_s_gradient_beside_float64():
    """Over 2,048 positions: bfloat16 keeps 8 bits of the sum, float32 as many as its additions preserve."""
    rng = np.random.default_rng(0)
    x, gradient = (jnp.asarray(rng.normal(1.0, 1.0, (4, 512, 24)), jnp.bfloat16) for _ in range(2))
    kernel, bias = jnp.asarray(rng.normal(size=(24, 24)), jnp.float32), jnp.zeros(24)
    wide_x, wide = (np.asarray(value, np.float64).reshape(-1, 24) for value in (x, gradient))

    def error(function, weight: Array, expected: np.ndarray) -> float:
        got = jax.vjp(function, weight)[1](gradient)[0]
        assert got.dtype == jnp.float32
        return float(np.abs((np.asarray(got, np.float64) - expected) / expected).max())

    assert error(lambda kernel: project(x, kernel.astype(jnp.bfloat16)), kernel, wide_x.T @ wide) > 1e-3
    assert error(lambda kernel: project_float32(x, kernel), kernel, wide_x.T @ wide) < 1e-5
    assert error(lambda bias: x + bias.astype(jnp.bfloat16), bias, wide.sum(0)) > 1e-3
    assert error(lambda bias: add_float32(x, bias), bias, wide.sum(0)) < 1e-5
    # The gradient of x and the product itself do not change.
    for one, other in zip(
        jax.vjp(lambda x: project_float32(x, kernel), x)[1](gradient),
        jax.vjp(lambda x: project(x, kernel.astype(jnp.bfloat16)), x)[1](gradient),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(project_float32(x, kernel), project(x, kernel.astype(jnp.bfloat16)))


@pytest.mark.slow
def test_gradients_of_the_model_are_the_same_but_not_rounded():
    (loss_off, off), (loss_on, on) = gradients(config(False)), gradients(config(True))
    assert loss_on == loss_off
    weights = [name for name in on if not ALWAYS_FLOAT32.fullmatch(name)]
    assert len(weights) == 42, sorted(weights)
    for name in weights:
        assert on[name].dtype == off[name].dtype == np.float32
        assert (off[name] == rounded(off[name])).all(), f"{name}: without the switch every value is a bfloat16"
        assert (on[name] != rounded(on[name])).mean() > 0.1, f"{name}: with it many are none"
        few_roundings = np.abs(off[name]).max() * 2**-6  # of 2^-9 each: without it, biases are added up in bfloat16
        np.testing.assert_allclose(on[name], off[name], atol=few_roundings, err_msg=name)


def test_what_remat_keeps_stays_the_same():
    """Both gradients have the same number of products, under a policy that saves products."""
    counts = []
    for on in (False, True):
        c = config(on, remat="dots")
        lowered = jax.jit(jax.grad(emu.loss, has_aux=True), static_argnames=("config", "ids")).lower(
            emu.abstract(c), emu.initial_statistics(c), batch(2), config=c, ids=IDS
        )
        counts.append(lowered.as_text().count("stablehlo.dot_general"))
    assert counts[0] == counts[1] > 50


def partitioned(on: bool) -> None:
    """Compiles the gradient for eight devices under FSDP; the caller reads the program that XLA_FLAGS dump."""
    c = dataclasses.replace(config(on), unroll=True)
    mesh = make_mesh({"fsdp": 8})
    params, some = emu.abstract(c), jax.eval_shape(lambda: batch(8))
    layout = tree_shardings(mesh, emu.logical_axes(c), params)
    params, some = (
        jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
        for tree, shardings in ((params, layout), (some, batch_shardings(mesh, some)))
    )

    def objective(params: dict, batch: emu.Batch) -> dict:
        return jax.grad(emu.loss, has_aux=True)(params, emu.initial_statistics(c), batch, config=c, ids=IDS)[0]

    with jax.set_mesh(mesh):
        jax.jit(objective, out_shardings=layout).lower(params, some).compile()


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.slow
def test_gradients_are_reduced_over_devices_in_that_dtype(on, tmp_path):
    """Reads the partitioner's output: later passes widen bfloat16 on CPUs, but not on accelerators."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    flags += f" --xla_dump_to={tmp_path} --xla_dump_hlo_pass_re=spmd-partitioning"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    code = f"from tests.models.test_float32_gradients import partitioned; partitioned({on})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*jit_objective*after_spmd-partitioning*.txt")
    reductions = re.findall(r"= (\w+)\[([\d,]*)\]\S* (?:all-reduce|reduce-scatter)\(", file.read_text())
    kernels = [dtype for dtype, shape in reductions if "," in shape]
    print(reductions)
    # 32 kernels of linear maps, the queries and the positions.
    assert kernels.count("bf16") == (0 if on else 34), reductions
