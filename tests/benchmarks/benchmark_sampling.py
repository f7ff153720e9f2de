"""Drawing against diffusers in PyTorch: `python -m tests.benchmarks.benchmark_sampling` prints a table.

The quick start's U-Net with the same random weights, 50 PNDM steps with guidance, float32, the same threads; medians of
interleaved turns. Both draw the same latents: the difference is printed too, and how long another guidance scale and
other noise take (nothing is compiled), and what memory a batch takes.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
from diffusers import PNDMScheduler, UNet2DConditionModel

from configs import decoder
from emu_jax.checkpoints.convert.diffusers import match
from emu_jax.generate.samplers import make_table, sample
from emu_jax.models import unet
from emu_jax.models.diffusion import Schedule
from emu_jax.models.paths import flatten
from tests.benchmarks.benchmark_speed import medians

QUERIES, DIM, LATENT = 8, 128, (8, 8, 4)  # of the quick start
STEPS, GUIDANCE = 50, 7.5
ROUNDS = 7


def torch_unet(config: unet.UNetConfig, params: unet.Params) -> UNet2DConditionModel:
    """Diffusers' U-Net of the same sizes and weights."""
    down = tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in config.attention_blocks)
    up = tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in config.attention_blocks[::-1])
    model = UNet2DConditionModel(
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        block_out_channels=config.block_channels,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.heads,
        cross_attention_dim=config.condition_dim,
        norm_num_groups=config.groups,
    ).eval()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    ours = flatten(params)
    state = {}
    for path, key in match(shapes, unet.abstract(config), "PyTorch").items():
        value = np.asarray(ours[path])
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        state[key] = torch.from_numpy(np.ascontiguousarray(value).reshape(shapes[key]))
    model.load_state_dict(state)
    return model


def torch_sampler(model: Callable, noise: np.ndarray, both: np.ndarray) -> Callable[[], torch.Tensor]:
    """Diffusers' own loop: noise [N, h, w, C] and (unconditional, conditional) embeddings [2N, Q, D]."""
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        set_alpha_to_one=False,
    )
    start, states = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()), torch.from_numpy(both)

    @torch.no_grad()
    def run() -> torch.Tensor:
        scheduler.set_timesteps(STEPS)
        latents = start
        for timestep in scheduler.timesteps:
            eps = model(torch.cat([latents, latents]), timestep, encoder_hidden_states=states, return_dict=False)[0]
            without, given = eps.chunk(2)
            latents = scheduler.step(without + GUIDANCE * (given - without), timestep, latents, return_dict=False)[0]
        return latents

    return run


def main() -> None:
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    fields = decoder.mini().unet
    fields.update({"latent_channels": LATENT[-1], "condition_dim": DIM})
    config = unet.UNetConfig.from_dict(fields)
    params = unet.init(config, jax.random.key(0))
    table = make_table("pndm", Schedule(), STEPS)
    print(f"{threads} threads, jax {jax.__version__}, torch {torch.__version__}, medians of {ROUNDS} turns\n")
    columns = ("emu_jax", "diffusers", "compiled", "faster by")
    print(f"{'50 PNDM steps, guided':28s}" + "".join(f"{name:>12s}" for name in columns) + f"{'apart':>10s}")
    for images in (1, 8):
        random = np.random.default_rng(0)
        noise = random.standard_normal((images, *LATENT), np.float32)
        condition, unconditional = random.standard_normal((2, images, QUERIES, DIM), np.float32)
        model = torch_unet(config, params)
        both = np.concatenate([unconditional, condition])

        def ours() -> jax.Array:
            arguments = (params, table, noise, condition, unconditional, GUIDANCE)  # noqa: B023
            return jax.block_until_ready(sample(*arguments, config=config))

        eager = torch_sampler(model, noise, both)
        compiled = torch_sampler(torch.compile(model), noise, both)
        expected = eager().numpy().transpose(0, 2, 3, 1)
        apart = np.abs(np.asarray(ours()) - expected).max() / np.abs(expected).max()
        times = medians({"emu_jax": ours, "diffusers": eager, "compiled": compiled}, ROUNDS)
        row = f"{f'{images} at a time, ms':28s}" + "".join(f"{1e3 * seconds:12.1f}" for seconds in times.values())
        print(f"{row}{min(times['diffusers'], times['compiled']) / times['emu_jax']:11.2f}x{apart:10.1e}")
    started = time.monotonic()
    jax.block_until_ready(sample(params, table, noise + 1.0, condition, unconditional, 3.0, config=config))
    print(f"\nanother guidance scale and noise: {1e3 * (time.monotonic() - started):.1f} ms")
    arguments = (params, table, noise, condition, unconditional, GUIDANCE)
    used = sample.lower(*arguments, config=config).compile().memory_analysis().temp_size_in_bytes
    one = jax.jit(functools.partial(unet.apply, config=config))
    steps = np.zeros(2 * len(noise), np.int32)
    call = one.lower(params, np.concatenate([noise, noise]), steps, both).compile()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(
        f"memory of sampling {len(noise)}: {used / 1e6:.1f} MB; of one U-Net call for {2 * len(noise)}: "
        f"{call.memory_analysis().temp_size_in_bytes / 1e6:.1f} MB; weights {weights / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
