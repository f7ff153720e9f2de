"""The logical axis rules, and meshes that do not fit."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from configs import models
from emu_jax.errors import UserError
from emu_jax.models import emu
from emu_jax.sharding import AXES, LOGICAL_AXIS_RULES, make_mesh, partition_spec
from emu_jax.train.global_batch import batch_shardings


def abstract_mesh(data: int, fsdp: int, tensor: int, context: int = 1, slices: int = 1) -> AbstractMesh:
    return AbstractMesh((slices, data, fsdp, tensor, context), AXES, axis_types=(AxisType.Auto,) * 5)


def test_axes_map_by_the_logical_axis_rules():
    mesh = abstract_mesh(2, 4, 2)
    assert partition_spec(("layers", "embed", "mlp"), (3, 64, 128), mesh) == PartitionSpec(None, "fsdp", "tensor")
    assert partition_spec(("batch", "sequence"), (16, 128), mesh) == PartitionSpec(("slice", "data", "fsdp"), None)
    mesh = abstract_mesh(1, 4, 1, context=2, slices=2)
    assert partition_spec(("batch", "sequence"), (16, 128), mesh) == PartitionSpec(("slice", "data", "fsdp"), "context")
    assert partition_spec(("embed", "mlp"), (64, 128), mesh) == PartitionSpec("fsdp", None), "replicated over slices"


def test_images_spread_over_as_many_devices_as_divide_them():
    mesh = abstract_mesh(1, 4, 1, context=2)
    whole = ("slice", "data", "fsdp", "context")
    assert partition_spec(("image", None), (16, 3), mesh) == PartitionSpec(whole, None)
    assert partition_spec(("image", None), (12, 3), mesh) == PartitionSpec(whole[:3], None)
    assert partition_spec(("image", None), (6, 3), mesh) == PartitionSpec(None, None)


class Chip:
    """The attributes of a TPU device that meshes use."""

    def __init__(self, number: int, slice_index: int):
        self.id, self.slice_index, self.platform, self.device_kind = number, slice_index, "cpu", "cpu"
        self.process_index = slice_index


def test_slices_are_the_outermost_axis():
    chips = [Chip(number, number % 2) for number in range(8)]
    mesh = make_mesh({"slice": 2, "fsdp": -1}, chips)
    assert mesh.devices.shape == (2, 1, 4, 1, 1)
    assert [{chip.slice_index for chip in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(UserError, match=r"the devices are in 2 slices; set config\.train\.mesh\.slice to it"):
        make_mesh({"fsdp": -1}, chips)


def test_a_dimension_that_does_not_divide_is_replicated():
    assert partition_spec(("embed", "mlp"), (6, 128), abstract_mesh(1, 4, 2)) == PartitionSpec(None, "tensor")


def test_the_published_model_splits_64_ways():
    """Every large parameter of the 14 B model is sharded over fsdp=16 x tensor=4; little is replicated."""
    config = emu.EmuConfig.from_dict(models.emu_14b())
    mesh = abstract_mesh(1, 16, 4)
    leaves = jax.tree.leaves(emu.abstract(config))
    names = jax.tree.leaves(emu.logical_axes(config), is_leaf=lambda node: isinstance(node, tuple))
    assert {axis for axes in names for axis in axes} <= LOGICAL_AXIS_RULES.keys()
    total = split = 0
    for leaf, axes in zip(leaves, names, strict=True):
        spec = partition_spec(axes, leaf.shape, mesh)
        ways = np.prod([mesh.shape[axis] for axis in spec if axis is not None], initial=1)
        total += leaf.size
        split += leaf.size / ways
    assert split < 1.05 * total / 64, f"{split:,.0f} of {total:,} parameters on a device"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"model": 2},
            r"config\.train\.mesh\.model is not a mesh axis; choose among slice, data, fsdp, tensor, context",
        ),
        ({"data": -1, "fsdp": -1}, r"at most one is -1"),
        ({"data": 0}, r"sizes are 1 or more"),
        (
            {"data": 3, "fsdp": -1},
            r"\(slice=1, data=3, fsdp=-1, tensor=1, context=1\) does not multiply to the 1 available devices",
        ),
    ],
)
def test_meshes_that_do_not_fit(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(sizes, jax.devices()[:1])


def test_rows_must_divide_over_the_devices():
    with pytest.raises(UserError, match=r"config\.data\.batch_rows=6 does not divide over 8 data-parallel devices"):
        batch_shardings(abstract_mesh(4, 2, 1), {"tokens": np.zeros((6, 4))})
