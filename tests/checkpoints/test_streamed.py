"""Leaves in slices: digests add up to those of training checkpoints, Orbax restores what is written, kills are safe."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.checkpoints import streamed
from emu_jax.checkpoints.digests import digest, on_devices, summaries
from emu_jax.checkpoints.store import read_meta
from emu_jax.checkpoints.streamed import LeafReader, LeafWriter, resumable_folder
from emu_jax.errors import UserError

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16, np.int8]
LEAVES = {
    "params/blocks/kernel": ((3, 4, 5), np.dtype(np.float32)),
    "params/norm/scale": ((6,), np.dtype(ml_dtypes.bfloat16)),
    "statistics/count": ((), np.dtype(np.float32)),
}
AXES = {"params/blocks/kernel": ("layers", "embed", "mlp")}


def draw() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(dtype) for name, (shape, dtype) in LEAVES.items()}


def write_all(writer: LeafWriter, values: dict[str, np.ndarray], upto: int = 99) -> None:
    """Slices in order, as a conversion does it."""
    kernel = values["params/blocks/kernel"]
    slices = [(layer, {"params/blocks/kernel": kernel[layer]}) for layer in range(3)]
    slices += [(None, {name: values[name]}) for name in LEAVES if name not in AXES]
    for step, (layer, part) in enumerate(slices[:upto]):
        if step not in writer.done:
            writer.write(step, layer, part)


@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_digests_are_those_of_training_checkpoints(shape, dtype, seed):
    shape = tuple(shape)
    value = (100 * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)
    expected, finite = on_devices({"x": jnp.asarray(value)})["x"]
    assert digest(value, shape) == expected
    assert summaries({"x": jnp.asarray(value)}) == ({"x": expected}, [] if finite else ["x"])
    assert digest(value.copy(order="F"), shape) == expected, "however it lies in memory"
    if shape:
        shares = [digest(value[layer], shape, layer) for layer in range(shape[0])]
        assert sum(shares) % 2**32 == expected


def test_orbax_restores_what_was_written(tmp_path):
    values = draw()
    writer = LeafWriter(tmp_path / "w", LEAVES, AXES)
    write_all(writer, values)
    writer.finish("emu", {"config": {}})
    target = {
        "blocks": {"kernel": jax.ShapeDtypeStruct((3, 4, 5), jnp.float32)},
        "norm": {"scale": jax.ShapeDtypeStruct((6,), jnp.bfloat16)},
    }
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "w" / "params", target)
    np.testing.assert_array_equal(restored["blocks"]["kernel"], values["params/blocks/kernel"])
    np.testing.assert_array_equal(restored["norm"]["scale"], values["params/norm/scale"])
    assert not (tmp_path / "w" / "progress.json").exists()


RESTORE = """
import sys, jax, numpy as np, orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
place = NamedSharding(mesh, P(None, "fsdp", None))
target = {"blocks": {"kernel": jax.ShapeDtypeStruct((3, 4, 5), np.float32, sharding=place)}}
target["norm"] = {"scale": jax.ShapeDtypeStruct((6,), jax.numpy.bfloat16, sharding=NamedSharding(mesh, P("tensor")))}
with ocp.StandardCheckpointer() as checkpointer:
    found = checkpointer.restore(sys.argv[1], target)
kernel = found["blocks"]["kernel"]
assert len(jax.devices()) == 8 and kernel.addressable_shards[0].data.shape == (3, 1, 5)
np.save(sys.argv[2], np.asarray(kernel))
"""


def test_eight_devices_restore_their_parts(tmp_path):
    values = draw()
    writer = LeafWriter(tmp_path / "w", LEAVES, AXES)
    write_all(writer, values)
    writer.finish("emu", {})
    command = [sys.executable, "-c", RESTORE, str(tmp_path / "w" / "params"), str(tmp_path / "found.npy")]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), values["params/blocks/kernel"])


def test_readers_see_slices_and_flipped_bits(tmp_path):
    values = draw()
    writer = LeafWriter(tmp_path / "w", LEAVES, AXES)
    write_all(writer, values)
    writer.finish("emu", {})
    meta = read_meta(tmp_path / "w")
    reader = LeafReader(tmp_path / "w", meta)
    np.testing.assert_array_equal(list(reader.slices("params/blocks/kernel")), values["params/blocks/kernel"])
    np.testing.assert_array_equal(reader["statistics/count"], values["statistics/count"])
    chunk = tmp_path / "w" / "params" / "blocks.kernel" / "c.1.0.0"
    data = bytearray(chunk.read_bytes())
    data[3] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(UserError, match="corrupt: params/blocks/kernel has digest"):
        list(reader.slices("params/blocks/kernel"))


@pytest.mark.parametrize("upto", range(6))
def test_an_interrupted_run_is_resumed(tmp_path, monkeypatch, upto):
    monkeypatch.setattr(streamed, "RECORD_S", 0)
    values = draw()
    write_all(LeafWriter(tmp_path / "w", LEAVES, AXES), values, upto)
    writer = LeafWriter(tmp_path / "w", LEAVES, AXES)
    assert writer.done == set(range(min(upto, 5)))
    assert not writer.complete
    write_all(writer, values)
    writer.finish("emu", {})
    meta = read_meta(tmp_path / "w")
    reader = LeafReader(tmp_path / "w", meta)
    for name, value in values.items():
        np.testing.assert_array_equal(reader[name], value)
    assert LeafWriter(tmp_path / "w", LEAVES, AXES).complete


def test_a_folder_gets_its_name_when_it_is_complete(tmp_path):
    with resumable_folder(tmp_path / "w", "job") as place:
        (place / "x").write_text("1")
        assert not (tmp_path / "w").exists()
    assert [file.name for file in (tmp_path / "w").iterdir()] == ["x"]
    assert not (tmp_path / "w.partial").exists()


def test_a_folder_is_resumed_by_the_same_job_alone(tmp_path):
    for job, found in (("one", False), ("one", True), ("another", False)):
        with pytest.raises(KeyboardInterrupt), resumable_folder(tmp_path / "w", job) as place:
            assert (place / "x").exists() == found
            (place / "x").write_text("1")
            raise KeyboardInterrupt


def test_an_error_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="damaged"), resumable_folder(tmp_path / "w", "job"):
        raise UserError("damaged")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_refused(tmp_path):
    with pytest.raises(UserError, match="it exists; name a new folder"), resumable_folder(tmp_path, "job"):
        pass
