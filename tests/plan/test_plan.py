"""Plans: collectives read off a program's text, slices that are not, and a small step through the TPU compiler."""

import importlib.util

import pytest
from jax.sharding import AbstractMesh, AxisType

from emu_jax.cli import main
from emu_jax.errors import UserError
from emu_jax.plan.program import collectives, kernel_flops
from emu_jax.plan.topology import describe
from emu_jax.sharding import AXES
from tests.train import tiny

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install '.[plan]'")

# As the compiler writes them, shortened; two data-parallel groups of four devices.
MESH = AbstractMesh((1, 2, 4, 1, 1), AXES, axis_types=(AxisType.Auto,) * 5)
PROGRAM = """
HloModule jit_f
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}
%body (p: bf16[256,1024]) -> bf16[256,1024] {
  %piece.1 = f32[400]{0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}
  %piece.2 = f32[400]{0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}
}
%condition (p: bf16[256,1024]) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(40)
}
%all-reduce-scatter.1 (input: bf16[1024,1024]) -> bf16[256,1024] {
  %all-reduce.2 = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %slice = bf16[256,1024]{1,0} dynamic-slice(%all-reduce.2, %x, %y), dynamic_slice_sizes={256,1024}
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %while.1 = bf16[256,1024] while(%x), condition=%condition, body=%body
  %fusion = bf16[256,1024] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %all-gather.1 = bf16[1024,1024]{1,0:T(8,128)} all-gather(%c), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}
  %all-gather.2 = (f32[64], f32[256]) all-gather-start(%c), replica_groups=[2,4]<=[8], dimensions={0}
  %done = f32[256] all-gather-done(%all-gather.2)
  %reduce-scatter.3 = f32[100]{0} reduce-scatter(%d), replica_groups=[4,2]<=[2,4]T(1,0)
  %all-reduce.4 = (f32[]{:T(128)}, bf16[2]) all-reduce(%e, %f), replica_groups={}
  %one = f32[512] all-reduce(%f), replica_groups={{0},{1},{2},{3}}
  ROOT %collective-permute.5 = f32[50] collective-permute(%g), source_target_pairs={{0,1},{1,2}}
}
"""


def test_collectives_of_a_program():
    assert collectives(PROGRAM, MESH) == {
        "fsdp reduce-scatter": 0.75 * 2 * 1024 * 1024,
        "fsdp all-gather": 0.75 * 2 * 1024 * 1024 + 0.75 * 4 * 256 + 40 * 0.75 * 4 * 400,
        "data reduce-scatter": 0.5 * 4 * 200,
        "data+fsdp all-reduce": 2 * 7 / 8 * (4 + 2 * 2),
        "fsdp collective-permute": 200.0,
    }


KERNELS = """
  %splash_mha_fwd_segmented_residuals.1 = (f32[2,64,128], f32[2,64,128], bf16[2,4,256,128]) custom-call(%q, %k)
  %splash_mha_dkv_segmented_no_residuals.1 = (f32[2,64,128], bf16[4,2,4,256,128], bf16[2,4,256,128]) custom-call(%q)
  %splash_mha_fwd_no_residuals.1 = (f32[2,64,128], f32[2,64,128], bf16[2,4,256,128]) custom-call(%q, %k)
"""


def test_flops_of_attention_kernels():
    product = 2 * 2 * 4 * 256 * 256 * 128
    causal = 10 / 16  # four blocks a side, on the diagonal and below
    assert kernel_flops(KERNELS, 1) == product * ((2 + 5) * causal + 2)
    assert kernel_flops(KERNELS.replace("[2,", "[").replace("[4,2,", "[4,"), 1) == product / 2 * (
        (2 + 5) * causal + 2
    ), "a single row"
    grouped = KERNELS.replace("bf16[2,4,256,128]) custom-call(%q)\n", "bf16[2,1,256,128]) custom-call(%q)\n")
    assert kernel_flops(grouped, 1) == kernel_flops(KERNELS, 1), "one head of keys for four of queries"


@pytest.mark.parametrize("name", ["v5p", "v5p:4", "v9:2x2", "v5p:2x2x2x2", "v5e:ax2"])
def test_names_that_are_no_topology(name):
    with pytest.raises(
        UserError, match=r"unknown; expected a generation and the chips along its axes, as in v5p:4x4x4"
    ):
        describe(name)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is there")
def test_without_the_compiler_the_error_names_the_extra(capsys):
    assert main(["plan", "--config", tiny.__file__, "--topology", "v5p:2x2x1"]) == 2
    error = capsys.readouterr().err
    assert "the TPU compiler is not installed; run `pip install 'emu-jax[plan]'`" in error and error.count("\n") == 1


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v5e:2x2"])
def test_a_small_step_is_planned(capsys, topology, tuned):
    """Also that the compiler knows the options which `tuned` gives it: it refuses others."""
    arguments = ["plan", "--config", "configs/pretrain.py:14b", "--topology", topology, "--rows-per-device", "1"]
    arguments += [f"--config.train.tuned={tuned}"]
    small = {"vision.width": 256, "vision.heads": 4, "vision.mlp_dim": 512, "vision.layers": 2, "causal.layers": 2}
    small |= {"llama.width": 512, "llama.heads": 8, "llama.mlp_dim": 1024, "llama.layers": 3}
    arguments += ["--config.train.mesh.data=1", "--config.train.mesh.fsdp=-1"]
    assert main([*arguments, *(f"--config.model.{name}={value}" for name, value in small.items())]) == 0
    text = capsys.readouterr().out
    assert "fits" in text and "MFU" in text, text


@needs_libtpu
def test_slices_that_the_compiler_does_not_know():
    with pytest.raises(UserError, match=r"topology=v5p:3x5x7: the TPU compiler knows no such slice"):
        describe("v5p:3x5x7")
