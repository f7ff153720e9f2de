"""Which hosts read which shards of the stream, in the order in which a pod's devices hold the rows of a batch."""

import importlib.util
import json

import pytest

from emu_jax.config import load_config
from emu_jax.data.pipeline import rows_of_shards
from emu_jax.errors import UserError
from emu_jax.sharding import make_mesh
from emu_jax.train.global_batch import row_parts
from emu_jax.train.tasks.task import make_task
from emu_jax.workdir import with_recorded_shards
from tests.train import tiny

ROWS = 1024  # of a batch, as in configs/pretrain.py
# The host of each part of a batch on v5e-256, as libtpu and `make_mesh` order its chips: a host has 2 x 2 of them.
V5E = [x // 2 * 8 + y // 2 for y in range(16) for x in range(16)]


def hosts_of_shards(hosts: list[int], shards: int) -> list[set[int]]:
    """The hosts that read each shard, where `hosts` hold equal parts of a batch."""
    readers: list[set[int]] = [set() for _ in range(shards)]
    for host in set(hosts):
        own = [row for row in range(ROWS) if hosts[row * len(hosts) // ROWS] == host]
        for shard in rows_of_shards(own, ROWS // shards):
            readers[shard].add(host)
    return readers


@pytest.mark.parametrize("shards, most", [(256, 1), (512, 1), (128, 1), (64, 2), (16, 8)])
def test_hosts_that_read_a_shard_on_v5e_256(shards, most):
    assert max(map(len, hosts_of_shards(V5E, shards))) == most


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: emu-jax[plan]")
@pytest.mark.parametrize(
    "name, sizes",
    [("v5e:16x16", {"fsdp": -1}), ("v5e:16x16", {"data": 2, "fsdp": 128}), ("v5p:4x4x4", {"data": 4, "fsdp": 16})],
)
def test_by_the_order_of_the_devices_each_record_is_read_by_one_host(name, sizes):
    from emu_jax.plan.topology import describe

    mesh = make_mesh(sizes, describe(name).devices)
    hosts = [device.process_index for device in mesh.devices.flat]
    if sizes == {"fsdp": -1}:
        assert hosts == V5E
    assert row_parts(mesh) == len(hosts)
    readers = hosts_of_shards(hosts, row_parts(mesh))
    assert all(len(found) == 1 for found in readers)


def test_no_number_of_shards_is_that_of_the_mesh_and_is_recorded(tmp_path, documents):
    config = load_config(tiny.__file__, [f"--config.data.source={documents}", "--config.data.shards=0"])
    mesh = make_mesh({})
    inputs = make_task(config, mesh)[1]
    inputs.stream.close()
    assert inputs.config.data.shards == row_parts(mesh) == 1 and config.data.shards == 0
    assert with_recorded_shards(config, tmp_path).data.shards == 0  # a new run
    (tmp_path / "config.json").write_text(json.dumps({"data": {"shards": 4}}))
    assert with_recorded_shards(config, tmp_path).data.shards == 4
    config.data.shards = 2
    assert with_recorded_shards(config, tmp_path).data.shards == 2  # `check_workdir` refuses it
    (tmp_path / "config.json").write_text("{")
    config.data.shards = 0
    with pytest.raises(UserError, match="not JSON"):
        with_recorded_shards(config, tmp_path)
