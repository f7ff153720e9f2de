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
from emu_jax.train import objective
from emu_jax.train.mesh import make_mesh
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.state import TrainState, create_state
from emu_jax.train.step import make_train_step
from tests.train import tiny

TOKENIZER = Tokenizer.train(["a red square", "a blue bar", "words before and after"], vocab_size=300, model_type="bpe")
IDS = emu.SpecialIds(TOKENIZER.pad_id, TOKENIZER.img_id, TOKENIZER.img_end_id, TOKENIZER.image_id)
ROW_TOKENS, ROW_IMAGES = 96, 8


def model() -> emu.EmuConfig:
    fields = models.debug()
    fields.llama.vocab_size = TOKENIZER.vocab_size
    return emu.EmuConfig.from_dict(fields)


def make_step(accumulate_steps: int = 1) -> tuple:
    fields = tiny.get_config().optimizer
    fields.accumulate_steps = accumulate_steps
    config = OptimizerConfig.from_dict(fields)
    goal = objective.pretrain(model(), IDS)
    step = make_train_step(goal, config, 0)
    return jax.jit(step), create_state(goal, config, 0, make_mesh({}, jax.devices()[:1]))


def picture(number: int) -> Image:
    size = model().vision.image_size
    return Image(np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8), f"picture {number}")


def batch_of(document: Document, rows: int = 2) -> emu.Batch:
    """Rows that each hold this document."""
    queries = model().causal.queries
    pieces = tokenize_document(document, TOKENIZER, queries=queries, row_tokens=ROW_TOKENS, row_images=ROW_IMAGES)
    size = model().vision.image_size
    row, _ = build_row(pieces, row_tokens=ROW_TOKENS, row_images=ROW_IMAGES, image_size=size, pad_id=TOKENIZER.pad_id)
    row.pop("cuts")
    return emu.Batch(**{name: jnp.asarray(np.stack([value] * rows)) for name, value in row.items()})


DOCUMENTS = {
    "text only": Document((Text("words before and after"),)),
    "image alone": Document((picture(0),)),
    "image first": Document((picture(0), Text("a red square"))),
    "image last": Document((Text("a blue bar"), picture(1))),
    "eight images": Document(tuple(part for n in range(8) for part in (picture(n), Text("bar")))),
}


def test_one_program_for_every_kind_of_document():
    step, state = make_step()
    for name, document in DOCUMENTS.items():
        new, metrics = step(state, batch_of(document))
        assert all(np.isfinite(value) for value in metrics.values()), f"{name}: {metrics}"
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(new)), name
        pictures = sum(isinstance(part, Image) for part in document.parts)
        assert (float(metrics["regression_loss"]) == 0.0) == (pictures == 0), f"{name}: {metrics}"
    assert step._cache_size() == 1, "compilations"


def test_accumulated_micro_batches_are_the_whole_batch():
    whole, state = make_step()
    parts, _ = make_step(accumulate_steps=2)
    rows = [batch_of(DOCUMENTS[name], rows=1) for name in ("image last", "text only", "eight images", "image first")]
    batch = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)
    (expected, metrics), (got, metrics_parts) = whole(state, batch), parts(state, batch)
    for name in ("loss", "text_loss", "regression_loss", "grad_norm"):
        assert float(metrics_parts[name]) == pytest.approx(float(metrics[name]), rel=1e-5), name
    first_moment = [jax.tree.leaves(s.opt_state[1].mu) for s in (expected, got)]
    for a, b in zip(*first_moment, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_frozen_part_does_not_move():
    fields = tiny.get_config().optimizer
    fields.learning_rate.vision = 0.0
    config = OptimizerConfig.from_dict(fields)
    goal = objective.pretrain(model(), IDS)
    state = create_state(goal, config, 0, make_mesh({}, jax.devices()[:1]))
    state = dataclasses.replace(state, total_steps=jnp.asarray(10))
    step = jax.jit(make_train_step(goal, config, 0))
    new: TrainState = step(state, batch_of(DOCUMENTS["image first"]))[0]
    moved = {
        part: any(bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
        for part, pair in {part: (state.params[part], new.params[part]) for part in state.params}.items()
    }
    assert moved == {"vision": False, "ln_visual": False, "causal": True, "llama": True}


def test_what_is_frozen_has_no_gradient_and_no_moments():
    """Its share of the gradient's norm, which is clipped, is gone; the rest of the step is that of learning rate 0."""
    fields = tiny.get_config().optimizer
    fields.learning_rate.vision = 0.0
    fields.clip_norm = 0.0
    config = OptimizerConfig.from_dict(fields)
    goal = objective.pretrain(model(), IDS)
    frozen = objective.freeze(goal, config.frozen)
    news, norms = [], []
    for some in (goal, frozen):
        state = create_state(some, config, 0, make_mesh({}, jax.devices()[:1]))
        state = dataclasses.replace(state, total_steps=jnp.asarray(10))
        new, metrics = jax.jit(make_train_step(some, config, 0))(state, batch_of(DOCUMENTS["image first"]))
        news.append(new)
        norms.append(float(metrics["grad_norm"]))
    assert norms[1] < 0.999 * norms[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), news[0].params, news[1].params)
    assert sorted(news[1].opt_state[1].mu) == ["causal", "llama"]
    config.check_parts(frozen.split(frozen.logical_axes)[0])
