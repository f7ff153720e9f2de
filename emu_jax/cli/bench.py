"""`emu-jax bench`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from emu_jax.cli.options import CONFIG_HELP, check_parent, path
from emu_jax.storage import replace_text

ABOUT = "Time input, decoding, drawing and training steps on this machine's devices, with random weights."
EXAMPLE = "emu-jax bench --config configs/quickstart.py --size quickstart --json speed.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="configs/quickstart.py", help=CONFIG_HELP)
    parser.add_argument("--size", default="quickstart", help="size of the U-Net: quickstart or sd15")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=path, metavar="FILE", help="write every figure")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    import jax

    from emu_jax.bench import bench, describe
    from emu_jax.config import load_config

    check_parent("--json", options.json)
    timings = bench(load_config(options.config, overrides), size=options.size, repetitions=options.repetitions)
    devices = {"devices": jax.device_count(), "kind": jax.devices()[0].device_kind, "jax": jax.__version__}
    print(f"{devices['devices']} x {devices['kind']}, jax {devices['jax']}, {options.repetitions} repetitions\n")
    print(describe(timings))
    if options.json is not None:
        figures = devices | {"timings": [timing.to_json() for timing in timings]}
        replace_text(options.json, json.dumps(figures, indent=2) + "\n")
    return 0
