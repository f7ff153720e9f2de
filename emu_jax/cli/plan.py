"""`emu-jax plan`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from emu_jax.cli.options import CONFIG_HELP, check_parent, path
from emu_jax.errors import UserError
from emu_jax.storage import Path, replace_text

ABOUT = "Compile a step for absent TPUs: whether it fits, and how fast it should be."
# What a mode does not take.
UNUSED = {
    "serve": ("compare", "decode", "chart", "suggest", "rows_per_device", "untimed", "fill", "price"),
    "suggest": ("compare", "decode", "chart", "rows_per_device", "untimed", "fill", "price"),
}
EXAMPLE = "emu-jax plan --config configs/pretrain.py:14b --topology v5p:4x4x4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help=CONFIG_HELP)
    parser.add_argument("--topology", required=True, help="v5p:4x4x4, v5e:16x16, 2*v5p:4x4x4 (two slices), …, or here")
    parser.add_argument("--rows-per-device", type=int, default=0, help="(default: the config's batch)")
    parser.add_argument("--decode", type=int, default=0, metavar="ROWS", help="plan decoding of this many sequences")
    parser.add_argument("--serve", action="store_true", help="plan serving: all weights, and every program that runs")
    parser.add_argument(
        "--drawing", metavar="CONFIG", help="with --serve: a decoder's config, such as configs/decoder.py:published"
    )
    parser.add_argument(
        "--untimed", action="store_true", help="memory and collectives only: one compilation instead of six"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="FIELD=A,B",
        help="rank all combinations, e.g. model.llama.remat=full,dots rows=1,2,4",
    )
    parser.add_argument(
        "--suggest",
        action="store_true",
        help="search mesh, rows, remat and micro-batches for the three fastest that fit; up to 12 compilations",
    )
    parser.add_argument(
        "--fill",
        metavar="TOKENS,IMAGES",
        help="shares of positions and image slots that are not padding, e.g. 0.91,0.97",
    )
    parser.add_argument("--price", type=float, default=0.0, help="of a chip for an hour: adds the price of the run")
    parser.add_argument("--json", type=path, metavar="FILE", help="write every figure")
    parser.add_argument("--chart", type=path, metavar="FILE.png", help="draw memory and time")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    import dataclasses

    from emu_jax.config import load_config
    from emu_jax.plan import report
    from emu_jax.plan.plan import Plan, compare, make_plan
    from emu_jax.plan.serving import plan_serving
    from emu_jax.plan.suggest import suggest
    from emu_jax.plan.topology import describe as describe_topology

    for name in ("rows_per_device", "decode"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}; expected 1 or more")
    if options.price < 0:
        raise UserError(f"--price {options.price:g}; expected 0 or more")
    fill = _fill(options.fill) if options.fill else None
    if options.drawing and not options.serve:
        raise UserError(f"--drawing {options.drawing}: only a served model draws; add --serve")
    for mode, unused in UNUSED.items():
        for name in unused:
            if getattr(options, mode) and getattr(options, name):
                raise UserError(f"--{mode}: it takes no --{name.replace('_', '-')}")
    check_parent("--json", options.json)
    check_parent("--chart", options.chart)
    config = load_config(options.config, overrides)
    sweep = {}
    for text in options.compare or ():
        field, separator, values = text.partition("=")
        if not separator or not all(values.split(",")):
            raise UserError(f"--compare {text}: expected FIELD=A,B as in model.llama.remat=full,dots or rows=1,2,4")
        sweep[field] = values.split(",")
    topology = describe_topology(options.topology)
    if options.serve:
        drawing = load_config(options.drawing, []) if options.drawing else None
        serving = plan_serving(config, topology, drawing)
        print(report.describe_serving(serving))
        _write_json(options.json, dataclasses.asdict(serving))
        return 0 if serving.fits else 1
    if options.suggest:
        suggestions = suggest(config, topology)
        print(report.describe_suggestions(suggestions, options.topology))
        _write_json(options.json, dataclasses.asdict(suggestions))
        return 0 if suggestions.found else 1
    sizes = (options.rows_per_device, options.decode)
    if sweep:
        ranking = compare(config, topology, sweep, *sizes, timed=not options.untimed)
        print(report.describe_comparison(ranking))
        plans = [(" ".join(map("=".join, choice.items())), found) for choice, found in ranking]
        plans = [(name, found) for name, found in plans if isinstance(found, Plan)]
    else:
        plans = [(options.topology, make_plan(config, topology, *sizes, timed=not options.untimed))]
        print(report.describe(plans[0][1], fill, options.price))
    _write_json(options.json, {name: dataclasses.asdict(found) for name, found in plans})
    if options.chart is not None and plans:
        report.chart(plans, options.chart)
    return 0 if any(found.fits for _, found in plans) else 1


def _fill(text: str) -> dict[str, float]:
    try:
        tokens, images = map(float, text.split(","))
    except ValueError:
        tokens = images = -1.0
    if not 0 < tokens <= 1 or not 0 < images <= 1:
        raise UserError(f"--fill {text}: expected two shares of 0 to 1, as in 0.91,0.97")
    return {"tokens": tokens, "images": images}


def _write_json(file: Path | None, figures: Mapping[str, Any]) -> None:
    if file is not None:
        plain = json.loads(json.dumps(figures), parse_constant=lambda _: None)  # JSON knows no NaN
        replace_text(file, json.dumps(plain, indent=2) + "\n")
