"""Every visual head of the registry from training to serving; and on eight devices as on one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax import Emu
from emu_jax.cli import main
from emu_jax.config import load_config
from emu_jax.models import emu
from emu_jax.models.heads.registry import build_head, head_names
from emu_jax.models.paths import flatten
from emu_jax.serve.encoded_prompt import EncodedPrompt
from emu_jax.serve.prompt_batching import PromptBatcher
from emu_jax.sharding import make_mesh
from emu_jax.train.global_batch import batch_shardings
from emu_jax.train.loop import train
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.state import create_state
from emu_jax.train.step import compile_step
from tests.train import tiny
from tests.train.tasks import interleaved
from tests.train.test_step import DOCUMENTS, IDS, batch_of, model

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
NAMES = head_names()
PROMPTS = [["a red bar"], ["a blue", "square"], [""]]
SMALL = {"flow": {"width": 16, "steps": 3}, "codes": {"codes": 8, "groups": 2, "width": 4}}


@pytest.fixture(scope="module", params=NAMES)
def trained_head(request, tmp_path_factory, documents) -> tuple[str, Path]:
    """A head's name, and the work directory of four steps with it."""
    workdir = tmp_path_factory.mktemp(request.param) / "run"
    small = [f"--config.model.visual_head.{name}={size}" for name, size in SMALL.get(request.param, {}).items()]
    overrides = [f"--config.data.source={documents}", f"--config.model.visual_head.name={request.param}"]
    overrides += ["--config.train.steps=4", "--config.train.checkpoint_every=2", *small]
    train(load_config(tiny.__file__, overrides), workdir)
    return request.param, workdir


def checkpoint(workdir: Path) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten(Emu.load(workdir).params).items()}


def test_a_resumed_run_ends_with_the_same_bits(trained_head, tmp_path):
    _, workdir = trained_head
    copy = shutil.copytree(workdir, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / "4")
    train(load_config(str(config_of(copy)), []), copy)
    expected, found = checkpoint(workdir), checkpoint(copy)
    different = [path for path, leaf in expected.items() if not np.array_equal(leaf, found[path])]
    assert not different


def config_of(workdir: Path) -> Path:
    """A config file that returns the config of a run."""
    file = workdir.parent / "again.py"
    file.write_text(
        "from pathlib import Path\n\nfrom emu_jax.config import from_json\n\n\n"
        f"def get_config():\n    return from_json(Path({str(workdir / 'config.json')!r}).read_text())\n"
    )
    return file


def test_losses_are_finite_and_the_head_learns(trained_head):
    name, workdir = trained_head
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["regression_loss"]) for row in rows)
    model = Emu.load(workdir)
    fresh = emu.init(model.config, jax.random.key(0))["llama"]["visual_head"]
    before, after = flatten(fresh), flatten(model.params["llama"]["visual_head"])
    assert before.keys() == after.keys()
    assert any(not np.array_equal(before[path], after[path]) for path in after), name


def test_generation_with_a_cache_is_that_of_the_whole_prefix(trained_head):
    name, workdir = trained_head
    model = Emu.load(workdir)
    llama, head, seed = emu.bind(model.config, model.params).llama, model.config.visual_head, 7
    got = model.generate_embeddings(PROMPTS[:1], seeds=[seed])[0]
    ids = [*model.tokenizer.encode("a red bar"), model.tokenizer.img_id]
    prefix = llama.embed(jnp.asarray([ids]))
    for number in range(model.config.causal.queries):
        length = prefix.shape[1]
        hidden = llama(prefix, jnp.arange(length)[None], jnp.ones((1, length), jnp.int32))
        key = jax.random.fold_in(jax.random.key(seed), number)
        embedding = head.sample(llama.visual_head, hidden[:, -1], key[None])
        np.testing.assert_allclose(got[number], embedding[0], rtol=1e-3, atol=1e-4, err_msg=name)
        read = head.next_input(llama.visual_head, embedding, jnp.asarray(number))
        prefix = jnp.concatenate([prefix, read[:, None]], axis=1)


