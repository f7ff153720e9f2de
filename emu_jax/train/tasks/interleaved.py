"""Runs on packed rows of interleaved documents, which `pretrain.py` and `instruct.py` specialise.

In: `config.model`, `config.data`, `config.tokenizer`. A step classifies the next text token or regresses the next
visual embedding (`models.emu.loss`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from emu_jax.checkpoints.shipped import model_path
from emu_jax.checkpoints.store import is_checkpoint, read_tokenizer
from emu_jax.data.config import DataConfig
from emu_jax.data.pipeline import Pipeline, train_tokenizer
from emu_jax.data.samples import Samples
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError
from emu_jax.models import emu, lora
from emu_jax.models.flops import forward_flops
from emu_jax.models.layers import Array
from emu_jax.models.losses import SourceWeights
from emu_jax.models.paths import flatten, split
from emu_jax.train.groups import part_of
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.reach import check_reach
from emu_jax.train.tasks.task import (
    InitPart,
    Inputs,
    OwnRows,
    Task,
    fill_sizes,
    trainable_paths,
    unread_mixture,
)

LOSSES = ("text_loss", "regression_loss")
SCANNED = ("vision", "causal", "llama")
# Images to the language model's inputs: everything that must be alike for the same embeddings.
ENCODER = InitPart(
    ("model.vision", "model.causal", "model.llama.width", "model.standardise", "model.pixel_mean", "model.pixel_std"),
    ("emu",),
    r"params/(vision|ln_visual|causal)/.*|statistics/(mean|var|count)",
)
QUANTISER = re.compile(f"{emu.VISUAL_HEAD}(quantiser/.*|embedding)")  # parameters of the visual head `codes`
CODEBOOK = InitPart(
    (),
    ("codebook",),
    f"params/({QUANTISER.pattern})",
    (
        ("params/quantiser/", f"params/{emu.VISUAL_HEAD}quantiser/"),
        ("statistics/codebook", f"params/{emu.VISUAL_HEAD}embedding"),
    ),
)
# To plan without a tokenizer: LLaMA's 32,000 tokens and four special ones.
VOCABULARY = 32_004
PLANNED_IDS = emu.SpecialIds(pad=0, img=1, img_end=2, image=3)


class PackedDocuments:
    """The documents of a config, and what is needed to pack them into rows; tokenizer and model are made on demand.

    Attributes:
      data: `config.data`.
      image_size: pixels of a side.

    Args:
      instruct: give the tokenizer [USER] and [ASSISTANT].
    """

    def __init__(self, config: ConfigDict, instruct: bool):
        self._config, self._instruct = config, instruct
        self.data = DataConfig.from_dict(config.data)
        self.image_size = config.model.vision.image_size

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer at `config.tokenizer.path` (a .model file or a checkpoint), or a new one.

        A new one is trained on the texts of this run's sources and of those in `config.tokenizer.also`.
        """
        settings = self._config.tokenizer
        if settings.path and is_checkpoint(model_path(settings.path)):
            return Tokenizer(read_tokenizer(model_path(settings.path)).proto, instruct=self._instruct)
        if settings.path:
            return Tokenizer.load(settings.path, instruct=self._instruct)
        fields = {name: settings[name] for name in ("vocab_size", "model_type", "also")}
        return Tokenizer(train_tokenizer(self.data, self.image_size, **fields).proto, instruct=self._instruct)

    @functools.cached_property
    def config(self) -> ConfigDict:
        """The config with the tokenizer's vocabulary size.

        Raises:
          UserError: the config's is another.
        """
        return fill_sizes(self._config, {"model.llama.vocab_size": self.tokenizer.vocab_size}, "the tokenizer has")

    @functools.cached_property
    def model(self) -> emu.EmuConfig:
        return emu.EmuConfig.from_dict(self.config.model)

    def pipeline(self, own: OwnRows | None = None) -> Pipeline:
        """The run's batches, with the rows `own`; None: with all rows."""
        return Pipeline(
            self.data,
            self.tokenizer,
            queries=self.model.causal.queries,
            image_size=self.model.vision.image_size,
            own=own,
            learn_image_token=self.model.learn_image_token,
        )


