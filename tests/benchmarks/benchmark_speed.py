"""Speed against PyTorch, side by side: `python -m tests.benchmarks.benchmark_speed` prints a table of medians.

The same model (`mini`), float32, the same number of threads. Each row alternates between the contestants, so that
what else the machine does hits all of them. Which work is compared:

    training step    loss, gradients, clipping and AdamW of one packed batch; PyTorch eager and under torch.compile
    beam search      5 beams, 24 tokens after an image; PyTorch with a growing cache that is reordered every step
    embeddings       32 of them after 256 tokens; PyTorch recomputes the whole prefix for each, as the reference does
    input            images a second and core of the quick start's pipeline, and its share of a training step
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch

from configs import quickstart
from emu_jax.data.config import DataConfig
from emu_jax.data.counts import figures
from emu_jax.data.pipeline import Pipeline, train_tokenizer
from emu_jax.generate import embeddings as image
from emu_jax.generate import text
from emu_jax.models import emu
from emu_jax.models.emu import Batch, EmuConfig, SpecialIds
from emu_jax.sharding import make_mesh
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.state import create_state
from tests.benchmarks.torch_emu import TorchEmu, torch_state
from tests.train.tasks import interleaved, step_of

VOCABULARY = 1828  # of the quick start's tokenizer
IDS = SpecialIds(pad=1824, img=1825, img_end=1826, image=1827)
EOS = 2
ROUNDS = 15  # medians are over so many, after two that warm up


def synthetic_batch(
    config: EmuConfig, ids: SpecialIds, *, rows: int, row_tokens: int, row_images: int, seed: int = 0
) -> Batch:
    """A packed batch like the quick start's, in numpy: every image captioned once, every second one also drawn."""
    random = np.random.default_rng(seed)
    size, queries = config.vision.image_size, config.causal.queries
    images = random.integers(0, 256, (rows, row_images, size, size, 3), np.uint8)
    tokens = np.full((rows, row_tokens), ids.pad, np.int32)
    fields = {name: np.zeros((rows, row_tokens), np.float32) for name in ("text_weights", "visual_weights")}
    segments, slots = np.zeros_like(tokens), np.full_like(tokens, -1)
    image = [ids.img, *[ids.image] * queries, ids.img_end]
    for row in range(rows):
        at = 0
        for document in range(row_images + row_images // 2):
            drawn = document >= row_images
            text = random.integers(3, ids.pad, random.integers(4, 8)).tolist()
            body = [1, *text, *image, 2] if drawn else [1, *image, *text, 2]
            end = at + len(body)
            if end > row_tokens:
                break
            here = np.asarray(body)
            tokens[row, at:end] = here
            segments[row, at:end] = document + 1
            slots[row, at:end] = np.where(here == ids.image, document % row_images, -1)
            labelled = (here < ids.pad) & (np.arange(len(body)) > 0)
            fields["text_weights"][row, at:end] = labelled * (0.3 if drawn else 1.0)
            fields["visual_weights"][row, at:end] = ((here == ids.image) | (here == ids.img_end)) * float(drawn)
            at = end
    return Batch(images=images, tokens=tokens, segments=segments, slots=slots, **fields)


def torch_batch(batch: Batch) -> list[torch.Tensor]:
    """The six fields as tensors, in `TorchEmu.forward`'s order; the sources are for reports alone."""
    names = [field.name for field in dataclasses.fields(batch) if field.name != "source_ids"]
    tensors = [torch.from_numpy(np.asarray(getattr(batch, name))) for name in names]
    return [x if x.dtype in (torch.uint8, torch.float32) else x.long() for x in tensors]


def medians(contestants: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each, taking turns.

    A turn is a run that is not timed and one that is: PyTorch's threads keep spinning on the cores for a while after
    their work, and the caches hold the other contestant's weights.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 2):
        for name, run in contestants.items():
            run()
            started = time.perf_counter()
            run()
            if number >= 2:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def training_step(config: EmuConfig, data: DataConfig, settings: OptimizerConfig) -> dict[str, float]:
    """Seconds of a step of ours, of eager PyTorch and of torch.compile."""
    batch = synthetic_batch(config, IDS, rows=data.batch_rows, row_tokens=data.row_tokens, row_images=data.row_images)
    task = interleaved(config, IDS, settings)
    state = create_state(task, settings, 0, make_mesh({}))
    state = dataclasses.replace(state, total_steps=jnp.asarray(1000))
    initial = jax.tree.map(np.asarray, state.params)
    device_batch = jax.tree.map(jnp.asarray, batch)
    step = jax.jit(step_of(task, settings), donate_argnums=0)

    def ours() -> None:
        nonlocal state
        state, metrics = step(state, device_batch)
        jax.block_until_ready((state, metrics))

    def torch_step(compiled: bool) -> Callable[[], None]:
        model = TorchEmu(config, IDS)
        model.load_state_dict(torch_state(initial, config))
        rate = dict(settings.learning_rate)["llama"]
        adam = torch.optim.AdamW(
            model.parameters(), rate, (settings.b1, settings.b2), settings.eps, settings.weight_decay, fused=True
        )
        loss = torch.compile(model) if compiled else model
        tensors = torch_batch(batch)

        def run() -> None:
            loss(*tensors).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            adam.step()
            adam.zero_grad(set_to_none=True)

        return run

    return medians({"emu_jax": ours, "PyTorch": torch_step(False), "torch.compile": torch_step(True)})


def generation(config: EmuConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of (beam search after an image, 32 embeddings after 256 tokens)."""
    config = dataclasses.replace(
        config,
        causal=dataclasses.replace(config.causal, queries=32),
        llama=dataclasses.replace(config.llama, context=512),
    )
    params = emu.init(config, jax.random.key(0))
    model = TorchEmu(config, IDS)
    model.load_state_dict(torch_state(params, config))
    random = np.random.default_rng(0)
    short, long = (random.standard_normal((1, length, config.llama.width), np.float32) for length in (36, 256))
    options = text.Decoding(min_length=24, length_penalty=0.0)

    def beams() -> None:
        static = {"config": config, "ends": (EOS,), "max_new_tokens": 24, "beams": 5}
        jax.block_until_ready(text.beam_search(params, short, np.ones((1, 36), bool), options, **static))

    def embeddings() -> None:
        jax.block_until_ready(
            image.generate_embeddings(params, long, np.ones((1, 256), bool), np.zeros(1, np.uint32), config=config)
        )

    torch_short, torch_long = torch.from_numpy(short), torch.from_numpy(long)
    return (
        medians({"emu_jax": beams, "PyTorch": lambda: model.beam_search(torch_short, 5, 24, EOS)}),
        medians({"emu_jax": embeddings, "PyTorch": lambda: model.generate_embeddings(torch_long)}),
    )


def input_pipeline(data: DataConfig, image_size: int, queries: int) -> dict[str, float]:
    """Images a second and CPU core: while each is decoded for the first time, and from then on."""
    tokenizer = train_tokenizer(data, image_size, vocab_size=4000, model_type="word")
    pipeline = Pipeline(data, tokenizer, queries=queries, image_size=image_size)
    rates = {}
    for name, images in {"decoding": 3000, "decoded": 20000}.items():
        started, seen = time.process_time(), 0.0
        while seen < images:
            next(pipeline)
            seen += figures([pipeline.counts()])["images"]
        rates[name] = seen / (time.process_time() - started)
    pipeline.close()
    return rates


def main() -> None:
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    experiment = quickstart.get_config()
    experiment.model.llama.vocab_size = VOCABULARY
    config = EmuConfig.from_dict(experiment.model)
    data = DataConfig.from_dict(experiment.data)
    print(f"{threads} threads, jax {jax.__version__}, torch {torch.__version__}, medians of {ROUNDS} turns\n")
    print(f"{'':32s}{'emu_jax':>12s}{'PyTorch':>12s}{'compiled':>12s}{'faster by':>12s}")

    step = training_step(config, data, OptimizerConfig.from_dict(experiment.optimizer))
    row = f"{'training step, ms':32s}" + "".join(f"{1e3 * seconds:12.1f}" for seconds in step.values())
    print(row + f"{min(step['PyTorch'], step['torch.compile']) / step['emu_jax']:11.2f}x")
    names = ("beam search, 5 beams, ms", "32 embeddings after 256, ms")
    for name, seconds in zip(names, generation(config), strict=True):
        ours, theirs = seconds["emu_jax"], seconds["PyTorch"]
        print(f"{name:32s}{1e3 * ours:12.1f}{1e3 * theirs:12.1f}{'':12s}{theirs / ours:11.2f}x")
    rates = input_pipeline(data, config.vision.image_size, config.causal.queries)
    print(f"{'input, images a second, core':32s}{rates['decoded']:12,.0f}  (while decoding {rates['decoding']:,.0f})")
    needed = data.batch_rows * data.row_images / step["emu_jax"]
    print(f"{'input, share of one core':32s}{needed / rates['decoded']:12.2%}  at {needed:,.0f} images a second")


if __name__ == "__main__":
    main()
