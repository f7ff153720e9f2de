"""Speed of evaluation: `python -m tests.benchmarks.benchmark_evaluate [WORKDIR]` prints a table of medians.

Captions of the embedded images by the quick start's model (random weights unless a work directory is named), with the
paper's settings for captions: 5 beams, 20 tokens. Questions a second, by the same runner that `emu-jax evaluate` uses,
from images to predictions on disk; turns alternate, so that what else the machine does hits all of them.

    batch 16, 4         16 or 4 questions at a time, over one cache
    one at a time       a loop over questions, each with its cache
    without a cache     the same loop, and every token reads the whole prefix of every beam again
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs import quickstart
from emu_jax import Emu
from emu_jax.evaluate import predictions
from emu_jax.evaluate.benchmarks.registry import find_benchmark
from emu_jax.evaluate.predict import predict, read_images
from emu_jax.evaluate.prompts import CAPTION, ModelCall
from emu_jax.evaluate.question import Question
from emu_jax.models import emu
from emu_jax.train.tasks.task import find_task

QUESTIONS = 48
TURNS = 5
BEAMS, TOKENS = CAPTION["num_beams"], CAPTION["max_new_tokens"]


def random_model() -> Emu:
    """The quick start's model, untrained."""
    config = quickstart.get_config()
    documents = find_task(config.objective).documents(config)
    model, tokenizer = documents.model, documents.tokenizer
    return Emu(model, emu.init(model, jax.random.key(0)), emu.initial_statistics(model), tokenizer)


def describe(question: Question, images: Sequence, examples: Sequence, chat: bool):
    """A caption right behind the image, as the quick start was taught."""
    return (yield ModelCall(tuple(images), CAPTION))


def by_runner(model: Emu, questions: Sequence[Question], batch: int) -> Callable[[], None]:
    run = predictions.RunIdentity("fluent", "test", 0, "", False, False, model.fingerprint, "")

    def turn() -> None:
        with tempfile.TemporaryDirectory() as folder:
            predict(model, questions, describe, Path(folder), run, batch=batch)

    return turn


def without_cache(model: Emu, questions: Sequence[Question]) -> Callable[[], None]:
    """Beam search that reads everything again for every token; lengths are padded, so that one program does."""
    config = model.config

    @jax.jit
    def scores(params: emu.Params, inputs: jax.Array, tokens: jax.Array, count: jax.Array) -> jax.Array:
        """inputs [1, T, D], tokens int32 [K, N] of which `count` are there -> log p of the next [K, V]."""
        llama = emu.bind(config, params).llama
        prompt = jnp.broadcast_to(inputs, (len(tokens), *inputs.shape[1:])).astype(config.dtype)
        rows = jnp.concatenate([prompt, llama.embed(tokens).astype(config.dtype)], axis=1)  # [K, T+N, D]
        positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape[:2])
        hidden = llama(rows, positions, jnp.ones_like(positions), unroll=config.unroll)
        return jax.nn.log_softmax(llama.logits(hidden[:, inputs.shape[1] + count - 1]).astype(jnp.float32))

    def turn() -> None:
        for question in questions:
            inputs, valid = model._inputs([read_images(question, config.vision.image_size)], new_tokens=TOKENS)
            inputs = inputs[:, -int(valid.sum()) :]
            tokens, totals = np.zeros((BEAMS, TOKENS), np.int32), np.where(np.arange(BEAMS) == 0, 0.0, -1e9)
            for count in range(TOKENS):
                found = totals[:, None] + np.asarray(scores(model.params, inputs, tokens, count))
                best = np.argsort(-found, axis=None)[:BEAMS]
                parents, chosen = np.divmod(best, found.shape[1])
                tokens, totals = tokens[parents], found.reshape(-1)[best]
                tokens[:, count] = chosen

    return turn


def main() -> None:
    model = Emu.load(sys.argv[1]) if len(sys.argv) > 1 else random_model()
    questions = find_benchmark("fluent").read(Path())[:QUESTIONS]
    contestants = {
        "batch 16": by_runner(model, questions, 16),
        "batch 4": by_runner(model, questions, 4),
        "one at a time": by_runner(model, questions, 1),
        "without a cache": without_cache(model, questions),
    }
    for turn in contestants.values():
        turn()  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(TURNS):
        for name, turn in contestants.items():
            start = time.perf_counter()
            turn()
            seconds[name].append(time.perf_counter() - start)
    rates = {name: len(questions) / statistics.median(values) for name, values in seconds.items()}
    print(f"{jax.devices()[0].device_kind}, {BEAMS} beams, {TOKENS} tokens, {len(questions)} questions, {TURNS} turns")
    for name, rate in rates.items():
        print(f"  {name:16s} {rate:8.1f} questions/s   {rates['batch 16'] / rate:5.1f}x slower than batch 16")
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
