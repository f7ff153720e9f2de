"""Whether a whole model fits the devices it is to serve on: the programs of `generate/`, compiled for absent TPUs.

In: a config with a model, one with a U-Net if it shall draw, and a topology. Out: the memory of every program while all
weights are there, and estimates of the time of a token and of a U-Net call. Nothing is allocated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emu_jax.errors import UserError
from emu_jax.generate.decoder import Drawing
from emu_jax.generate.embeddings import generate_embeddings
from emu_jax.generate.samplers import make_table, sample
from emu_jax.generate.text import Decoding, generate
from emu_jax.models import emu, unet, vae
from emu_jax.models.diffusion import Schedule
from emu_jax.models.parameters import Params
from emu_jax.plan.plan import OUT_OF_MEMORY, USED
from emu_jax.plan.program import cost
from emu_jax.plan.steps import decode, placed, size
from emu_jax.plan.topology import Topology
from emu_jax.sharding import make_mesh, sharding
from emu_jax.train.fit import fit
from emu_jax.train.tasks.interleaved import VOCABULARY

PROMPT = 512  # tokens of a prompt
NEW_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class ServedProgram:
    """A program that a served model runs; sizes in bytes per device.

    Attributes:
      about: what it does, for a reader.
      needs: its workspace and results, beside the weights of the whole model and its own inputs; NaN if it does not
        fit.
      seconds: estimated time, by roofline; NaN where the compiler counts loops within loops once.
      error: why it does not fit, in the compiler's words.
    """

    about: str
    needs: float
    seconds: float = math.nan
    error: str = ""


@dataclasses.dataclass(frozen=True)
class ServingPlan:
    """The programs of a served model.

    Attributes:
      weights: bytes per device by part.
      capacity: HBM of a device.
    """

    topology: str
    chips: int
    weights: dict[str, float]
    programs: list[ServedProgram]
    capacity: float

    @property
    def peak(self) -> float:
        """Bytes of HBM that a device needs while the largest program runs."""
        return sum(self.weights.values()) + max(program.needs for program in self.programs)

    @property
    def fits(self) -> bool:
        return all(not program.error for program in self.programs) and self.peak <= self.capacity


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """What is compiled.

    Attributes:
      weights: bytes of weights among the program's arguments.
      times: how often its loop runs, whose body the compiler counts once; 0 if it has other loops within.
    """

    about: str
    lowered: Any
    weights: float
    times: int = 0


def plan_serving(config: ConfigDict, topology: Topology, drawing: ConfigDict | None = None) -> ServingPlan:
    """Compiles what a model needs to read an image, to write, to imagine an image, and to draw it.

    Args:
      config: a run's, with `model`; its weights are in the model's compute dtype, or integers.
      drawing: a run's, with `unet` and `schedule`; its VAE is Stable Diffusion's.

    Raises:
      UserError: the config has no model.
    """
    if "model" not in config:
        raise UserError("serve: this config has no model; expected one such as configs/pretrain.py")
    config = fit(config, topology.devices, rows_per_device=1)
    mesh = make_mesh(config.train.mesh, topology.devices)
    config = config.copy_and_resolve_references()
    config.model.param_dtype = config.model.dtype
    config.model.llama.vocab_size = config.model.llama.vocab_size or VOCABULARY
    model = emu.EmuConfig.from_dict(config.model)
    params = placed(mesh, emu.logical_axes(model), emu.abstract(model))
    weights = {name: size(part) for name, part in params.items() if isinstance(part, dict)}
    decoder = None
    if drawing is not None:
        fields = dict(drawing.unet) | {"latent_channels": 4, "condition_dim": model.llama.width}
        fields |= {"param_dtype": fields["dtype"], "remat": "none"}
        decoder = unet.UNetConfig.from_dict(fields), vae.VAEConfig(dtype=fields["dtype"], param_dtype=fields["dtype"])
        weights |= {"unet": size(_replicated(mesh, unet.abstract(decoder[0])))}
        weights |= {"vae": size(_replicated(mesh, vae.abstract(decoder[1])))}
    programs = []
    with jax.set_mesh(mesh):
        for each in _programs(mesh, model, params, decoder, drawing):
            programs.append(_compile(each, mesh))
        token = decode(config, mesh, 1).build()[1]
        token += (decode(config, mesh, 1, unroll=2).build()[1] - token) * (model.llama.layers - 1)
    programs.append(ServedProgram(f"a token, after {model.llama.context} others", 0.0, token.seconds))
    return ServingPlan(topology.name, topology.chips, weights, programs, topology.chip.hbm)


def _programs(
    mesh: Mesh,
    model: emu.EmuConfig,
    params: Params,
    decoder: tuple[unet.UNetConfig, vae.VAEConfig] | None,
    drawing: ConfigDict | None,
) -> Iterator[_Compiled]:
    def array(*shape: int, dtype: Any = model.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, (None,) * len(shape), shape))

    def lower(function: Any, *arguments: Any, **static: Any) -> Any:
        return jax.jit(function, static_argnames=tuple(static)).lower(*arguments, **static)

    width, side, queries = model.llama.width, model.vision.image_size, model.causal.queries
    statistics = jax.tree.map(
        lambda x: array(*x.shape, dtype=x.dtype), jax.eval_shape(lambda: emu.initial_statistics(model))
    )
    pixels = array(1, side, side, 3, dtype=jnp.uint8)
    whole = size(params)
    yield _Compiled("reads an image", lower(emu.encode_images, params, statistics, pixels, config=model), whole)
    inputs, valid = array(1, PROMPT, width), array(1, PROMPT, dtype=jnp.bool_)
    key = jax.eval_shape(lambda: jax.random.key(0))
    integer, number = array(dtype=jnp.int32), array(dtype=jnp.float32)
    decoding = Decoding(integer, number, number, integer, number)  # type: ignore[arg-type]  # described, not allocated
    text = {"config": model, "ends": (2,), "max_new_tokens": NEW_TOKENS}
    yield _Compiled(
        f"writes {NEW_TOKENS} tokens after {PROMPT}",
        generate.lower(params, inputs, valid, key, decoding, **text),
        whole,
    )
    embeddings = generate_embeddings.lower(params, inputs, valid, array(1, dtype=jnp.uint32), config=model)
    yield _Compiled(f"imagines an image after {PROMPT} tokens", embeddings, whole)
    if decoder is None or drawing is None:
        return
    network, images = decoder
    latent = drawing.latent_size or 64
    weights = _replicated(mesh, unet.abstract(network))
    settings = Drawing()
    table = make_table(settings.sampler, Schedule.from_dict(drawing.schedule), settings.steps)
    noise, condition = array(1, latent, latent, 4, dtype=jnp.float32), array(1, queries, width, dtype=jnp.float32)
    guidance = array(dtype=jnp.float32)
    drawn = sample.lower(weights, table, noise, condition, condition, guidance, config=network)
    yield _Compiled(f"draws it by {len(table.timestep)} calls of the U-Net", drawn, size(weights), len(table.timestep))
    weights = _replicated(mesh, vae.abstract(images))
    yield _Compiled("decodes its latents", lower(vae.decode, weights, noise, config=images), size(weights), 1)


def _replicated(mesh: Mesh, shapes: Params) -> Params:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(mesh, (None,) * len(x.shape), x.shape)),
        shapes,
    )


def _compile(program: _Compiled, mesh: Mesh) -> ServedProgram:
    try:
        executable = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = OUT_OF_MEMORY.search(str(error)) or USED.search(str(error))
        if found is None:
            raise
        return ServedProgram(program.about, math.nan, error=f"needs {found[1]} of {found[2]}")
    memory = executable.memory_analysis()
    assert memory is not None  # compilers for CPUs and TPUs report it
    needs = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    needs += max(memory.argument_size_in_bytes - program.weights, 0.0)
    seconds = cost(executable, "", mesh).seconds * program.times if program.times else math.nan
    return ServedProgram(program.about, float(needs), seconds)
