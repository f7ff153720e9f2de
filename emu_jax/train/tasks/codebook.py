"""A vector quantiser of a trained Emu's visual embeddings, for the visual head `codes` (`models/heads/codes.py`).

The maps to and from the codes learn by gradient. The codebook is an exponential moving average of what falls to each
code (van den Oord et al. 2017, arXiv 1711.00937, appendix A.1); a code to which hardly anything falls begins anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from emu_jax.data.examples import ExamplePipeline, ExamplesConfig, Images, open_examples
from emu_jax.errors import UserError, check_fields
from emu_jax.models import emu, parameters, vector_quantiser
from emu_jax.models.flops import forward_flops
from emu_jax.models.layers import Array
from emu_jax.models.vector_quantiser import COMMITMENT, Codebook, VectorQuantiser
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.tasks.interleaved import ENCODER
from emu_jax.train.tasks.task import InitPart, Inputs, OwnRows, Task, trainable_paths, unread_mixture


@dataclasses.dataclass(frozen=True)
class CodebookConfig(Codebook):
    """`config.codebook`.

    Attributes:
      codes, groups, width: sizes of the quantiser, as in `config.model.visual_head`.
      decay: decay of the codebook's EMA, a step.
      revive: a code begins anew, as a random embedding of the batch, when less than this share of an even
        distribution falls to it; 0 leaves all codes.
    """

    decay: float = 0.99
    revive: float = 0.1

    def __post_init__(self):
        self.check("config.codebook")
        for name in ("decay", "revive"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"config.codebook.{name}={getattr(self, name)}; expected 0 to below 1")


class TrainCodebook(Task):
    """Restores an encoder's embeddings from codes. A batch: pixels, uint8 [B, H, W, 3].

    The encoder is frozen and comes from `config.init.encoder`. The statistics hold those of its embeddings, the
    codebook [G, K, d], and the EMA of how many embeddings of a batch fall to each code [G, K].
    """

    holds = "codebook"
    init_parts: ClassVar[Mapping[str, InitPart]] = {"encoder": ENCODER}
    plots: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "losses": ("reconstruction", "commitment"),
        "codebook": ("perplexity", "codes_used"),
    }
    row_name = "images"
    summed = frozenset({"loss", "reconstruction", "commitment"})
    rows_mix = True  # the codebook sees all embeddings of a step

    def __init__(self, config: ConfigDict, inputs: Inputs | None = None):
        self.config, self.rows = config, config.data.batch
        self.model = emu.EmuConfig.from_dict(config.model)
        check_fields(CodebookConfig, "config.codebook", config.codebook)
        self.codebook = CodebookConfig(**config.codebook)
        encoder, quantiser = (emu.ImageEncoder, self.model), (self._make_quantiser, self.codebook)
        self.logical_axes = parameters.logical_axes(*encoder) | {"quantiser": parameters.logical_axes(*quantiser)}
        self.shapes = parameters.abstract(*encoder) | {"quantiser": parameters.abstract(*quantiser)}
        axes, shapes = ({"quantiser": tree["quantiser"]} for tree in (self.logical_axes, self.shapes))
        self.trainable = trainable_paths(axes, shapes, OptimizerConfig.from_dict(config.optimizer))

    def _make_quantiser(self, rngs: nnx.Rngs, sizes: Codebook) -> VectorQuantiser:
        return VectorQuantiser(rngs, self.model.llama.width, sizes, "float32")

    @classmethod
    def open(cls, config: ConfigDict, own: OwnRows) -> Inputs:
        if not config.init.encoder:
            raise UserError(
                "config.init.encoder is empty: a codebook quantises the embeddings of a trained Emu; name its work "
                "directory, or emu-mini"
            )
        data, side = ExamplesConfig.from_dict(config.data), config.model.vision.image_size
        images, parts = open_examples(data, lambda source, split: Images(source, split, side, data.max_faults))
        remarks = tuple(filter(None, [unread_mixture(config), *(part.remark for part in parts)]))
        stream = ExamplePipeline(images, data, own=own(data.batch))
        return Inputs(config.copy_and_resolve_references(), stream, remarks=remarks)

    @classmethod
    def resolve_without_data(cls, config: ConfigDict, rows: int = 0) -> ConfigDict:
        config = config.copy_and_resolve_references()
        config.data.batch = rows or config.data.batch
        return config

    def init(self, key: Array) -> tuple[dict, dict]:
        keys = jax.random.split(key)
        params = parameters.init(emu.ImageEncoder, self.model, keys[0])
        params["quantiser"] = parameters.init(self._make_quantiser, self.codebook, keys[1])
        c = self.codebook
        empty = {
            "codebook": jnp.zeros((c.groups, c.codes, c.width // c.groups)),
            "usage": jnp.zeros((c.groups, c.codes)),
        }
        return params, emu.initial_statistics(self.model) | empty

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        side = self.model.vision.image_size
        return {"pixels": jax.ShapeDtypeStruct((self.rows, side, side, 3), jnp.uint8)}

    def normalisers(self, batch: dict) -> Array:
        return jnp.asarray(float(len(batch["pixels"])))

    def loss(self, params: dict, statistics: dict, batch: dict, key: Array, count: Array) -> tuple:
        module = parameters.bind(self._make_quantiser, self.codebook, params["quantiser"])
        embeddings = emu.encode_images(params, statistics, batch["pixels"], config=self.model)
        embeddings = jax.lax.stop_gradient(embeddings)  # [B, Q, D]
        found = vector_quantiser.quantise(module, statistics["codebook"], embeddings)
        share = len(embeddings) / count
        reconstruction, commitment = share * found.reconstruction.mean(), share * found.commitment.mean()
        total = reconstruction + COMMITMENT * commitment
        z = jax.lax.stop_gradient(module.project(embeddings))  # [B, Q, G, d]
        usage = statistics["usage"]
        metrics = {"loss": total, "reconstruction": reconstruction, "commitment": commitment, **usage_metrics(usage)}
        codebook, usage = update(self.codebook, statistics["codebook"], usage, z, found.codes, key)
        return total, (metrics, statistics | {"codebook": codebook, "usage": usage})

    def flops(self) -> dict[str, float]:
        forward = forward_flops(self.model, self.rows, 0, 0)
        embeddings = self.rows * self.model.causal.queries
        quantiser = 2.0 * embeddings * vector_quantiser.multiply_adds(self.model.llama.width, self.codebook)
        return {"vision": forward["vision"], "causal": forward["causal"], "quantiser": 3.0 * quantiser}


def usage_metrics(usage: Float[Array, "G K"]) -> dict[str, Float[Array, ""]]:
    """How evenly the codes are used, as means over the groups: the perplexity, 1 to K, and the share of codes in use.

    A code is in use if at least a hundredth of an even distribution falls to it.
    """
    shares = usage / jnp.maximum(usage.sum(-1, keepdims=True), 1e-9)  # [G, K]
    entropy = -jnp.where(shares > 0, shares * jnp.log(jnp.maximum(shares, 1e-30)), 0.0).sum(-1)
    used = shares * shares.shape[-1] >= 0.01
    return {"perplexity": jnp.exp(entropy).mean(), "codes_used": used.mean(dtype=jnp.float32)}


def update(
    config: CodebookConfig,
    codebook: Float[Array, "G K d"],
    usage: Float[Array, "G K"],
    z: Float[Array, "*batch G d"],
    codes: Int[Array, "*batch G"],
    key: Array,
) -> tuple[Float[Array, "G K d"], Float[Array, "G K"]]:
    """The codebook and its usage after a batch: each entry is the decayed mean of the z that fell to it."""
    z, codes = z.reshape(-1, *z.shape[-2:]), codes.reshape(-1, codes.shape[-1])  # [N, G, d], [N, G]
    here = jax.nn.one_hot(codes, config.codes)  # [N, G, K]
    old, fallen = config.decay * usage, (1 - config.decay) * here.sum(0)  # [G, K] each
    sums = (1 - config.decay) * jnp.einsum("ngk,ngd->gkd", here, z, precision=jax.lax.Precision.HIGHEST)
    usage = old + fallen
    mean = (old[..., None] * codebook + sums) / jnp.maximum(usage, 1e-9)[..., None]
    codebook = jnp.where(usage[..., None] > 1e-9, mean, codebook)
    even = usage.sum(-1, keepdims=True) / config.codes  # [G, 1]
    dead = usage < config.revive * even  # [G, K]
    chosen = jax.random.randint(key, (config.codes,), 0, len(z))
    fresh = z[chosen].transpose(1, 0, 2)  # [G, K, d]
    return jnp.where(dead[..., None], fresh, codebook), jnp.where(dead, even, usage)
