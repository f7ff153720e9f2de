"""The console script `emu-jax`: prepare, inspect-data, train, precompute, generate, evaluate, inspect, plan, …

Parses arguments and calls one function; every error a user can cause is one line and exit code 2. `train` has two exit
codes more: 75 when SIGTERM stopped it and it saved, 69 when another process of its job was lost.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from emu_jax.data.raw.readers import READERS
from emu_jax.errors import UserError

EXAMPLES = {
    "prepare": "emu-jax prepare pairs --in laion-coco --out data/laion_coco --workers 8",
    "inspect-data": "emu-jax inspect-data --config configs/mixture.py --out rows.html",
    "train": "emu-jax train --config configs/quickstart.py --workdir runs/quickstart --config.train.minutes=60",
    "precompute": "emu-jax precompute --model runs/quickstart --vae runs/quickstart/vae --out runs/quickstart/latents",
    "generate": "emu-jax generate --model runs/quickstart --prompt cat.png tiger.png --out blend.png --seeds 0 1 2",
    "evaluate": "emu-jax evaluate --model runs/quickstart",
    "compare": "emu-jax compare runs/base-0 runs/base-1 runs/other-0 runs/other-1 --out runs/comparison",
    "inspect": "emu-jax inspect --config configs/models.py:14b",
    "plan": "emu-jax plan --config configs/pretrain.py:14b --topology v5p:4x4x4",
    "bench": "emu-jax bench --config configs/quickstart.py --size quickstart --json speed.json",
    "convert": "emu-jax convert --from Emu/pretrain --to weights/emu --tokenizer llama_tokenizer.model",
    "export": "emu-jax export --from runs/quickstart --to exported --format diffusers",
}
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (0, or 2 with one line on standard error)."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = [word for word in rest if word.startswith("--config.")]
    unknown = [word for word in rest if not word.startswith("--config.")]
    if unknown or (overrides and "config" not in options):
        parser.error(
            f"{options.command}: unknown argument {(unknown or overrides)[0]}; see emu-jax {options.command} --help"
        )
    try:
        return COMMANDS[options.command](options, overrides)
    except UserError as error:
        print(f"emu-jax {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"emu-jax {options.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="emu-jax", description="Emu in JAX: train it, ask it, score it, look inside.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(EXAMPLES) + "}")

    def add(name: str, about: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=about, description=about, epilog=f"example: {EXAMPLES[name]}", allow_abbrev=False
        )

    prepare = add("prepare", "Make records of raw data, once; training streams them.")
    prepare.add_argument("source", metavar="SOURCE", help=f"what it is: {', '.join(READERS)} (data/raw/readers.py)")
    prepare.add_argument("--in", dest="path", required=True, help="file, folder or glob of raw data")
    prepare.add_argument("--out", type=Path, required=True, help="a new folder that every worker sees")
    prepare.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="settings of the reader")
    prepare.add_argument("--name", help="of the data set (default: the folder's)")
    prepare.add_argument("--split", default="train")
    prepare.add_argument("--shards", type=int, default=0, help="files (default: about 256 MB each)")
    prepare.add_argument("--image-size", type=int, default=224, help="pixels of a side that models will read")
    prepare.add_argument("--quality", type=int, default=90, help="of the stored JPEG files")
    prepare.add_argument("--min-side", type=int, default=32, help="pixels; smaller pictures are left out")
    prepare.add_argument("--max-aspect", type=float, default=4.0, help="longer over shorter side; more is left out")
    prepare.add_argument("--max-faults", type=float, default=0.02, help="share of faulty documents that stops it")
    prepare.add_argument("--workers", type=int, default=1, help="processes of the local runner")
    prepare.add_argument(
        "--runner", default="DirectRunner", help="of Beam: DirectRunner, DataflowRunner, FlinkRunner, …"
    )
    prepare.add_argument("--beam", default="", metavar="ARGUMENTS", help="more arguments of Beam, in one string")

    inspect_data = add("inspect-data", "Count what a run would read, and show packed rows as a person reads them.")
    inspect_data.add_argument("--config", required=True, help="config file[:variant]; override with --config.a.b=value")
    inspect_data.add_argument(
        "--out", type=Path, metavar="PAGE.html", help="write a page of histograms and packed rows"
    )
    inspect_data.add_argument("--rows", type=int, default=12, help="packed rows on the page")
    inspect_data.add_argument("--batches", type=int, default=64, help="batches to count")
    inspect_data.add_argument("--verify", action="store_true", help="read every file whole and compare its digest")

    train = add("train", "Train a config in a work directory; run again, it resumes from the last checkpoint.")
    train.add_argument("--config", required=True, help="config file[:variant]; override fields with --config.a.b=value")
    train.add_argument("--workdir", required=True, type=Path, help="checkpoints, metrics and plots go here")

    train.add_argument("--compile-only", action="store_true", help="compile the step, print its memory, write nothing")
    train.add_argument(
        "--compilation-cache", type=Path, metavar="DIR", help="keep compiled programs for the next start"
    )
    train.add_argument(
        "--reshard-data", action="store_true", help="go on though data.shards or data.workers were others"
    )
    train.add_argument("--profile-steps", metavar="FIRST:LAST", help="trace these steps for xprof, in workdir/profile")

    precompute = add("precompute", "Compute once what the decoder trains on: embeddings of texts, latents of pictures.")
    _add_model(precompute)
    precompute.add_argument(
        "--vae", type=Path, required=True, help="work directory of configs/vae.py, or diffusers folder"
    )
    precompute.add_argument("--out", type=Path, required=True, help="a new folder")
    precompute.add_argument("--source", default="fluent_emoji", help="as config.data.source")
    precompute.add_argument("--split", default="train", help="as config.data.split")
    precompute.add_argument("--image-size", type=int, help="pixels of a side (default: what the VAE was trained on)")

    generate = add(
        "generate", "Continue prompts that mix text and pictures: write on, embed, or draw the next picture."
    )
    _add_model(generate)
    asked = generate.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", nargs="+", help="texts and picture files, in order")
    asked.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help="many pictures to draw (generate/files.py)")
    generate.add_argument("--out", type=Path, metavar="OUT.png", help="draw the next picture into this file")
    generate.add_argument("--decoder", type=Path, help="folder with unet and vae (default: the model's own)")
    generate.add_argument("--no-safety-checker", action="store_true", help="do not use the decoder's safety checker")
    generate.add_argument("--sampler", default="pndm", help="pndm, ddim, euler or dpmpp")
    generate.add_argument("--steps", type=int, default=50)
    generate.add_argument("--guidance", type=float, default=7.5)
    generate.add_argument("--seeds", type=int, nargs="+", default=[0], help="one picture each")
    generate.add_argument("--height", type=int)
    generate.add_argument("--width", type=int)
    generate.add_argument("--batch", type=int, default=8, help="pictures drawn at a time")
    generate.add_argument(
        "--embeddings", type=Path, metavar="OUT.npy", help="write the next picture's embeddings [Q, D]"
    )
    generate.add_argument("--num-beams", type=int, default=1)
    generate.add_argument("--max-new-tokens", type=int, default=20)
    generate.add_argument("--min-length", type=int, default=1)
    generate.add_argument("--length-penalty", type=float, default=1.0, help="score = log p / length ** penalty (beams)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token; above: sample")
    generate.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest tokens (0: all)")
    generate.add_argument(
        "--top-p", type=float, default=1.0, help="sample among the likeliest tokens of total probability p"
    )

    evaluate = add("evaluate", "Score a model on the embedded held-out pictures; write report.html and scores.json.")
    evaluate.add_argument("--model", required=True, type=Path, help="training work directory")
    evaluate.add_argument("--out", type=Path, help="folder of the report (default: the work directory)")

    evaluate.add_argument("--splits", nargs="+", metavar="SPLIT", help="of the embedded pictures (default: all three)")

    compare = add(
        "compare", "One table and one plot of several runs; those that differ in their seed alone are a group."
    )
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="training work directory; the first counts")
    compare.add_argument("--out", type=Path, default=Path("comparison"), help="folder of compare.json and compare.png")
    compare.add_argument("--figures", nargs="+", default=[], metavar="NAME", help="of scores.json, or 'last text_loss'")
    compare.add_argument("--markdown", action="store_true", help="write compare.md too")

    inspect = add("inspect", "Print a model's parts, parameter counts and shapes without allocating it.")
    inspect.add_argument("--config", required=True, help="config file[:variant]")

    plan = add("plan", "Compile a step for TPUs that are not at hand: whether it fits, how fast it should be.")
    plan.add_argument("--config", required=True, help="config file[:variant]; override fields with --config.a.b=value")
    plan.add_argument("--topology", required=True, help="v5p:4x4x4, v5e:16x16, 2*v5p:4x4x4 (two slices), … or here")
    plan.add_argument("--rows-per-device", type=int, default=0, help="instead of the config's batch")
    plan.add_argument(
        "--decode", type=int, default=0, metavar="ROWS", help="plan decoding of so many sequences instead"
    )
    plan.add_argument("--untimed", action="store_true", help="memory and collectives alone: one compilation, not six")
    plan.add_argument(
        "--compare", nargs="+", metavar="FIELD=A,B", help="rank all combinations, e.g. model.remat=full,dots rows=1,2,4"
    )
    plan.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    plan.add_argument("--chart", type=Path, metavar="FILE.png", help="draw memory and time there")

    bench = add("bench", "Time input, decoding, drawing and training steps on the devices at hand, random weights.")
    bench.add_argument(
        "--config",
        default="configs/quickstart.py",
        help="config file[:variant]; override fields with --config.a.b=value",
    )
    bench.add_argument("--size", default="quickstart", help="of the U-Net that draws: quickstart or sd15")
    bench.add_argument("--repetitions", type=int, default=5)
    bench.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")

    convert = add("convert", "Published weights in: Emu, Emu-I, LLaMA, EVA-CLIP or Stable Diffusion to a checkpoint.")
    convert.add_argument("--from", dest="source", required=True, type=Path, help="file or folder (convert/formats.py)")
    convert.add_argument("--to", dest="folder", required=True, type=Path, help="a new folder; a killed run goes on")
    convert.add_argument("--dtype", default="float32", help="of the parameters: float32 or bfloat16")
    convert.add_argument("--int8", action="store_true", help="the LLM's kernels as int8 with scales, for inference")
    convert.add_argument("--merge-lora", action="store_true", help="add Emu-I's LoRA to its weights")
    convert.add_argument("--lora-alpha", type=float, default=16.0, help="files do not tell it (default 16)")
    convert.add_argument("--vision-head-dim", type=int, default=88, help="shapes do not tell it (default 88)")
    convert.add_argument("--llama-head-dim", type=int, default=128, help="where no file tells it (default 128)")
    convert.add_argument("--tokenizer", type=Path, help="SentencePiece .model, kept with the weights")

    export = add("export", "Weights out: a checkpoint in the formats that other programs read.")
    export.add_argument("--from", dest="source", required=True, type=Path, help="work directory or checkpoint")
    export.add_argument("--to", dest="folder", required=True, type=Path, help="a new folder")
    export.add_argument("--format", required=True, help="emu, llama, diffusers or peft (convert/export.py)")
    export.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as it came, or as it is)")
    export.add_argument("--merge-lora", action="store_true", help="add LoRA to its weights")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, type=Path, help="work directory, checkpoint, or published files")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece .model (published files need one)")
    parser.add_argument("--vision-head-dim", type=int, help="of published files of another size (default 88)")


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
    from emu_jax.data.inspect import inspect as run

    config = load_config(options.config, overrides)
    print(run(config, options.out, rows=options.rows, batches=options.batches, verify=options.verify))
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
    from emu_jax.train.precompute import precompute as run

    count = run(
        options.model,
        options.vae,
        options.out,
        source=options.source,
        split=options.split,
        image_size=options.image_size,
        tokenizer=options.tokenizer,
        vision_head_dim=options.vision_head_dim,
    )
    print(f"{options.out}: {count} examples")
    return 0


def generate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    import numpy as np

    from emu_jax.api import Emu
    from emu_jax.generate.files import draw_files, read_requests, with_seeds

    out = options.embeddings
    if out is not None and out.exists():
        raise UserError(f"--embeddings {out}: the file exists; name a new one")
    # A word that ends like a picture file is one: a typing error must not be captioned as text.
    prompt = [Path(word) if Path(word).suffix.lower() in PICTURE_SUFFIXES else word for word in options.prompt or ()]
    if options.batch < 1:
        raise UserError(f"--batch {options.batch}; expected at least 1")
    requests = read_requests(options.prompts) if options.prompts else []
    if options.out is not None:
        requests = with_seeds(prompt, options.seeds, options.out)
    emu = Emu.load(
        options.model,
        tokenizer=options.tokenizer,
        vision_head_dim=options.vision_head_dim,
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


def evaluate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.api import Emu
    from emu_jax.evaluate import drawings, pairs
    from emu_jax.evaluate.report import write_report

    emu = Emu.load(options.model)
    scores = pairs.score(emu, options.splits or pairs.SPLITS)
    drawn = drawings.score(emu) if emu.decoder is not None else None
    report = write_report(options.out or options.model, options.model, scores, drawn)
    for name, figure in (scores.figures | (drawn.figures if drawn else {})).items():
        low, high = figure.interval
        print(f"{name:88s} {figure.value:6.3f}  95% [{low:.3f}, {high:.3f}]  chance {figure.chance:.4f}")
    print(report)
    return 0


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
    from emu_jax.models.inspect import describe

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

    from emu_jax.convert.formats import Settings
    from emu_jax.convert.formats import convert as run

    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(options, name) for name in names})
    for part, summary in run(options.source, options.folder, settings).items():
        print(f"{part}: {summary}")
    print(options.folder)
    return 0


def export(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.convert.export import export as run

    settings = {"dtype": options.dtype, "merge_lora": options.merge_lora}
    for file in run(options.source, options.folder, options.format, **settings):
        print(file)
    return 0


COMMANDS = {
    "prepare": prepare,
    "inspect-data": inspect_data,
    "train": train,
    "precompute": precompute,
    "generate": generate,
    "evaluate": evaluate,
    "compare": compare,
    "inspect": inspect,
    "plan": plan,
    "bench": bench,
    "convert": convert,
    "export": export,
}

if __name__ == "__main__":
    sys.exit(main())
