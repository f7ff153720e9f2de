"""A run resumes from the newest checkpoint that is not damaged, by itself, and from no wrong values.

The campaigns (slow) damage every file of the newest of two checkpoints; run with -s, they print what became of each.
"""

import collections
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from emu_jax.checkpoints.digests import digests
from emu_jax.checkpoints.load import load_emu
from emu_jax.checkpoints.store import COMMIT_FILE, CorruptCheckpoint, open_checkpoint, read_meta
from emu_jax.config import load_config
from emu_jax.errors import UserError
from emu_jax.sharding import make_mesh
from emu_jax.train import distributed
from emu_jax.train.checkpoint import Checkpoints, Restored, Rotation
from emu_jax.train.loop import train
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.state import TrainState, abstract_state
from emu_jax.train.tasks.task import Inputs, make_task
from tests.train import tiny

FLIPS, META_FLIPS = 60, 240


def config(documents: Path, *overrides: str):
    words = ["--config.train.steps=2", "--config.train.checkpoint_every=1", *overrides]
    return load_config(tiny.__file__, [f"--config.data.source={documents}", *words])


@pytest.fixture(scope="module")
def two(tmp_path_factory, documents) -> Path:
    """The work directory of a run with the checkpoints 1 and 2; tests must not change it."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    train(config(documents), workdir)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "2"]
    return workdir


@pytest.fixture(scope="module")
def target(documents) -> tuple[Mesh, TrainState, Inputs]:
    settings = config(documents)
    mesh = make_mesh(settings.train.mesh)
    task, inputs = make_task(settings, mesh)
    return mesh, abstract_state(task, OptimizerConfig.from_dict(settings.optimizer), mesh), inputs


def restore(workdir: Path, target) -> Restored:
    mesh, state, inputs = target
    with Checkpoints(workdir, Rotation(2), timeout=60) as checkpoints, jax.set_mesh(mesh):
        found = checkpoints.restore(state, inputs.tokenizer)
        assert checkpoints.latest_step() == 2, "restoring moves nothing"
        checkpoints.set_aside(found.corrupt)
        assert checkpoints.latest_step() == found.step
    return found


def saved(folder: Path) -> dict[str, int]:
    return read_meta(folder)["digests"]


def values(state: TrainState) -> dict[str, int]:
    optimizer = {name: getattr(state, name) for name in ("step", "total_steps", "opt_state", "bad_steps")}
    return digests({"params": state.params, "statistics": state.statistics, "optimizer": optimizer})


@pytest.mark.slow
def test_a_corrupt_newest_checkpoint_is_set_aside(two, documents, tmp_path, capsys):
    """The run resumes from the one before and ends as if nothing had been; loading weights is an error."""
    workdir = tmp_path / "run"
    shutil.copytree(two, workdir)
    newest = workdir / "checkpoints" / "2"
    expected = saved(newest)
    victim = max((path for path in (newest / "params").rglob("d/*")), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=f"; the checkpoint before it is {newest.with_name('1')}$"):
        load_emu(workdir)
    state = train(config(documents), workdir)
    assert int(state.step) == 2 and saved(newest) == expected
    aside = workdir / "corrupt" / "2"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "corrupt" in line]
    assert line.startswith(f"{newest}: the checkpoint is corrupt: ") and line.endswith(f"; it is moved to {aside}")
    assert (aside / victim.relative_to(newest)).read_bytes() == data
    assert open_checkpoint(workdir).folder == newest


@pytest.mark.long
def test_a_corrupt_checkpoint_in_a_bucket_is_set_aside(two, target, bucket):
    for file in (two / "checkpoints").rglob("*"):
        if file.is_file():
            (bucket / file.relative_to(two)).write_bytes(file.read_bytes())
    for step in ("1", "2"):
        (bucket / "checkpoints" / step / COMMIT_FILE).write_text("")
    metadata = bucket / "checkpoints" / "2" / "meta" / "metadata"
    metadata.write_text("{}")
    for _ in range(2):
        found = restore(bucket, target)
        assert found.step == 1 and values(found.state) == saved(two / "checkpoints" / "1")
        assert not metadata.exists()
        metadata.parent.parent.joinpath(COMMIT_FILE).write_text("")  # a folder of that name is damaged once more
    aside = bucket / "corrupt"
    assert sorted(path.name for path in aside.iterdir()) == ["2", "2.2"]
    assert (aside / "2" / "meta" / "metadata").read_text() == "{}"


def test_where_every_checkpoint_is_corrupt_nothing_is_moved(two, documents, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two, workdir)
    for step in ("1", "2"):
        (workdir / "checkpoints" / step / "meta" / "metadata").write_text("{}")
    expected = f"^{workdir}/checkpoints: all 2 checkpoints are corrupt, the newest because meta/metadata does not have "
    for _ in range(2):  # a second start does not begin anew
        with pytest.raises(UserError, match=expected):
            train(config(documents), workdir)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "2"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_not_saved(two, target, tmp_path, bad):
    workdir = tmp_path / "run"
    shutil.copytree(two, workdir)
    mesh, abstract, inputs = target
    with Checkpoints(workdir, Rotation(2), timeout=60) as checkpoints, jax.set_mesh(mesh):
        state = checkpoints.restore(abstract, inputs.tokenizer).state
        scale = state.params["ln_visual"]["scale"]
        params = state.params | {"ln_visual": state.params["ln_visual"] | {"scale": scale.at[3].set(bad)}}
        state = dataclasses.replace(state, params=params, step=state.step + 1)
        expected = (
            "step 3: the state is not finite in params/ln_visual/scale; it is not saved, and the newest checkpoin"
        )
        with pytest.raises(distributed.Diverged, match=f"^{expected}t is that of step 2: "):
            checkpoints.save(state, "{}", inputs.tokenizer, {}, holds="emu")
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "2"]


def outcome(workdir: Path, two: Path, target) -> str:
    """What became of a run whose newest checkpoint was damaged: harmless, or it fell back."""
    found = restore(workdir, target)
    assert values(found.state) == saved(two / "checkpoints" / str(found.step)), "wrong values"
    assert found.meta == read_meta(two / "checkpoints" / str(found.step)), "other metadata"
    if found.step == 2:
        return "harmless"
    assert found.step == 1 and list(found.corrupt) == [2] and "\n" not in found.corrupt[2]
    return "fell back"


def damaged(two: Path, folder: Path, name: str, data: bytes | None) -> Path:
    """A copy of the run, whose checkpoint 2 has other bytes in one file (None: lacks it)."""
    shutil.copytree(two / "checkpoints", folder / "checkpoints")
    file = folder / "checkpoints" / "2" / name
    file.unlink()
    if data is not None:
        file.write_bytes(data)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "deleted"])
def test_damage_of_any_file_falls_back_or_is_harmless(two, target, tmp_path, damage):
    newest = two / "checkpoints" / "2"
    names = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
    generator, counts = np.random.default_rng(0), collections.Counter()
    for number in range(FLIPS if damage == "flip" else len(names)):
        name = names[number % len(names)]
        data = bytearray((newest / name).read_bytes())
        place = int(generator.integers(max(len(data), 1)))
        if damage == "flip" and data:
            data[place] ^= 1 << int(generator.integers(8))
        written = {"flip": data, "cut": data[:place], "empty": b"", "deleted": None}[damage]
        workdir = damaged(two, tmp_path / str(number), name, written)
        try:
            counts[outcome(workdir, two, target)] += 1
        except Exception as error:  # whatever it is, the damage that caused it is named
            raise AssertionError(f"{damage} of {name} at byte {place}: {type(error).__name__}: {error}") from error
        shutil.rmtree(workdir)
    print(f"\n{damage} of {len(names)} files, {sum(counts.values())} times: {dict(counts)}")


@pytest.mark.slow
def test_every_flip_of_metadata_is_found_or_changes_nothing(two, tmp_path):
    """The spelling of JSON may change, as in 1e5 and 1E5; what it says may not."""
    data = (two / "checkpoints" / "2" / "meta" / "metadata").read_bytes()
    expected, folder = read_meta(two / "checkpoints" / "2"), tmp_path / "2"
    (folder / "meta").mkdir(parents=True)
    generator, counts = np.random.default_rng(0), collections.Counter()
    for _ in range(META_FLIPS):
        place, bit = int(generator.integers(len(data))), int(generator.integers(8))
        changed = bytearray(data)
        changed[place] ^= 1 << bit
        (folder / "meta" / "metadata").write_bytes(changed)
        try:
            assert json.dumps(read_meta(folder)) == json.dumps(expected), f"silent: bit {bit} of byte {place}"
            counts["harmless"] += 1
        except CorruptCheckpoint as error:
            assert "\n" not in str(error)
            counts["refused"] += 1
    print(f"\n{META_FLIPS} flips of metadata: {dict(counts)}")
