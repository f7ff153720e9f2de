"""Chunks follow the logical axes: a host reads little more than its own part of the weights, whatever the mesh."""

import itertools
import math

import jax
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import AbstractMesh, AxisType

from configs import models
from emu_jax.checkpoints import arrays
from emu_jax.models import emu
from emu_jax.models.paths import flatten
from emu_jax.sharding import AXES, partition_spec

GB = 1e9
# Name -> the mesh, the chips of a host, and the rows of the torus: v5e's hosts are squares of 2 x 2 chips.
PODS = {
    "v5e-256, data 2 x fsdp 128": ({"data": 2, "fsdp": 128}, 4, 16),
    "v5e-256, fsdp 256": ({"fsdp": 256}, 4, 16),
    "v5p-128, data 4 x fsdp 16": ({"data": 4, "fsdp": 16}, 4, 0),
    "v5e-8, tensor 8": ({"tensor": 8}, 8, 0),
}


def hosts(devices: int, chips: int, width: int) -> list[list[int]]:
    """The places in the mesh of each host's chips: consecutive, or squares of a grid with this width."""
    if not width:
        return [list(range(first, first + chips)) for first in range(0, devices, chips)]
    corners = itertools.product(range(0, devices // width, 2), range(0, width, 2))
    return [[row * width + column + i for i in (0, 1, width, width + 1)] for row, column in corners]


def parts(shape, axes, mesh: AbstractMesh) -> list[tuple[tuple[int, int], ...]]:
    """The part of an array of every device in the mesh's order: start and stop along every axis."""
    spec = partition_spec(axes, shape, mesh)
    shards = [1 if name is None else mesh.shape[name] for name in spec]
    found = []
    for place in np.ndindex(*mesh.axis_sizes):
        at = dict(zip(mesh.axis_names, place, strict=True))
        numbers = [0 if name is None else at[name] for name in spec]
        pieces = [size // count for size, count in zip(shape, shards, strict=True)]
        found.append(tuple((n * piece, (n + 1) * piece) for n, piece in zip(numbers, pieces, strict=True)))
    return found


def bytes_read(part, itemsize: int, stored: list[int], chunk: list[int]) -> int:
    """Bytes of the chunks that a part touches, and of the indices of their objects."""

    def touched(shape: list[int]) -> int:
        return math.prod(-(-stop // size) - start // size for (start, stop), size in zip(part, shape, strict=True))

    per_object = math.prod(-(-outer // inner) for outer, inner in zip(stored, chunk, strict=True))
    return touched(chunk) * math.prod(chunk) * itemsize + touched(stored) * (16 * per_object + 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pod", PODS)
def test_a_host_reads_its_own_part_of_the_published_size(pod, dtype):
    sizes, chips, width = PODS[pod]
    shape = [sizes.get(name, 1) for name in AXES]
    mesh = AbstractMesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    config = emu.EmuConfig.from_dict(models.emu_14b())
    axes, itemsize = flatten(emu.logical_axes(config)), np.dtype(dtype).itemsize
    needed, read = np.zeros(math.prod(shape) // chips), np.zeros(math.prod(shape) // chips)
    for name, leaf in flatten(emu.abstract(config)).items():
        stored, chunk = arrays.chunk_shapes(leaf.shape, itemsize, axes[name])
        of_device = parts(leaf.shape, axes[name], mesh)
        for host, places in enumerate(hosts(math.prod(shape), chips, width)):
            own = {of_device[place] for place in places}  # each part once, for all devices that hold it
            needed[host] += sum(math.prod(stop - start for start, stop in part) for part in own) * itemsize
            for region in set(arrays.regions(own).values()):
                read[host] += bytes_read(region, itemsize, stored, chunk)
    worst = np.argmax(read / needed)
    found = f"{pod}, {dtype}: a host needs {needed[worst] / GB:.2f} GB and reads {read[worst] / GB:.2f} GB"
    print(f"{found}; all hosts read {read.sum() / GB:.1f} GB")
    assert read[worst] <= 1.05 * needed[worst], found


@pytest.mark.parametrize(
    ("shape", "itemsize", "axes", "stored", "chunk"),
    [
        ((40, 5120, 5120), 4, ("layers", "heads", "embed"), [1, 5120, 1280], [1, 640, 20]),
        ((32004, 5120), 2, ("vocab", "embed"), [32004, 320], [8001, 20]),  # 4 is all that divides the vocabulary
        ((40, 1408, 1408), 4, ("layers", "heads", "embed"), [1, 1408, 1408], [1, 1408, 11]),  # 128 parts, not 256
        ((3, 8, 8), 4, ("layers", "embed", "mlp"), [1, 8, 8], [1, 8, 8]),  # too small to divide
        ((300_000_000,), 1, (None,), [18_750_000], [18_750_000]),  # no logical axis
        ((7, 0), 4, ("layers", None), [1, 1], [1, 1]),
        ((), 4, (), [], []),
    ],
)
def test_chunk_shapes(shape, itemsize, axes, stored, chunk):
    assert arrays.chunk_shapes(shape, itemsize, axes) == (stored, chunk)


def test_a_part_is_read_by_ranges_of_bytes(tmp_path):
    """Half of the rows and a quarter of the columns of 4 MB: TensorStore reads 0.5 MB, and the index."""
    name, shape, axes = "params/kernel", (2, 512, 1024), ("layers", "embed", "mlp")
    value = np.random.default_rng(0).standard_normal(shape, np.float32)
    array = arrays.create(tmp_path, name, shape, value.dtype, axes)
    for layer in range(2):
        array[layer].write(value[layer]).result()
    (tmp_path / "params" / arrays.ITEM_FILE).write_text('{"use_ocdbt": false, "use_zarr3": true}')
    opened = arrays.StoredArrays(tmp_path).open(name).result()
    before = file_bytes()
    np.testing.assert_array_equal(opened[:, :256, :256].read().result(), value[:, :256, :256])
    stored, chunk = arrays.chunk_shapes(shape, 4, axes)
    assert (stored, chunk) == ([1, 512, 1024], [1, 8, 1024])
    assert file_bytes() - before == bytes_read(((0, 2), (0, 256), (0, 256)), 4, stored, chunk)


def file_bytes() -> int:
    (metric,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for value in metric["values"])


def test_an_array_of_another_shape_is_damage(tmp_path):
    array = arrays.create(tmp_path, "params/x", (4,), np.dtype(np.float32), ("norm",))
    array.write(np.arange(4, dtype=np.float32)).result()
    (tmp_path / "params" / arrays.ITEM_FILE).write_text('{"use_ocdbt": false, "use_zarr3": true}')
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"params/x": jax.ShapeDtypeStruct((5,), np.float32, sharding=device)}
    with pytest.raises(ValueError, match=r"params/x is float32\[4\], its metadata say otherwise"):
        arrays.read(arrays.StoredArrays(tmp_path), wanted)
