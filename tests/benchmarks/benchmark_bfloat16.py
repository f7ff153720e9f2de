"""bfloat16 beside float32: `python -m tests.benchmarks.benchmark_bfloat16 FOLDER [--steps N] [--seeds N] …`.

Trains configs/quickstart.py in FOLDER/<variant>-<seed>, each run a process on one thread. A seed has the same
parameters, batches and order under every variant:

    float32       compute in float32, as the quick start has it
    bfloat16      model.dtype=bfloat16: products and activations; master parameters, norms, softmax and loss are float32
    f32 gradients the same, with model.float32_gradients=True

Runs that are finished are not run again, and those that were interrupted go on. Out: at every logged step the mean of
each loss over seeds with its 95% interval (Student's t), and the paired difference from float32, with its interval and
* where that leaves out 0; at the end the same of the held-out loss, in float32 for all, and the seconds a step.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs import quickstart
from emu_jax import Emu
from emu_jax.data.config import DataConfig
from emu_jax.data.pipeline import Pipeline
from emu_jax.evaluate.compare import Mean, mean_over
from emu_jax.models import emu
from emu_jax.workdir import read_metrics

VARIANTS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "f32 gradients": {"dtype": "bfloat16", "float32_gradients": "True"},
}
LOSSES = ("text_loss", "regression_loss")
LOG_EVERY = 20
HELD_OUT = "heldout_combinations"  # 140 images
HELD_OUT_BATCHES = 5  # of 8 rows with 4 images


def workdir(folder: Path, variant: str, seed: int) -> Path:
    return folder / f"{variant.replace(' ', '_')}-{seed}"


def finished(run: Path, steps: int) -> bool:
    """Whether a run has come to its last step."""
    file = run / "metrics.jsonl"
    rows = read_metrics(file) if file.exists() else []
    return bool(rows) and rows[-1]["step"] == steps


def train(run: Path, fields: dict[str, str], steps: int, seed: int) -> None:
    """One run, in a process of one thread; its words go to `run`.log.

    Raises:
      RuntimeError: it failed.
    """
    settings = {f"model.{name}": value for name, value in fields.items()}
    settings |= {"train.steps": str(steps), "train.minutes": "0.0", "train.seed": str(seed), "data.seed": str(seed)}
    settings |= {"train.log_every": str(LOG_EVERY), "train.checkpoint_every": str(steps), "train.keep_checkpoints": "2"}
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "emu_jax.cli", "train", "--config", "configs/quickstart.py", "--workdir", str(run)]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    threads |= {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}
    with run.with_name(run.name + ".log").open("ab") as log:
        done = subprocess.run([*command, *overrides], env=os.environ | threads, stdout=log, stderr=log)
    if done.returncode:
        raise RuntimeError(f"{run}: ended with {done.returncode}; see {log.name}")


def held_out(run: Path, seed: int = 0) -> dict[str, float]:
    """Both losses of what a run has learnt, in float32, over the same held-out rows for all runs."""
    model = Emu.load(run)
    config = dataclasses.replace(model.config, dtype="float32")
    fields = quickstart.get_config().data
    fields.update({"split": HELD_OUT, "seed": seed})
    tokenizer = model.tokenizer
    ids = emu.SpecialIds(tokenizer.pad_id, tokenizer.img_id, tokenizer.img_end_id, tokenizer.image_id)
    data = DataConfig.from_dict(fields)
    sizes = {"queries": config.causal.queries, "image_size": config.vision.image_size}
    stream = Pipeline(data, tokenizer, **sizes)
    loss = jax.jit(emu.loss, static_argnames=("config", "ids", "train"))
    found: list[list[float]] = []
    for _ in range(HELD_OUT_BATCHES):
        batch = emu.Batch(**jax.tree.map(jnp.asarray, next(stream)))
        metrics = loss(model.params, model.statistics, batch, config=config, ids=ids, train=False)[1][0]
        found.append([float(metrics[name]) for name in LOSSES])
    stream.close()
    return dict(zip(LOSSES, np.mean(found, axis=0).tolist(), strict=True))


def cell(mean: Mean, *, sign: bool = False) -> str:
    """A mean and half of its interval's width; * where that leaves out 0."""
    assert mean.mean is not None
    spread = "" if mean.interval is None else f" ± {(mean.interval[1] - mean.interval[0]) / 2:.4f}"
    mark = "*" if sign and mean.interval is not None and not mean.interval[0] <= 0 <= mean.interval[1] else ""
    return f"{mean.mean:{'+' if sign else ''}.4f}{spread}{mark}"


def lines(name: str, values: dict[str, Sequence[float]]) -> str:
    """A row of the table: every variant's mean over seeds, and the paired differences from the first."""
    (base, *others) = VARIANTS
    means = [cell(mean_over(values[variant])) for variant in VARIANTS]
    differences = [
        cell(mean_over([a - b for a, b in zip(values[variant], values[base], strict=True)]), sign=True)
        for variant in others
    ]
    return "| " + " | ".join([name, *means, *differences]) + " |"


def table(folder: Path, steps: int, seeds: range) -> str:
    """All runs, as Markdown."""
    runs = {variant: [workdir(folder, variant, seed) for seed in seeds] for variant in VARIANTS}
    rows = {variant: [read_metrics(run / "metrics.jsonl") for run in some] for variant, some in runs.items()}
    columns = [*VARIANTS, *(f"{variant} - float32" for variant in list(VARIANTS)[1:])]
    text = []
    for loss in LOSSES:
        text += [f"\n{loss}, {len(seeds)} seeds, 95% intervals\n", "| step | " + " | ".join(columns) + " |"]
        text.append("|---" * (1 + len(columns)) + "|")
        for place in range(len(rows["float32"][0])):
            values = {variant: [run[place][loss] for run in some] for variant, some in rows.items()}
            text.append(lines(str(int(rows["float32"][0][place]["step"])), values))
        final = {variant: [held_out(run)[loss] for run in some] for variant, some in runs.items()}
        text.append(lines(f"{steps}, held-out", final))
    text.append("")
    for variant, some in rows.items():
        seconds = [np.median([row["compute_ms"] for row in run[1:] or run]) / 1000 for run in some]
        text.append(f"{variant}: {np.median(seconds):.3f} s a step on one thread (median over {len(seconds)} runs)")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--parallel", type=int, default=1, help="processes that train side by side")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    seeds = range(options.seeds)
    waiting = [
        (workdir(options.folder, variant, seed), fields, options.steps, seed)
        for seed in seeds
        for variant, fields in VARIANTS.items()
    ]
    waiting = [run for run in waiting if not finished(run[0], options.steps)]
    with concurrent.futures.ThreadPoolExecutor(options.parallel) as pool:
        for done in concurrent.futures.as_completed([pool.submit(train, *run) for run in waiting]):
            done.result()
    print(table(options.folder, options.steps, seeds))


if __name__ == "__main__":
    main()
