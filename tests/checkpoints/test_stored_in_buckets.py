"""Converted weights in buckets: written, resumed and read as on a local disk; what does not answer is no damage."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from emu_jax import buckets
from emu_jax.checkpoints import arrays, streamed
from emu_jax.checkpoints.load import load_emu
from emu_jax.checkpoints.store import newest_folder, read_meta
from emu_jax.checkpoints.streamed import LeafReader, LeafWriter, resumable_folder
from emu_jax.errors import TransientError, UserError
from emu_jax.storage import copy_folder
from tests.buckets import FaultyProxy, free_port, gcs_environment, gcs_server
from tests.checkpoints.test_streamed import AXES, LEAVES, draw, write_all


def write(folder, values) -> None:
    with resumable_folder(folder, "job") as place:
        writer = LeafWriter(place, LEAVES, AXES)
        write_all(writer, values)
        writer.finish("emu", {})


@pytest.mark.parametrize("kind", ["bucket", "s3_bucket"])
def test_what_is_written_is_read(kind, request):
    folder, values = request.getfixturevalue(kind) / "w", draw()
    write(folder, values)
    reader = LeafReader(folder, read_meta(folder))
    for name, value in values.items():
        np.testing.assert_array_equal(reader[name], value)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {name: jax.ShapeDtypeStruct(*leaf, sharding=device) for name, leaf in LEAVES.items()}
    jax.tree.map(np.testing.assert_array_equal, arrays.read(arrays.StoredArrays(folder), wanted), values)
    assert sorted(path.name for path in folder.iterdir()) == ["meta", "params", "statistics"]
    with pytest.raises(UserError, match="it exists; name a new folder"):
        write(folder, values)


def test_a_run_s_checkpoint_is_read(trained, bucket):
    """As Orbax stores it: the arrays of an item in one store."""
    local = newest_folder(trained)
    copy_folder(local, bucket / "2")
    found, expected = load_emu(bucket / "2"), load_emu(local)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_an_interrupted_run_is_resumed(bucket, monkeypatch):
    monkeypatch.setattr(streamed, "RECORD_S", 0)
    folder, values = bucket / "w", draw()
    with pytest.raises(KeyboardInterrupt), resumable_folder(folder, "job") as place:
        write_all(LeafWriter(place, LEAVES, AXES), values, 2)
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="not a checkpoint"):
        read_meta(folder)
    with resumable_folder(folder, "job") as place:
        assert LeafWriter(place, LEAVES, AXES).done == {0, 1}
    write(folder / "again", values)
    with pytest.raises(KeyboardInterrupt), resumable_folder(folder / "other", "one"):
        raise KeyboardInterrupt
    with resumable_folder(folder / "other", "two") as place:
        assert [path.name for path in place.iterdir()] == [streamed.JOB]


def test_an_error_leaves_nothing_behind(bucket):
    with pytest.raises(UserError), resumable_folder(bucket / "w", "job") as place:
        write_all(LeafWriter(place, LEAVES, AXES), draw())
        raise UserError("damaged")
    assert not (bucket / "w").exists()


def test_a_flipped_bit_in_a_bucket_is_damage(bucket):
    write(bucket / "w", draw())
    file = bucket / "w" / "params" / "blocks.kernel" / "c.1.0.0"
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(UserError, match="corrupt: params/blocks/kernel has digest"):
        list(LeafReader(bucket / "w", read_meta(bucket / "w")).slices("params/blocks/kernel"))


def program(folder: str) -> str:
    """A program that writes a checkpoint of 10 objects, reads it in parts, and compares."""
    return f"""
import jax, numpy as np
from emu_jax.checkpoints import arrays
from emu_jax.checkpoints.store import read_meta
from emu_jax.checkpoints.streamed import LeafReader, LeafWriter, resumable_folder
from emu_jax.storage import as_path
names = [f"params/{{i:02}}" for i in range(2)]
value = np.random.default_rng(0).standard_normal((5, 64, 64), np.float32)
leaves = {{name: (value.shape, value.dtype) for name in names}}
axes = {{name: ("layers", "embed", "mlp") for name in names}}
with resumable_folder(as_path("{folder}"), "job") as place:
    writer = LeafWriter(place, leaves, axes)
    for number, name in enumerate(names):
        for layer in range(5):
            writer.write(5 * number + layer, layer, {{name: value[layer]}})
    writer.finish("emu", {{}})
reader = LeafReader(as_path("{folder}"), read_meta(as_path("{folder}")))
for name in names:
    np.testing.assert_array_equal(list(reader.slices(name)), value)
print("the same")
"""


def child(code: str, variables: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True)


@pytest.mark.slow
def test_a_faulty_network_loses_nothing(tmp_path):
    (tmp_path / "bucket").mkdir()
    port = free_port()
    with FaultyProxy(port, 0.3) as proxy, gcs_server(tmp_path, proxy.url, port):
        done = child(program("gs://bucket/w"), gcs_environment(proxy.url))
    assert done.stdout == "the same\n", done.stderr[-2000:]
    assert sum(proxy.counts.values()) - proxy.counts["ok"] > 5


SILENT = """
import numpy as np
from emu_jax.checkpoints import arrays
from emu_jax.storage import as_path
with arrays.errors_of(folder := as_path("gs://bucket/w")):
    arrays.create(folder, "params/x", (4,), np.dtype(np.float32), (None,))
"""


@pytest.mark.slow
def test_a_silent_bucket_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as server:  # it accepts connections, and says nothing
        variables = gcs_environment(f"http://127.0.0.1:{server.getsockname()[1]}") | {buckets.TIMEOUT: "1"}
        done = child(SILENT, variables | {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "1"})
    assert "TransientError: gs://bucket/w: storage does not answer (" in done.stderr, done.stderr[-2000:]


def test_a_bucket_that_is_down_is_no_damage(bucket, monkeypatch):
    write(bucket / "w", draw())
    meta = read_meta(bucket / "w")
    monkeypatch.setenv(buckets.TIMEOUT, "1")
    server = os.environ["TENSORSTORE_GCS_HTTP_URL"]
    with FaultyProxy(int(server.rpartition(":")[2]), 1.0, faults=("503", "reset")) as proxy:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", proxy.url)
        with pytest.raises(TransientError, match=r"gs://.*/w: storage does not answer \(.*start the command again"):
            LeafReader(bucket / "w", meta)["params/norm/scale"]
        with pytest.raises(TransientError, match="storage does not answer"), resumable_folder(bucket / "x", "job") as x:
            write_all(LeafWriter(x, LEAVES, AXES), draw())
    assert (bucket / "x" / streamed.JOB).is_file(), "the next start resumes"
