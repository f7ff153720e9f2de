"""The planner held against what others measured on TPUs: `python -m tests.benchmarks.benchmark_plan --out FOLDER`.

In: published step times of plain language models, trained by MaxText. Out: for each of them the planner's time beside
the measured one. The planner compiles its own training step for the same slice, mesh, rows and remat, with a language
model of the same sizes and next to no vision encoder. A point takes four compilations, of 2 to 4 minutes each on 2 CPU
cores; points that are in FOLDER are not compiled again.

A plan's time has two constants that a compiler does not know:

    time = roofline + attention kernels / (peak * efficiency) + (1 - overlap) * interconnect

They are fitted on every second point (least squares of the logarithm) and tested on the others, and the other way
round. The error bar of a plan is the root mean square of the tested points' errors.

Sources. 32B, 64B: "Runtime Performance Results" of MaxText's README, with MaxText/configs/v5e and v5p (the model FLOPs
there count attention in full, and so does `measured`). LLaMA-2-70B, LLaMA-3.1-8B: the log lines in
training/trillium of AI-Hypercomputer/tpu-recipes.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

from emu_jax.config import load_config
from emu_jax.errors import UserError
from emu_jax.plan.plan import make_plan
from emu_jax.plan.topology import describe
from emu_jax.storage import write_atomically

TWENTIETHS = [n / 20 for n in range(21)]


@dataclasses.dataclass(frozen=True)
class Point:
    """A published measurement.

    Attributes:
      rows, tokens: rows of a batch for each chip, and their length.
      tensor: chips over which a layer's heads are split; the others shard by FSDP.
      step: measured seconds of a step; 0 where `tflops` is published instead.
      tflops: measured TFLOP/s of a chip.
    """

    name: str
    topology: str
    rows: int
    tokens: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_dim: int
    vocab_size: int
    remat: str
    tensor: int = 1
    step: float = 0.0
    tflops: float = 0.0

    @property
    def measured(self) -> float:
        """Seconds of a step."""
        if self.step:
            return self.step
        keys = self.width * self.kv_heads // self.heads
        layer = 2 * self.width * (self.width + keys) + 3 * self.width * self.mlp_dim
        weights = self.layers * layer + self.width * self.vocab_size
        attention = 2 * self.layers * self.width * self.tokens
        return 6 * self.rows * self.tokens * (weights + attention) / (self.tflops * 1e12)

    def settings(self) -> list[str]:
        """Overrides of configs/pretrain.py:14b."""
        fields = {
            "model.llama.width": self.width,
            "model.llama.layers": self.layers,
            "model.llama.heads": self.heads,
            "model.llama.kv_heads": self.kv_heads,
            "model.llama.mlp_dim": self.mlp_dim,
            "model.llama.vocab_size": self.vocab_size,
            "model.llama.context": self.tokens,
            "model.llama.remat": self.remat,
            "model.vision.layers": 1,
            "model.vision.width": 128,
            "model.vision.heads": 2,
            "model.vision.mlp_dim": 128,
            "model.causal.kind": "pooled",
            "model.causal.queries": 4,
            "data.row_tokens": self.tokens,
            "data.row_images": 1,
            "optimizer.accumulate_steps": 1,
            "train.mesh.data": 1,
            "train.mesh.fsdp": -1,
            "train.mesh.tensor": self.tensor,
        }
        return [f"--config.{field}={value}" for field, value in fields.items()]


PLAIN = {"width": 8192, "heads": 64, "kv_heads": 64, "mlp_dim": 28672, "vocab_size": 32_000}
GROUPED = PLAIN | {"kv_heads": 8}
SMALL = {"width": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "mlp_dim": 14336, "vocab_size": 128_256}
POINTS = (
    Point("32B", "v5e:16x16", 4, 2048, layers=32, remat="full", tflops=132, **PLAIN),
    Point("LLaMA-2-70B", "v6e:16x16", 4, 4096, layers=80, remat="full", step=17.373, **GROUPED),
    Point("32B", "v5p:4x4x4", 7, 2048, layers=32, remat="dots", tensor=4, tflops=328, **PLAIN),
    Point("64B", "v5e:16x16", 2, 2048, layers=64, remat="full", tflops=118, **PLAIN),
    Point("LLaMA-3.1-8B", "v6e:16x16", 4, 8192, remat="full", step=4.225, **SMALL),
    Point("64B", "v5p:4x4x4", 3, 2048, layers=64, remat="dots", tensor=4, tflops=323, **PLAIN),
)


@dataclasses.dataclass(frozen=True)
class Found:
    """What the planner says of a point, in seconds; `kernels` at the chip's full peak."""

    roofline: float
    kernels: float
    interconnect: float
    gib: float
    agreement: float

    def seconds(self, efficiency: float, overlap: float) -> float:
        return self.roofline + self.kernels / efficiency + (1 - overlap) * self.interconnect


def plan(point: Point) -> Found:
    topology = describe(point.topology)
    config = load_config("configs/pretrain.py:14b", point.settings())
    found = make_plan(config, topology, rows_per_device=point.rows * point.tensor)
    return Found(
        roofline=found.times["roofline"],
        kernels=found.cost.kernel_flops / found.peak_flops,
        interconnect=found.interconnect_s,
        gib=found.peak / (1 << 30),
        agreement=found.agreement,
    )


def fit(points: Sequence[tuple[Point, Found]]) -> tuple[float, float]:
    """Efficiency and overlap with the least squared error of the logarithm, on a grid of twentieths."""

    def error(constants: tuple[float, float]) -> float:
        return sum(math.log(found.seconds(*constants) / point.measured) ** 2 for point, found in points)

    return min(itertools.product(TWENTIETHS[2:], TWENTIETHS), key=error)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the compiled points; run again to resume")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    done: list[tuple[Point, Found]] = []
    for point in POINTS:
        file = options.out / f"{point.name}-{point.topology.replace(':', '-')}.json"
        if not file.exists():
            text = json.dumps(dataclasses.asdict(plan(point)), indent=1)
            with write_atomically(file) as partial:
                partial.write_text(text)
        done.append((point, Found(**json.loads(file.read_text()))))

    print("| model, slice | measured, s | roofline | kernels at peak | interconnect | plan | error |")
    print("|---|---|---|---|---|---|---|")
    errors = []
    for place, (point, found) in enumerate(done):
        constants = fit([pair for other, pair in enumerate(done) if other % 2 != place % 2])
        seconds = found.seconds(*constants)
        errors.append(math.log(seconds / point.measured))
        print(
            f"| {point.name}, {point.topology} | {point.measured:.2f} | {found.roofline:.2f} | {found.kernels:.2f} | "
            f"{found.interconnect:.2f} | {seconds:.2f} | {seconds / point.measured - 1:+.1%} |"
        )
    efficiency, overlap = fit(done)
    spread = math.exp(math.sqrt(sum(error**2 for error in errors) / len(errors))) - 1
    print(f"\nall points: attention kernels at {efficiency:.0%} of peak, {overlap:.0%} of the interconnect overlaps")
    print(f"error bar of a plan: {spread:.1%}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
