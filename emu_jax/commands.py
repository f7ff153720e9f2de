"""What `emu-jax COMMAND` does: parsed arguments to one call of the library, and what is printed of it.

Each takes the options and the words that override the config, and returns the exit code. They import what they need
themselves: `emu-jax --help` must not wait for JAX.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emu_jax.errors import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}


def prepare(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.data.images import Recoding
    from emu_jax.data.prepare import PrepareConfig
    from emu_jax.data.prepare import prepare as run
    from emu_jax.data.raw.readers import make_reader

    fields = ("image_size", "quality", "min_side", "max_aspect")
    config = PrepareConfig(
        name=options.name or re.sub(r"\W", "_", options.out.resolve().name),
        recoding=Recoding(**{name: getattr(options, name) for name in fields}),
        **{name: getattr(options, name) for name in ("split", "shards", "max_faults", "runner", "workers", "beam")},
    )
    manifest = run(make_reader(options.source, options.set), options.source, options.path, options.out, config)
    split = manifest["splits"][options.split]
    size = sum(file["bytes"] for file in split["files"].values())
    print(f"{options.out}: {split['records']:,} documents in {len(split['files'])} files, {size / 1e6:,.1f} MB")
    for reason, counts in manifest["rejects"].items():
        print(f"  left out, {reason}: {counts['rejects']:,} ({counts['documents']:,} whole documents)")
    return 0


def inspect_data(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.config import load_config
    from emu_jax.inspect.data import inspect as run

    config = load_config(options.config, overrides)
    settings = {"rows": options.rows, "batches": options.batches, "verify": options.verify, "counts": options.json}
    print(run(config, options.out, **settings))
    return 0


def train(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.config import load_config
    from emu_jax.train import distributed
    from emu_jax.train.loop import compile_only
    from emu_jax.train.loop import train as run
    from emu_jax.train.metrics import parse_steps

    profile = parse_steps(options.profile_steps) if options.profile_steps else range(0)
    if options.compilation_cache is not None:
        use_compilation_cache(options.compilation_cache)
    try:
        with distributed.job():
            config = load_config(options.config, overrides)
            if options.compile_only:
                print(compile_only(config, options.workdir))
            else:
                run(config, options.workdir, profile=profile, reshard_data=options.reshard_data)
    except distributed.Preempted as stopped:
        print(f"emu-jax train: {stopped}", file=sys.stderr)
        return distributed.EXIT_PREEMPTED
    return 0


def use_compilation_cache(folder: Path) -> None:
    """Makes JAX keep what it compiles in a folder (without it, where JAX_COMPILATION_CACHE_DIR says)."""
    import tempfile

    import jax

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"--compilation-cache {folder}: cannot be written ({error.strerror}); name a folder where you may write"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(folder))


def precompute(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.generate.precompute import precompute as run

    count = run(
        options.model,
        options.vae,
        options.out,
        source=options.source,
        split=options.split,
        image_size=options.image_size,
        tokenizer=options.tokenizer,
        vision_head_dim=options.vision_head_dim,
        weights=options.weights,
    )
    print(f"{options.out}: {count} examples")
    return 0


def generate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    import numpy as np

    from emu_jax.generate.files import draw_files, read_requests, with_seeds
    from emu_jax.generate.model import Emu

    out = options.embeddings
    if out is not None and out.exists():
        raise UserError(f"--embeddings {out}: the file exists; name a new one")
    # A word that ends like an image file is one: a typing error must not be captioned as text.
    prompt = [Path(word) if Path(word).suffix.lower() in IMAGE_SUFFIXES else word for word in options.prompt or ()]
    if options.batch < 1:
        raise UserError(f"--batch {options.batch}; expected at least 1")
    requests = read_requests(options.prompts) if options.prompts else []
    if options.out is not None:
        requests = with_seeds(prompt, options.seeds, options.out)
    emu = Emu.load(
        options.model,
        tokenizer=options.tokenizer,
        vision_head_dim=options.vision_head_dim,
        weights=options.weights,
        decoder=options.decoder,
        safety_checker=not options.no_safety_checker,
    )
    if requests:
        settings = {name: getattr(options, name) for name in ("sampler", "steps", "guidance", "height", "width")}
        for path in draw_files(emu, requests, batch=options.batch, settings=settings):
            print(path)
        return 0
    if out is not None:
        np.save(out, emu.generate_embeddings([prompt])[0])
        print(out)
        return 0
    results = emu.generate_text(
        [prompt],
        num_beams=options.num_beams,
        max_new_tokens=options.max_new_tokens,
        min_length=options.min_length,
        length_penalty=options.length_penalty,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seeds[0],
    )
    print(results[0].text)
    return 0


def chat(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.generate.console import Console, converse, converse_at_terminal
    from emu_jax.generate.model import Emu, check_decoding

    names = ("num_beams", "max_new_tokens", "min_length", "length_penalty", "temperature", "top_k", "top_p", "seed")
    settings = {name: getattr(options, name) for name in names}
    tokens = 1 if options.max_new_tokens is None else options.max_new_tokens
    check_decoding(options.num_beams, tokens, options.temperature, options.top_p)
    emu = Emu.load(
        options.model,
        tokenizer=options.tokenizer,
        vision_head_dim=options.vision_head_dim,
        weights=options.weights,
    )
    console = Console(emu.chat(options.system), sys.stdout, settings)
    for video, paths in ((False, options.image), (True, options.video)):
        for path in paths:
            console.show(path, video=video)
    if options.message is None and sys.stdin.isatty():
        converse_at_terminal(console)
        return 0
    try:
        converse(console, sys.stdin if options.message is None else options.message)
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8 ({error.reason}); expected a message a line") from error
    return 0


def serve(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    import logging
    import os

    try:
        from emu_jax.serve import server
        from emu_jax.serve.limits import Limits
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}, which is missing; pip install 'emu-jax[serve]'") from error
    limits = {name: getattr(options, name) for name in ("text_slots", "drawing_slots", "waiting", "seconds")}
    limits |= {name: getattr(options, name) for name in ("new_tokens", "steps")}
    limits["body_seconds"] = server.body_seconds(options.host) if options.body_seconds is None else options.body_seconds
    fields = ("checkpoint", "host", "port", "name", "tokenizer", "decoder", "safety_checker", "page", "weights")
    asked = server.Options(
        **{name: getattr(options, name) for name in fields},
        key=os.environ.get(server.KEY_VARIABLE) or None,
        mesh=_mesh(options.mesh),
        limits=Limits(**limits),
    )
    logging.getLogger("emu_jax").setLevel(logging.INFO)
    if options.compilation_cache is not None:
        use_compilation_cache(options.compilation_cache)
    print(f"serving {asked.folder} as {asked.model_name}; compiling takes a minute or more", flush=True)
    server.serve(asked, lambda address: print(f"{address} (API: {address}/v1); Ctrl-C stops", flush=True))
    return 0


def evaluate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.generate.model import TUNED

    if options.benchmark:
        return evaluate_benchmarks(options)
    from emu_jax.checkpoints.store import is_checkpoint, weights_of_parts
    from emu_jax.evaluate.quickstart import captions, chat, drawings
    from emu_jax.evaluate.quickstart.report import write_report
    from emu_jax.generate.model import Emu

    emu = Emu.load(options.model, weights=options.weights)
    scores = captions.score(emu, options.split.split(",") if options.split else captions.SPLITS)
    drawn = drawings.score(emu) if emu.decoder is not None else None
    out, tuned = options.out or options.model, options.model / TUNED
    chats = None
    if is_checkpoint(tuned):
        chats = chat.score(emu, Emu.load(tuned, weights=weights_of_parts(options.weights)), out / "benchmarks")
    report = write_report(out, options.model, scores, drawn, chats)
    print(_figures(scores.figures | (drawn.figures if drawn else {}) | (chats.figures if chats else {})))
    print(report)
    return 0


def evaluate_benchmarks(options: argparse.Namespace) -> int:
    from emu_jax.evaluate.benchmark_runs import EvaluationConfig
    from emu_jax.evaluate.benchmark_runs import evaluate as run
    from emu_jax.evaluate.benchmarks.benchmark import Weights
    from emu_jax.generate.model import Emu

    out = options.out or options.model / "benchmarks"
    if not options.out and not options.model.is_dir():
        raise UserError(f"--model {options.model}: a file; name the folder of the scores with --out")
    config = EvaluationConfig(
        benchmarks=options.benchmark.split(","),
        data=options.data,
        split=options.split,
        few_shot=[_whole(word, "--shots") for word in options.shots.split(",")],
        text_examples=options.text_examples,
        limit=options.limit,
        batch=options.batch,
        part=_part(options.part),
        rices=options.rices,
        weights=Weights(options.clip, options.inception, options.wordnet),
        drawing={name: getattr(options, name) for name in ("sampler", "steps", "guidance")},
    )
    emu = Emu.load(
        options.model,
        tokenizer=options.tokenizer,
        vision_head_dim=options.vision_head_dim,
        weights=options.weights,
        decoder=options.decoder,
        mesh=_mesh(options.mesh),
    )
    for result in run(emu, config, out):
        print(result.folder)
        if result.waits:
            print("  predicted its part; the process that finishes last scores")
        elif result.figures:
            print(_figures(result.figures))
        else:
            print("  predicted; only the benchmark's own server or scorer can score it")
    return 0


def _part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    part = _whole(number, "--part"), _whole(count, "--part")
    if not 0 <= part[0] < part[1]:
        raise UserError(f"--part {text}: expected I/N with I from 0 to N - 1, as in 0/4")
    return part


def _mesh(words: Sequence[str]) -> dict[str, int] | None:
    """["data=4", …] -> {"data": 4, …}; None without any."""
    sizes = {axis: _whole(size, f"--mesh {axis}") for axis, _, size in (word.partition("=") for word in words)}
    return sizes or None


def _whole(word: str, where: str) -> int:
    try:
        return int(word)
    except ValueError as error:
        raise UserError(f"{where}: {word!r} is no whole number") from error


def _figures(figures: Mapping[str, Any]) -> str:
    """A line a figure: value, interval, chance where it is known."""
    lines = []
    for name, figure in figures.items():
        low, high = figure.interval
        chance = "" if figure.chance is None else f"  chance {figure.chance:.4f}"
        lines.append(f"{name:88s} {figure.value:6.3f}  95% [{low:.3f}, {high:.3f}]{chance}")
    return "\n".join(lines)


def compare(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.evaluate.compare import compare as run
    from emu_jax.evaluate.compare import table, write

    comparison = run(options.runs, options.figures)
    files = write(comparison, options.out, markdown=options.markdown)
    print(table(comparison))
    print(*files, sep="\n")
    return 0


def inspect(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.config import load_config
    from emu_jax.inspect.model import describe

    print(describe(load_config(options.config, overrides)))
    return 0


def plan(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    import dataclasses
    import json

    from emu_jax.config import load_config
    from emu_jax.plan import report
    from emu_jax.plan.plan import Plan, compare, make_plan
    from emu_jax.plan.topology import describe as describe_topology

    for name in ("rows_per_device", "decode"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}; expected 1 or more")
    config = load_config(options.config, overrides)
    sweep = {}
    for text in options.compare or ():
        field, separator, values = text.partition("=")
        if not separator or not all(values.split(",")):
            raise UserError(f"--compare {text}: expected FIELD=A,B as in model.remat=full,dots or rows=1,2,4")
        sweep[field] = values.split(",")
    topology = describe_topology(options.topology)
    sizes = (options.rows_per_device, options.decode)
    if sweep:
        ranking = compare(config, topology, sweep, *sizes, timed=not options.untimed)
        print(report.describe_comparison(ranking))
        plans = [(" ".join(map("=".join, choice.items())), found) for choice, found in ranking]
        plans = [(name, found) for name, found in plans if isinstance(found, Plan)]
    else:
        plans = [(options.topology, make_plan(config, topology, *sizes, timed=not options.untimed))]
        print(report.describe(plans[0][1]))
    if options.json is not None:
        figures = {name: dataclasses.asdict(found) for name, found in plans}
        figures = json.loads(json.dumps(figures), parse_constant=lambda _: None)  # JSON knows no NaN
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if options.chart is not None and plans:
        report.chart(plans, options.chart)
    return 0 if any(found.fits for _, found in plans) else 1


def bench(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    import json

    import jax

    from emu_jax.bench import bench as run
    from emu_jax.bench import describe
    from emu_jax.config import load_config

    if options.json is not None and not options.json.parent.is_dir():
        raise UserError(f"--json {options.json}: no such folder {options.json.parent}; make it, or name another")
    timings = run(load_config(options.config, overrides), size=options.size, repetitions=options.repetitions)
    devices = {"devices": jax.device_count(), "kind": jax.devices()[0].device_kind, "jax": jax.__version__}
    print(f"{devices['devices']} x {devices['kind']}, jax {devices['jax']}, {options.repetitions} repetitions\n")
    print(describe(timings))
    if options.json is not None:
        figures = devices | {"timings": [timing.to_json() for timing in timings]}
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def convert(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    import dataclasses

    from emu_jax.checkpoints.convert.formats import Settings
    from emu_jax.checkpoints.convert.formats import convert as run

    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(options, name) for name in names})
    for part, summary in run(options.source, options.folder, settings).items():
        print(f"{part}: {summary}")
    print(options.folder)
    return 0


def export(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.checkpoints.convert.export import export as run

    settings = {"dtype": options.dtype, "merge_lora": options.merge_lora, "weights": options.weights}
    for file in run(options.source, options.folder, options.format, **settings):
        print(file)
    return 0


COMMANDS = {
    "prepare": prepare,
    "inspect-data": inspect_data,
    "train": train,
    "precompute": precompute,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "evaluate": evaluate,
    "compare": compare,
    "inspect": inspect,
    "plan": plan,
    "bench": bench,
    "convert": convert,
    "export": export,
}