@dataclasses.dataclass(frozen=True)
class PackedInputs(Inputs):
    """`Inputs`, and samples of every source."""

    samples: Samples | None = None


class Interleaved(Task):
    """A `Task` on interleaved documents. Subclasses say which parameters they train, and what they refuse.

    Attributes:
      model: `config.model`.
      ids: special tokens of the batch.
      sources: the data sources, whose losses are reported separately; empty where there is only one.
    """

    holds = "emu"
    init_parts: ClassVar[Mapping[str, InitPart]] = {
        "emu": InitPart(("model",), ("emu",)),
        "llama": InitPart(("model.llama",), ("llama",)),
        "vision": InitPart(("model.vision",), ("vision", "emu"), r"params/(vision|ln_visual)/.*"),
        "encoder": ENCODER,
        "codebook": CODEBOOK,
    }
    plots: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "losses": LOSSES,
        "collapse": ("variance_fraction", "effective_rank"),
        "packing": ("pad_fraction", "slot_occupancy"),
    }
    held_out_only = ("predicted_variance", "predicted_rank")
    row_name = "rows"
    instruct = False  # whether the tokenizer has [USER] and [ASSISTANT]

    def __init__(self, config: ConfigDict, inputs: PackedInputs | None = None):
        self.config = config
        self.model = model = emu.EmuConfig.from_dict(config.model)
        self.check_model(model)
        data = config.data
        self.rows, self.tokens = data.batch_rows, data.batch_rows * data.row_tokens
        kept = {part: config.model[part].remat for part in SCANNED}
        self.remat = kept["llama"] if len({*kept.values()}) == 1 else " ".join(map("=".join, kept.items()))
        # Pooled patches have no layers.
        parts = [part for part in SCANNED if config.model[part].get("kind", "") != "pooled"]
        self.scanned = {part: config.model[part].layers for part in parts}
        self.ids = PLANNED_IDS
        self.sources: tuple[SourceWeights, ...] = ()
        if inputs is not None:
            self.ids, self.sources = _special_ids(inputs.tokenizer), _source_weights(config)
        self.logical_axes, self.shapes = self.declare()
        init = config.get("init", None) or {}
        fixed = QUANTISER if init.get("codebook", "") else re.compile("(?!)")  # nothing matches
        may_train = lambda path: self.may_train(path) and not fixed.fullmatch(path)  # noqa: E731
        axes, shapes = (split(tree, may_train)[0] for tree in (self.logical_axes, self.shapes))
        self.trainable = trainable_paths(axes, shapes, OptimizerConfig.from_dict(config.optimizer))
        self._frozen = [path for path in flatten(axes) if path not in self.trainable]
        adapters_drop = model.llama.lora_rank > 0 and model.llama.lora_dropout > 0
        drops = model.causal.dropout > 0 or model.vision.drop_path > 0 or adapters_drop
        self._random = drops or model.visual_head.random or model.input_noise > 0 or model.scheduled_sampling > 0
        # A frozen encoder keeps the statistics that its embeddings were learnt with.
        encodes = any(part_of(path) in ("vision", "causal") for path in self.trainable)
        self._batch_statistics = encodes or not (init.get("emu", "") or init.get("encoder", ""))
        self.rows_mix = (model.standardise and self._batch_statistics) or model.visual_head.rows_mix
        if inputs is not None and inputs.samples is not None:
            check_reach({part_of(name) for name in self.split(axes)[0]}, inputs.samples, model)

    # ---- what subclasses decide --------------------------------------------------------------------------------------

    def check_model(self, model: emu.EmuConfig) -> None:
        """Raises UserError where this kind of run cannot train such a model."""

    def declare(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Logical axes and shapes of all parameters."""
        return emu.logical_axes(self.model), emu.abstract(self.model)

    def further(self, params: dict, batch: emu.Batch, key: Array, normalisers: tuple) -> emu.Further | None:
        """Another loss of the hidden states (`emu.loss`)."""
        return None

    def may_train(self, path: str) -> bool:
        """Whether this kind of run trains a parameter, unless the optimizer's settings freeze it."""
        return True

    # ---- config and data ---------------------------------------------------------------------------------------------

    @classmethod
    def documents(cls, config: ConfigDict) -> PackedDocuments:
        return PackedDocuments(config, cls.instruct)

    @classmethod
    def open(cls, config: ConfigDict, own: OwnRows) -> PackedInputs:
        documents = cls.documents(config)
        stream = documents.pipeline(own)
        resolved = documents.config.copy_and_resolve_references()
        resolved.data.update({name: getattr(stream.data, name) for name in ("row_images", "batch_rows", "shards")})
        remarks = tuple(filter(None, (unread_mixture(config), *stream.remarks, stream.fill.remark(stream.data))))
        return PackedInputs(resolved, stream, documents.tokenizer, remarks, stream.samples)

    @classmethod
    def open_held_out(cls, config: ConfigDict, own: OwnRows, inputs: Inputs) -> PackedInputs:
        """With the run's tokenizer, and rows of the run's size."""
        documents = cls.documents(config)
        assert inputs.tokenizer is not None  # `open` made one
        documents.tokenizer = inputs.tokenizer
        return PackedInputs(config, documents.pipeline(own), inputs.tokenizer)

    @classmethod
    def resolve_without_data(cls, config: ConfigDict, rows: int = 0) -> ConfigDict:
        config = config.copy_and_resolve_references()
        config.model.llama.vocab_size = config.model.llama.vocab_size or VOCABULARY
        config.data.batch_rows = rows or config.data.batch_rows
        for name in ("row_images", "batch_rows"):
            if not config.data[name]:
                raise UserError(
                    f"config.data.{name}=0 is measured from the data when a run starts; set a number to plan with, as "
                    f"`emu-jax inspect-data` or a run's config.json gives it: --config.data.{name}=…"
                )
        return config

    # ---- parameters --------------------------------------------------------------------------------------------------

    def init(self, key: Array) -> tuple[dict, dict]:
        return emu.init(self.model, key), emu.initial_statistics(self.model)

    # ---- a step ------------------------------------------------------------------------------------------------------

    def batch(self, **arrays: Any) -> emu.Batch:
        return emu.Batch(**arrays)

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        data, side = self.config.data, self.model.vision.image_size
        rows = (self.rows, data.row_tokens)
        shapes = {name: jax.ShapeDtypeStruct(rows, jnp.int32) for name in ("tokens", "segments", "slots")}
        shapes |= {name: jax.ShapeDtypeStruct(rows, jnp.float32) for name in ("text_weights", "visual_weights")}
        images = jax.ShapeDtypeStruct((self.rows, data.row_images, side, side, 3), jnp.uint8)
        return shapes | {"images": images}

    @property
    def summed(self) -> frozenset[str]:
        by_source = (f"{loss}/{source.name}" for loss in LOSSES for source in self.sources)
        return frozenset({"loss", *LOSSES, *by_source})

    def normalisers(self, batch: emu.Batch) -> tuple:
        return emu.loss_weights(batch, len(self.sources))

    def loss(self, params: dict, statistics: dict, batch: emu.Batch, key: Array, normalisers: tuple) -> tuple:
        return emu.loss(
            params,
            statistics,
            batch,
            config=self.model,
            ids=self.ids,
            key=key if self._random else None,
            train=self._batch_statistics,
            normalisers=normalisers[:4],
            sources=self.sources,
            further=self.further(params, batch, key, normalisers),
        )

    def held_out_metrics(self, params: dict, statistics: dict, batch: emu.Batch, key: Array) -> dict[str, Array]:
        """Without dropout, and with the running statistics of embeddings."""
        _, (metrics, _) = emu.loss(
            params,
            statistics,
            batch,
            config=self.model,
            ids=self.ids,
            train=False,
            sources=self.sources,
            further=self.further(params, batch, key, self.normalisers(batch)),
            judge_predictions=True,
        )
        return metrics

    def flops(self) -> dict[str, float]:
        data = self.config.data
        return step_flops(self.model, self.rows, data.row_images, data.row_tokens, self.is_trainable)

    def shallow(self, depths: Mapping[str, int], remat: str | None = None) -> Interleaved:
        config = self.config.copy_and_resolve_references()
        for part in SCANNED:
            config.model[part].remat = remat or config.model[part].remat
        if depths:
            config.model.unroll = True
            config.model.loss_chunk = config.data.row_tokens
            # The same parameters stay frozen as wholes; patterns that name layers would no longer match.
            config.optimizer.groups = tuple((re.escape(path), 1.0, None, True) for path in self._frozen)
        for part, layers in depths.items():
            config.model[part].layers = layers
        return type(self)(config)


def _special_ids(tokenizer: Tokenizer | None) -> emu.SpecialIds:
    assert tokenizer is not None  # `open` made one
    return emu.SpecialIds(tokenizer.pad_id, tokenizer.img_id, tokenizer.img_end_id, tokenizer.image_id)


def _source_weights(config: ConfigDict) -> tuple[SourceWeights, ...]:
    """The loss weights of every data source; none where there is only one."""
    entries = DataConfig.from_dict(config.data).sources.items()
    sources = tuple(SourceWeights(name, entry.text_weight, entry.visual_weight) for name, entry in entries)
    return sources if len(sources) > 1 else ()


def step_flops(
    model: emu.EmuConfig, rows: int, row_images: int, row_tokens: int, is_trainable: Callable[[str], bool]
) -> dict[str, float]:
    """Useful FLOPs of a training step by part.

    The gradient of a matrix product's input costs as much as the product; it is needed where something below it is
    trained. The gradient of its kernel costs as much again, where the kernel is trained: a part's share of trained
    kernels counts, which also stands for the attention within the encoders. The gradient of a kernel that is partly
    frozen is computed whole.

    Args:
      is_trainable: whether the parameter at a path is trained, at least in part (`Task.is_trainable`).
    """
    shapes = {path: leaf.shape for path, leaf in flatten(emu.abstract(model)).items()}
    trained = [path for path in shapes if is_trainable(path)]

    def learns(*prefixes: str) -> bool:
        return any(path.startswith(prefixes) for path in trained)

    def backward(kernels: list[str], below: bool) -> float:
        """Backward FLOPs over forward FLOPs of these kernels."""
        sizes = {path: math.prod(shapes[path]) for path in kernels}
        return below + sum(size for path, size in sizes.items() if is_trainable(path)) / max(sum(sizes.values()), 1)

    def kernels(*prefixes: str) -> list[str]:
        return [path for path in shapes if path.startswith(prefixes) and path.endswith("/kernel")]

    encoder, blocks, heads = ("vision/", "ln_visual/", "causal/"), "llama/blocks/", ["llama/lm_head/"]
    heads += ["llama/visual_head/"] if model.regression_loss_weight else []
    inputs = learns(*encoder, "llama/embed/")  # of the language model
    hidden = inputs or learns(blocks)
    llama = model.llama
    flops = forward_flops(model, rows * row_images, rows, row_tokens)
    factors = {
        "vision": backward(kernels("vision/"), learns("vision/")),
        "causal": backward(kernels("causal/"), learns(*encoder)),
        "llama": backward(kernels(blocks), hidden),
        "adapters": backward([path for path in shapes if lora.is_adapter(path)], hidden),
        "attention": 2.0 * hidden,
        "heads": backward(kernels(*heads), hidden or learns("llama/final_norm/")),
    }
    useful = {part: (1.0 + factors[part]) * count for part, count in flops.items()}
    if model.scheduled_sampling:  # the first forward pass
        useful |= {part: useful[part] + flops[part] for part in ("llama", "adapters", "attention")}
    targets = {path.split("/")[-2] for path in trained if lora.is_adapter(path)}
    if targets and all(lora.is_adapter(path) for path in trained):
        # Nothing below the first layer's first adapters is trained: what it computes up to them has no gradient.
        sizes = llama.projection_sizes()
        stages = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
        first = next(number for number, stage in enumerate(stages) if targets & set(stage))
        idle = sum(math.prod(sizes[name]) for stage in stages[: first + 1] for name in stage)
        useful["llama"] -= 2.0 * rows * row_tokens * idle
        lowest = sum(sizes[name][0] for name in targets & set(stages[first]))
        useful["adapters"] -= 2.0 * rows * row_tokens * llama.lora_rank * lowest
        # The backward pass of attention is four products: one for the weights (q and k need it), and q, k and v.
        needed = len(targets & {"q", "k", "v"}) + bool(targets & {"q", "k"})
        useful["attention"] -= (4 - needed) / 2 * flops["attention"] / llama.layers
    return useful
