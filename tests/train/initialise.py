"""Initialises from checkpoints on 8 simulated devices, and checks what every device holds.

    python -m tests.train.initialise FOLDER

The checkpoints are written here, with random values. Of a checkpoint that is read in part, the arrays of the other
leaves are deleted first: what is not wanted cannot be read.
"""

import dataclasses
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import decoder, models
from emu_jax.checkpoints import arrays
from emu_jax.checkpoints.store import pack_tokenizer
from emu_jax.checkpoints.streamed import LeafWriter
from emu_jax.models import emu, unet
from emu_jax.models.paths import flatten
from emu_jax.sharding import make_mesh, replicated, tree_shardings
from emu_jax.train.init_from import ENCODER, init_from_checkpoints
from emu_jax.train.state import TrainState
from emu_jax.train.tasks.decoder import TrainDecoder
from emu_jax.train.tasks.pretrain import Pretrain

TOKENS = 97  # of the checkpoints; not a multiple of the mesh's tensor axis, and 3 fewer than the run's


def model(tokens: int) -> ConfigDict:
    """4 M parameters, whose axes the mesh divides."""
    config = models.debug()
    config.vision.update({"width": 64, "heads": 4, "mlp_dim": 128, "layers": 2})
    config.causal.update({"width": 32, "heads": 4, "head_dim": 8, "mlp_dim": 64})
    config.llama.update({"width": 256, "heads": 8, "mlp_dim": 512, "layers": 4, "vocab_size": tokens})
    return config


def draw(shapes: dict) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.standard_normal(leaf.shape, np.float32) for name, leaf in shapes.items()}


def write(folder: Path, holds: str, config: ConfigDict, values: dict[str, np.ndarray], axes: dict) -> None:
    writer = LeafWriter(folder, {name: (value.shape, value.dtype) for name, value in values.items()}, axes)
    for number, (name, value) in enumerate(values.items()):
        writer.write(number, None, {name: value})
    writer.finish(holds, {"config": config.to_dict(), "tokenizer": pack_tokenizer(None), "source": {}})


def zeros(mesh: Mesh, axes: dict, shapes: dict) -> dict:
    """Parameters in the shardings of a mesh."""
    return jax.device_put(
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes), tree_shardings(mesh, axes, shapes)
    )


def with_prefix(tree: dict) -> dict:
    return {f"params/{name}": leaf for name, leaf in flatten(tree).items()}


def check_devices(name: str, array: jax.Array) -> None:
    """The parameters that FSDP divides: every device has a quarter at most."""
    for shard in array.addressable_shards:
        assert shard.data.size * 4 <= array.size, f"{name} {array.shape}: {shard.device} holds {shard.data.shape}"


def initialise(init: dict, config: ConfigDict, state: TrainState, parts: dict, axes: dict) -> dict[str, jax.Array]:
    """The initialised parameters by name; checks them, and the arrays that were read for them."""
    read, original = {}, arrays.read

    def recorded(*arguments):
        read.update(found := original(*arguments))
        return found

    arrays.read = recorded
    try:
        found = init_from_checkpoints(state, ConfigDict(config.to_dict() | {"init": init}), parts)
    finally:
        arrays.read = original
    params = with_prefix(found.params)
    assert read
    for name, array in [*read.items(), *params.items()]:
        if "embed" in axes.get(name, ()) and array.shape[axes[name].index("embed")] % 4 == 0:
            check_devices(name, array)
    return params


def main(folder: Path) -> None:
    assert len(jax.devices()) == 8
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    theirs, ours = (emu.EmuConfig.from_dict(model(tokens)) for tokens in (TOKENS, TOKENS + 3))
    config, axes = ConfigDict({"model": model(TOKENS)}), with_prefix(emu.logical_axes(theirs))
    values = draw(with_prefix(emu.abstract(theirs)))
    statistics = jax.tree.map(np.asarray, emu.initial_statistics(theirs))
    tracked = {f"statistics/{name}": value for name, value in statistics.items()}
    write(folder / "emu", "emu", config, values | tracked, axes)
    write(folder / "llama", "llama", config, {n: x for n, x in values.items() if n.startswith("params/llama/")}, axes)
    shutil.copytree(folder / "emu", folder / "encoder")
    for name in values:
        if not ENCODER.fullmatch(name):
            item, leaf = arrays.place(folder / "encoder", name)
            shutil.rmtree(item / leaf)

    with jax.set_mesh(mesh):
        fresh = zeros(mesh, emu.logical_axes(ours), emu.abstract(ours))
        state = TrainState(0, 0, fresh, None, jax.device_put(statistics, replicated(mesh)), None)
        run = ConfigDict({"model": model(TOKENS + 3)})
        for init, taken in (
            ({"emu": "emu"}, lambda name: True),
            ({"llama": "llama"}, lambda name: name.startswith("params/llama/")),
            ({"vision": "encoder"}, ENCODER.fullmatch),
        ):
            paths = {field: str(folder / path) for field, path in init.items()}
            params = initialise(paths, run, state, Pretrain.init_parts, axes)
            for name, array in params.items():
                expected = values[name] if taken(name) else np.zeros(array.shape, np.float32)
                found = np.asarray(array)[tuple(slice(size) for size in expected.shape)]  # without new tokens
                np.testing.assert_array_equal(found, expected, err_msg=f"{init} {name}")

        config = decoder.get_config()
        config.unet.update({"block_channels": (64, 64), "attention_blocks": (True, False), "heads": 2, "groups": 4})
        config.unet.update({"latent_channels": 4, "condition_dim": 32})
        sizes = unet.UNetConfig.from_dict(config.unet)
        axes = with_prefix({"unet": unet.logical_axes(sizes)})
        values = draw(with_prefix({"unet": unet.abstract(sizes)}))
        write(folder / "unet", "unet", config, values, axes)
        fresh = zeros(mesh, unet.logical_axes(sizes), unet.abstract(sizes))
        state = dataclasses.replace(state, params={"unet": fresh}, statistics={})
        params = initialise({"unet": str(folder / "unet")}, config, state, TrainDecoder.init_parts, axes)
        for name, array in params.items():
            np.testing.assert_array_equal(np.asarray(array), values[name], err_msg=name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