def test_a_prompt_s_embeddings_are_its_own_in_a_batch_and_in_a_slot(trained_head):
    _, workdir = trained_head
    model = Emu.load(workdir)
    together = model.generate_embeddings(PROMPTS, seeds=[3, 4, 5])
    alone = [
        model.generate_embeddings([prompt], seeds=[seed])[0] for prompt, seed in zip(PROMPTS, (3, 4, 5), strict=True)
    ]
    np.testing.assert_allclose(together, alone, atol=1e-4)
    side = model.config.vision.image_size
    encoded = []
    for prompt in PROMPTS:
        ids = np.array([*model.tokenizer.encode("".join(prompt)), model.tokenizer.img_id], np.int32)
        encoded.append(EncodedPrompt(ids, np.full(len(ids), -1, np.int32), np.zeros((0, side, side, 3), np.uint8)))
    served = PromptBatcher(model).generate_embeddings(encoded, [3, 4, 5], 4)
    np.testing.assert_allclose(
        served,
        [model.generate_embeddings([["".join(p)]], seeds=[s])[0] for p, s in zip(PROMPTS, (3, 4, 5), strict=True)],
        atol=1e-4,
    )
    other = model.generate_embeddings(PROMPTS, seeds=[6, 7, 8])
    assert model.config.visual_head.random == (np.abs(other - together).max() > 1e-3)


def test_an_exported_model_is_the_same(trained_head, tmp_path):
    _, workdir = trained_head
    assert main(["export", "--from", str(workdir), "--to", str(tmp_path / "out"), "--format", "packed"]) == 0
    one, other = Emu.load(workdir), Emu.load(tmp_path / "out")
    assert other.config == one.config
    np.testing.assert_allclose(
        other.generate_embeddings(PROMPTS, seeds=[1, 2, 3]),
        one.generate_embeddings(PROMPTS, seeds=[1, 2, 3]),
        atol=5e-2,
    )


def test_a_run_begins_from_a_model_of_another_head(trained_head, tmp_path, documents, caplog):
    """Its own head begins fresh, and the log says so; all else is taken over."""
    name, workdir = trained_head
    if name == "l2":
        return
    overrides = [f"--config.data.source={documents}", "--config.train.steps=1", f"--config.init.emu={workdir}"]
    overrides += [f"--config.tokenizer.path={workdir}"]
    caplog.set_level("INFO")
    train(load_config(tiny.__file__, overrides), tmp_path / "run")
    said = [record.getMessage() for record in caplog.records if "visual head" in record.getMessage()]
    fits = name in ("l1", "smooth_l1")  # a linear map, as that of l2
    assert said == ([] if fits else [f"config.init.emu: its visual head is {name}; this config's begins fresh"])


def on_meshes(name: str) -> None:
    """Prints metrics and sums of parameters after three steps, for one device and for eight."""
    config = OptimizerConfig.from_dict(tiny.get_config().optimizer)
    head = build_head("model.visual_head", {"name": name, **SMALL.get(name, {})})
    sizes = dataclasses.replace(model(), visual_head=head)
    task = interleaved(sizes, IDS, config)
    names = [*DOCUMENTS]
    rows = [batch_of(DOCUMENTS[names[n % len(names)]], rows=1) for n in range(8)]
    batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)
    for axes in ({}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = make_mesh(axes, jax.devices()[: 8 if axes else 1])
        with jax.set_mesh(mesh):
            state = create_state(task, config, 0, mesh)
            state.total_steps = jnp.asarray(10, device=state.total_steps.sharding)
            placed = jax.device_put(batch, batch_shardings(mesh, batch))
            step = compile_step(task, config, 0, state, placed)
            for _ in range(3):
                state, metrics = step(state, placed)
        sums = {path: float(jnp.abs(leaf).sum()) for path, leaf in flatten(state.params).items()}
        print(json.dumps({"metrics": {key: float(value) for key, value in metrics.items()}, "parameters": sums}))


@pytest.mark.parametrize("name", NAMES)
def test_eight_devices_compute_what_one_does(name):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    code = f"from tests.train.test_visual_heads import on_meshes; on_meshes({name!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, eight = map(json.loads, done.stdout.splitlines())
    for metric in ("loss", "text_loss", "regression_loss", "grad_norm", "grad_norm/llama"):
        print(f"{metric}: {eight['metrics'][metric]:.7g}, on one device {one['metrics'][metric]:.7g}")
        assert eight["metrics"][metric] == pytest.approx(one["metrics"][metric], rel=1e-4)
    assert eight["parameters"] == pytest.approx(one["parameters"], rel=1e-4, abs=1e-5)
