"""The training step: one program for every kind of document, and accumulation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import models
from emu_jax.data.document import Document, Image, Text
from emu_jax.data.packing import build_row
from emu_jax.data.sequence import tokenize_document
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.models import emu
from emu_jax.sharding import make_mesh
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.state import TrainState, create_state
from tests.train import tiny
from tests.train.tasks import compiled_step, interleaved, step_of

TOKENIZER = Tokenizer.train(["a red square", "a blue bar", "words before and after"], vocab_size=300, model_type="bpe")
IDS = emu.SpecialIds(TOKENIZER.pad_id, TOKENIZER.img_id, TOKENIZER.img_end_id, TOKENIZER.image_id)
ROW_TOKENS, ROW_IMAGES = 96, 8


def model() -> emu.EmuConfig:
    fields = models.debug()
    fields.llama.vocab_size = TOKENIZER.vocab_size
    return emu.EmuConfig.from_dict(fields)


def make_step() -> tuple:
    config = OptimizerConfig.from_dict(tiny.get_config().optimizer)
    task = interleaved(model(), IDS, config)
    return jax.jit(step_of(task, config)), create_state(task, config, 0, make_mesh({}, jax.devices()[:1]))


def image(number: int) -> Image:
    size = model().vision.image_size
    return Image(np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8), f"image {number}")


def batch_of(document: Document, rows: int = 2) -> emu.Batch:
    """Rows that each hold this document."""
    queries = model().causal.queries
    pieces = tokenize_document(document, TOKENIZER, queries=queries, row_tokens=ROW_TOKENS, row_images=ROW_IMAGES)
    size = model().vision.image_size
    sizes = {"row_tokens": ROW_TOKENS, "row_images": ROW_IMAGES, "image_size": size}
    row = build_row(pieces, **sizes, pad_id=TOKENIZER.pad_id).arrays
    return emu.Batch(**{name: jnp.asarray(np.stack([value] * rows)) for name, value in row.items()})


DOCUMENTS = {
    "text only": Document((Text("words before and after"),)),
    "image alone": Document((image(0),)),
    "image first": Document((image(0), Text("a red square"))),
    "image last": Document((Text("a blue bar"), image(1))),
    "eight images": Document(tuple(part for n in range(8) for part in (image(n), Text("bar")))),
}


@pytest.mark.long
def test_one_program_for_every_kind_of_document():
    step, state = make_step()
    for name, document in DOCUMENTS.items():
        new, metrics = step(state, batch_of(document))
        assert all(np.isfinite(value) for value in metrics.values()), f"{name}: {metrics}"
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(new)), name
        images = sum(isinstance(part, Image) for part in document.parts)
        assert (float(metrics["regression_loss"]) == 0.0) == (images == 0), f"{name}: {metrics}"
    assert step._cache_size() == 1, "compilations"


@pytest.mark.long
def test_accumulated_micro_batches_are_the_whole_batch():
    whole, state = make_step()
    fields = tiny.get_config().optimizer
    fields.accumulate_steps = 2
    config = OptimizerConfig.from_dict(fields)
    rows = [batch_of(DOCUMENTS[name], rows=1) for name in ("image last", "text only", "eight images", "image first")]
    batch = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)
    parts = compiled_step(interleaved(model(), IDS, config), config, state, batch)
    (expected, metrics), (got, metrics_parts) = whole(state, batch), parts(state, batch)
    for name in ("loss", "text_loss", "regression_loss", "grad_norm"):
        assert float(metrics_parts[name]) == pytest.approx(float(metrics[name]), rel=1e-5), name
    first_moment = [jax.tree.leaves(s.opt_state[1].mu) for s in (expected, got)]
    for a, b in zip(*first_moment, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.long
def test_a_frozen_part_does_not_move_and_has_no_gradient_and_no_moments():
    """Its share of the gradient's norm, which is clipped, is gone."""
    fields = tiny.get_config().optimizer
    news, rows = {}, {}
    for name, rate in (("all", 1.2e-3), ("frozen", 0.0)):
        fields.learning_rate.vision = rate
        config = OptimizerConfig.from_dict(fields)
        task = interleaved(model(), IDS, config)
        state = create_state(task, config, 0, make_mesh({}, jax.devices()[:1]))
        state = dataclasses.replace(state, total_steps=jnp.asarray(10))
        news[name], rows[name] = jax.jit(step_of(task, config))(state, batch_of(DOCUMENTS["image first"]))
    new: TrainState = news["frozen"]
    moved = {
        part: any(bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
        for part, pair in {part: (state.params[part], new.params[part]) for part in state.params}.items()
    }
    assert moved == {"vision": False, "ln_visual": False, "causal": True, "llama": True}
    assert sorted(new.opt_state[1].mu) == ["causal", "llama"]
    assert "grad_norm/vision" not in rows["frozen"]
    rest = [float(rows["frozen"][f"grad_norm/{part}"]) for part in ("causal", "llama")]
    assert rest == pytest.approx([float(rows["all"][f"grad_norm/{part}"]) for part in ("causal", "llama")], rel=1e-5)
    assert float(rows["frozen"]["grad_norm"]) == pytest.approx(np.linalg.norm(rest), rel=1e-5)
    assert float(rows["all"]["grad_norm"]) > 1.001 * float(rows["frozen"]["grad_norm"])


@pytest.mark.long
def test_norms_by_part_are_those_of_a_plain_computation():
    """Of the gradient before it is clipped, of the parameters before the step, and of what the step takes from them."""
    config = OptimizerConfig.from_dict(tiny.get_config().optimizer.to_dict() | {"clip_norm": 0.01})
    task = interleaved(model(), IDS, config)
    state = create_state(task, config, 0, make_mesh({}, jax.devices()[:1]))
    state = dataclasses.replace(state, total_steps=jnp.asarray(10))
    batch = batch_of(DOCUMENTS["image last"])
    new, metrics = jax.jit(step_of(task, config))(state, batch)
    grads = jax.grad(lambda p: task.loss(p, state.statistics, batch, jax.random.key(0), task.normalisers(batch))[0])
    moved = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), state.params, new.params)
    trees = {"grad_norm": jax.jit(grads)(state.params), "update_norm": moved, "param_norm": state.params}
    tops = {"vision": ("vision", "ln_visual"), "causal": ("causal",), "llama": ("llama",)}
    for name, tree in trees.items():
        for part, names in tops.items():
            leaves = [leaf for top in names for leaf in jax.tree.leaves(tree[top])]
            expected = np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in leaves))
            got = float(metrics[f"{name}/{part}"])
            print(f"{name}/{part}: {got:.6g}, expected {expected:.6g}")
            assert got == pytest.approx(expected, rel=1e-3 if name == "update_norm" else 1e-4) and expected > 0
    parts = [float(metrics[f"grad_norm/{part}"]) for part in tops]
    assert float(metrics["grad_norm"]) == pytest.approx(np.linalg.norm(parts), rel=1e-5)
    assert float(metrics["grad_norm"]) > 0.01, "before clipping"


@pytest.mark.parametrize(("document", "stopped"), [("image last", True), ("image first", False)])
@pytest.mark.long
def test_a_part_without_a_gradient_shows(document, stopped):
    """Where every image is a regression target and `stop_target_inputs` stops it, the encoder's norm is 0."""
    fields = model().to_dict() | {"stop_target_inputs": True}
    config = OptimizerConfig.from_dict(tiny.get_config().optimizer)
    task = interleaved(emu.EmuConfig.from_dict(fields), IDS, config)
    state = create_state(task, config, 0, make_mesh({}, jax.devices()[:1]))
    batch = batch_of(DOCUMENTS[document])
    if not stopped:
        batch.visual_weights = jnp.zeros_like(batch.visual_weights)
    _, metrics = jax.jit(step_of(task, config))(state, batch)
    assert (float(metrics["grad_norm/vision"]) == 0.0) is stopped
