"""The console script `emu-jax`: prepare, inspect-data, train, precompute, generate, evaluate, inspect, plan, …

Parses arguments and calls one function; every error a user can cause is one line and exit code 2. `train` has two exit
codes more: 75 when SIGTERM stopped it and it saved, 69 when another process of its job was lost.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from emu_jax import commands
from emu_jax.data.raw.readers import READERS
from emu_jax.errors import UserError
from emu_jax.evaluate.benchmarks.registry import benchmark_names

EXAMPLES = {
    "prepare": "emu-jax prepare pairs --in laion-coco --out data/laion_coco --workers 8",
    "inspect-data": "emu-jax inspect-data --config configs/mixture.py --out rows.html",
    "train": "emu-jax train --config configs/quickstart.py --workdir runs/quickstart --config.train.minutes=60",
    "precompute": "emu-jax precompute --model runs/quickstart --vae runs/quickstart/vae --out runs/quickstart/latents",
    "generate": "emu-jax generate --model runs/quickstart --prompt cat.png tiger.png --out blend.png --seeds 0 1 2",
    "chat": "emu-jax chat --model weights/emu-instruct --image cat.png",
    "serve": "emu-jax serve --checkpoint runs/quickstart --port 7860",
    "evaluate": "emu-jax evaluate --model weights/emu --benchmark coco,vqav2 --data benchmarks --shots 0,4",
    "compare": "emu-jax compare runs/base-0 runs/base-1 runs/other-0 runs/other-1 --out runs/comparison",
    "inspect": "emu-jax inspect --config configs/models.py:14b",
    "plan": "emu-jax plan --config configs/pretrain.py:14b --topology v5p:4x4x4",
    "bench": "emu-jax bench --config configs/quickstart.py --size quickstart --json speed.json",
    "convert": "emu-jax convert --from Emu/pretrain --to weights/emu --tokenizer llama_tokenizer.model",
    "export": "emu-jax export --from runs/quickstart --to exported --format diffusers",
}


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
        return commands.COMMANDS[options.command](options, overrides)
    except UserError as error:
        print(f"emu-jax {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"emu-jax {options.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="emu-jax", description="Emu in JAX: train it, ask it, score it, look inside.")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(EXAMPLES) + "}")

    def add(name: str, about: str) -> argparse.ArgumentParser:
        return parsers.add_parser(
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
    prepare.add_argument("--min-side", type=int, default=32, help="pixels; smaller images are left out")
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
    inspect_data.add_argument("--json", type=Path, metavar="FILE.json", help="write what was counted")
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

    precompute = add("precompute", "Compute once what the decoder trains on: embeddings of texts, latents of images.")
    _add_model(precompute)
    precompute.add_argument(
        "--vae", type=Path, required=True, help="work directory of configs/vae.py, or diffusers folder"
    )
    precompute.add_argument("--out", type=Path, required=True, help="a new folder")
    precompute.add_argument("--source", default="fluent_emoji", help="as config.data.source")
    precompute.add_argument("--split", default="train", help="as config.data.split")
    precompute.add_argument("--image-size", type=int, help="pixels of a side (default: what the VAE was trained on)")

    generate = add("generate", "Continue prompts that mix text and images: write on, embed, or draw the next image.")
    _add_model(generate)
    asked = generate.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", nargs="+", help="texts and image files, in order")
    asked.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help="many images to draw (generate/files.py)")
    generate.add_argument("--out", type=Path, metavar="OUT.png", help="draw the next image into this file")
    generate.add_argument("--decoder", type=Path, help="folder with unet and vae (default: the model's own)")
    generate.add_argument("--no-safety-checker", action="store_true", help="do not use the decoder's safety checker")
    generate.add_argument("--sampler", default="pndm", help="pndm, ddim, euler or dpmpp")
    generate.add_argument("--steps", type=int, default=50)
    generate.add_argument("--guidance", type=float, default=7.5)
    generate.add_argument("--seeds", type=int, nargs="+", default=[0], help="one image each")
    generate.add_argument("--height", type=int)
    generate.add_argument("--width", type=int)
    generate.add_argument("--batch", type=int, default=8, help="images drawn at a time")
    generate.add_argument("--embeddings", type=Path, metavar="OUT.npy", help="write the next image's embeddings [Q, D]")
    generate.add_argument("--num-beams", type=int, default=1)
    generate.add_argument("--max-new-tokens", type=int, default=20)
    generate.add_argument("--min-length", type=int, default=1)
    generate.add_argument("--length-penalty", type=float, default=1.0, help="score = log p / length ** penalty (beams)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token; above: sample")
    generate.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest tokens (0: all)")
    generate.add_argument(
        "--top-p", type=float, default=1.0, help="sample among the likeliest tokens of total probability p"
    )

    chat = add("chat", "Talk with an instruction-tuned model about images and videos; answers are streamed.")
    _add_model(chat, "--checkpoint")
    chat.add_argument("--image", nargs="+", type=Path, default=[], help="images to show with the first message")
    chat.add_argument("--video", nargs="+", type=Path, default=[], help="videos to show with it")
    chat.add_argument("--system", help="system message, '' for none (default: the paper's, where something is shown)")
    chat.add_argument(
        "--message",
        nargs="+",
        action="extend",
        help="messages, one a turn, or commands such as '/image b.png'; without, lines are read from standard input",
    )
    chat.add_argument("--max-new-tokens", type=int, help="of an answer (default: what the context leaves, at most 256)")
    chat.add_argument("--num-beams", type=int, default=1, help="beams do not stream")
    chat.add_argument("--min-length", type=int, default=1)
    chat.add_argument("--length-penalty", type=float, default=1.0, help="score = log p / length ** penalty (beams)")
    chat.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token; above: sample")
    chat.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest tokens (0: all)")
    chat.add_argument(
        "--top-p", type=float, default=1.0, help="sample among the likeliest tokens of total probability p"
    )
    chat.add_argument("--seed", type=int, default=0)

    serve = add("serve", "Serve a model to browsers (a page) and programs (an HTTP API that OpenAI's clients talk to).")
    serve.add_argument(
        "--checkpoint",
        "--model",
        type=Path,
        help="work directory, checkpoint or published files (default: quick start's)",
    )
    serve.add_argument("--host", default="127.0.0.1", help="address; others than this machine's need EMU_JAX_API_KEY")
    serve.add_argument("--port", type=int, default=7860, help="0: any that is free")
    serve.add_argument("--name", help="of the model in the API (default: the folder's)")
    serve.add_argument("--tokenizer", type=Path, help="SentencePiece .model (published files need one)")
    _add_weights(serve)
    serve.add_argument("--decoder", type=Path, help="folder with unet and vae (default: the model's own)")
    serve.add_argument("--no-safety-checker", dest="safety_checker", action="store_false", help="do not use it")
    serve.add_argument("--no-page", dest="page", action="store_false", help="the API alone")
    serve.add_argument("--mesh", nargs="+", default=[], metavar="AXIS=N", help="over devices: data=1 tensor=8")
    serve.add_argument("--text-slots", type=int, default=16, help="texts written at the same time")
    serve.add_argument("--drawing-slots", type=int, default=4, help="images drawn at the same time")
    serve.add_argument("--waiting", type=int, default=128, help="requests that may wait; the next is answered 429")
    serve.add_argument("--seconds", type=float, default=120.0, help="that a request may take, its waiting included")
    serve.add_argument("--new-tokens", type=int, default=1024, help="of a text, at most")
    serve.add_argument("--steps", type=int, default=200, help="of a sampler, at most")
    serve.add_argument(
        "--body-seconds",
        type=float,
        help="between two pieces of what is being sent, at most (default: 0.9 from this machine alone, else 10)",
    )
    serve.add_argument(
        "--compilation-cache", type=Path, metavar="DIR", help="keep compiled programs for the next start"
    )

    evaluate = add("evaluate", "Score a model: on benchmarks, or without --benchmark write the report of a run.")
    _add_model(evaluate)
    evaluate.add_argument("--out", type=Path, help="folder of report or scores (default: the work directory)")
    evaluate.add_argument("--benchmark", metavar="NAME,…", help=f"some of {', '.join(benchmark_names())}")
    evaluate.add_argument("--data", type=Path, help="folder of the benchmarks' files, each in one of its name")
    evaluate.add_argument("--split", default="", help="(default: the latest with published answers; of a report all)")
    evaluate.add_argument("--shots", default="0", metavar="N,…", help="examples in front, e.g. 0,2,4,8 (RICES)")
    evaluate.add_argument("--text-examples", action="store_true", help="two text-only ones in front (the paper's *)")
    evaluate.add_argument("--rices", type=Path, metavar="CLIP", help="choose examples by a CLIP, not our encoder")
    evaluate.add_argument("--limit", type=int, default=0, help="questions, the first ones (default: all)")
    evaluate.add_argument("--batch", type=int, default=16, help="prompts at a time")
    evaluate.add_argument("--mesh", nargs="+", default=[], metavar="AXIS=N", help="over devices: data=-1, tensor=4")
    evaluate.add_argument(
        "--part", default="0/1", metavar="I/N", help="this process's of N, each on every N-th question, into one --out"
    )
    evaluate.add_argument("--clip", type=Path, help="folder of a CLIP, for CLIP scores of drawings")
    evaluate.add_argument("--inception", type=Path, metavar="FILE.pth", help="FID's Inception weights, of pytorch-fid")
    evaluate.add_argument("--wordnet", type=Path, help="folder of WordNet, for WUPS")
    evaluate.add_argument("--decoder", type=Path, help="folder with unet and vae (default: the model's own)")
    evaluate.add_argument("--sampler", default="pndm", help="pndm, ddim, euler or dpmpp")
    evaluate.add_argument("--steps", type=int, default=50)
    evaluate.add_argument("--guidance", type=float, default=5.0, help="of drawings (the paper's for FID)")

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
    convert.add_argument("--int8", action="store_true", help="the LLM's kernels as int8 with scales")
    convert.add_argument("--merge-lora", action="store_true", help="add Emu-I's LoRA to its weights")
    convert.add_argument("--lora-alpha", type=float, default=16.0, help="files do not tell it (default 16)")
    convert.add_argument("--vision-head-dim", type=int, default=88, help="shapes do not tell it (default 88)")
    convert.add_argument("--llama-head-dim", type=int, default=128, help="where no file tells it (default 128)")
    convert.add_argument("--tokenizer", type=Path, help="SentencePiece .model, kept with the weights")

    export = add("export", "Weights out: a checkpoint in the formats that other programs read.")
    export.add_argument("--from", dest="source", required=True, type=Path, help="work directory or checkpoint")
    export.add_argument("--to", dest="folder", required=True, type=Path, help="a new folder")
    export.add_argument("--format", required=True, help="emu, llama, llama-base, diffusers or peft (convert/export.py)")
    export.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as it came, or as it is)")
    export.add_argument("--merge-lora", action="store_true", help="add LoRA to its weights")
    _add_weights(export)
    return parser


def _add_model(parser: argparse.ArgumentParser, *aliases: str) -> None:
    parser.add_argument(
        "--model", *aliases, required=True, type=Path, help="work directory, checkpoint, or published files"
    )
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece .model (published files need one)")
    parser.add_argument("--vision-head-dim", type=int, help="of published files of another size (default 88)")
    _add_weights(parser)


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        choices=("raw", "ema"),
        default="auto",
        help="the last step's parameters, or their EMA (default: the EMA, where the run keeps one)",
    )


if __name__ == "__main__":
    sys.exit(main())
