"""Speed of the visual heads: `python -m tests.benchmarks.benchmark_heads [--queries 32] [--rounds 9]`.

The quick start's language model, with random parameters. For each head of the registry: milliseconds to generate an
image's embeddings after a prompt of 16 tokens, for one prompt and for eight, and a training step of the rows of
`configs/quickstart.py` over a frozen encoder's embeddings. The heads take turns; out: medians, and their ratio to l2's.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from configs import models, quickstart
from emu_jax.generate.embeddings import generate_embeddings
from emu_jax.models import emu
from emu_jax.models.heads.registry import PUBLISHED, build_head, head_names

PROMPT = 16  # tokens
BATCHES = (1, 8)
IDS = emu.SpecialIds(pad=0, img=1, img_end=2, image=3)


def model_of(name: str, queries: int) -> emu.EmuConfig:
    config = emu.EmuConfig.from_dict(models.mini())
    head = build_head("model.visual_head", {"name": name})
    causal = dataclasses.replace(config.causal, queries=queries)
    return dataclasses.replace(config, causal=causal, visual_head=head)


def generation(config: emu.EmuConfig, params: emu.Params, batch: int) -> Callable[[], Any]:
    inputs = jax.random.normal(jax.random.key(1), (batch, PROMPT, config.llama.width))
    valid, seeds = jnp.ones((batch, PROMPT), bool), jnp.arange(batch, dtype=jnp.uint32)
    return lambda: generate_embeddings(params, inputs, valid, seeds, config=config)


def step(config: emu.EmuConfig, params: emu.Params) -> Callable[[], Any]:
    """Loss and gradient of the language model and its head."""
    data = quickstart.get_config().data
    rows, length, queries = data.batch_rows, data.row_tokens, config.causal.queries
    image = [IDS.img, *[IDS.image] * queries, IDS.img_end]
    document = [9, 10, 11, *image]
    tokens = jnp.array([(document * length)[:length]] * rows)
    visual = (tokens == IDS.image) | (tokens == IDS.img_end)
    slots = jnp.where(tokens == IDS.image, jnp.cumsum(tokens == IDS.img, axis=1) - 1, -1)
    side, images = config.vision.image_size, length // len(document) + 1
    batch = emu.Batch(
        images=jnp.zeros((rows, images, side, side, 3), jnp.uint8),
        tokens=tokens,
        segments=jnp.ones_like(tokens),
        slots=slots,
        text_weights=(~visual).astype(jnp.float32),
        visual_weights=visual.astype(jnp.float32),
    )
    statistics = emu.initial_statistics(config)

    def loss(llama: dict, key: jax.Array) -> jax.Array:
        tree = {**params, "llama": llama}
        return emu.loss(tree, statistics, batch, config=config, ids=IDS, key=key, train=False)[0]

    compiled = jax.jit(jax.value_and_grad(loss))
    return lambda: compiled(params["llama"], jax.random.key(0))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    columns = [f"{options.queries} embeddings x {batch}" for batch in BATCHES] + ["step"]
    programs: dict[str, list[Callable[[], Any]]] = {}
    for name in head_names():
        config = model_of(name, options.queries)
        params = emu.init(config, jax.random.key(0))
        programs[name] = [generation(config, params, batch) for batch in BATCHES] + [step(config, params)]
        for program in programs[name]:
            jax.block_until_ready(program())  # compiles
    times: dict[str, list[list[float]]] = {name: [[] for _ in columns] for name in programs}
    for _ in range(options.rounds):
        for name, some in programs.items():
            for column, program in enumerate(some):
                began = time.perf_counter()
                jax.block_until_ready(program())
                times[name][column].append(1e3 * (time.perf_counter() - began))
    medians = {name: [statistics.median(column) for column in found] for name, found in times.items()}
    print(f"| ms (beside {PUBLISHED.name}) | " + " | ".join(columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for name, found in medians.items():
        cells = (f"{x:.1f} ({x / beside:.2f})" for x, beside in zip(found, medians[PUBLISHED.name], strict=True))
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
