"""The console script `emu-jax`: train | generate | evaluate | inspect.

Parses arguments and calls one function; every error a user can cause is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from emu_jax.errors import UserError

EXAMPLES = {
    "train": "emu-jax train --config configs/quickstart.py --workdir runs/quickstart --config.train.minutes=60",
    "generate": "emu-jax generate --model runs/quickstart --prompt dog.png",
    "evaluate": "emu-jax evaluate --model runs/quickstart",
    "inspect": "emu-jax inspect --config configs/models.py:14b",
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
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,generate,evaluate,inspect}")

    def add(name: str, about: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=about, description=about, epilog=f"example: {EXAMPLES[name]}", allow_abbrev=False
        )

    train = add("train", "Train a config in a work directory; run again, it resumes from the last checkpoint.")
    train.add_argument("--config", required=True, help="config file[:variant]; override fields with --config.a.b=value")
    train.add_argument("--workdir", required=True, type=Path, help="checkpoints, metrics and plots go here")

    generate = add("generate", "Continue prompts that mix text and pictures, or embed them as the next picture.")
    _add_model(generate)
    generate.add_argument("--prompt", nargs="+", required=True, help="texts and picture files, in order")
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
    generate.add_argument("--seed", type=int, default=0)

    evaluate = add("evaluate", "Score a model on the embedded held-out pictures; write report.html and scores.json.")
    evaluate.add_argument("--model", required=True, type=Path, help="training work directory")
    evaluate.add_argument("--out", type=Path, help="folder of the report (default: the work directory)")

    inspect = add("inspect", "Print a model's parts, parameter counts and shapes without allocating it.")
    inspect.add_argument("--config", required=True, help="config file[:variant]")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, type=Path, help="work directory, checkpoint, or published files")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece .model (published files need one)")
    parser.add_argument("--vision-head-dim", type=int, help="of published files of another size (default 88)")


def train(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.config import load_config
    from emu_jax.train.loop import train as run

    run(load_config(options.config, overrides), options.workdir)
    return 0


def generate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    import numpy as np

    from emu_jax.api import Emu

    out = options.embeddings
    if out is not None and out.exists():
        raise UserError(f"--embeddings {out}: the file exists; name a new one")
    # A word that ends like a picture file is one: a typing error must not be captioned as text.
    prompt = [Path(word) if Path(word).suffix.lower() in PICTURE_SUFFIXES else word for word in options.prompt]
    model = {"vision_head_dim": options.vision_head_dim} if options.vision_head_dim else {}
    emu = Emu.load(options.model, tokenizer=options.tokenizer, **model)
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
        seed=options.seed,
    )
    print(results[0].text)
    return 0


def evaluate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.evaluate.pairs import evaluate as score
    from emu_jax.evaluate.report import write_report

    out = options.out or options.model
    scores = score(options.model)
    report = write_report(out, options.model, scores)
    for name, figure in scores.figures.items():
        low, high = figure.interval
        print(f"{name:70s} {figure.value:6.3f}  95% [{low:.3f}, {high:.3f}]  chance {figure.chance:.4f}")
    print(report)
    return 0


def inspect(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.config import load_config
    from emu_jax.models.inspect import describe

    print(describe(load_config(options.config, overrides)))
    return 0


COMMANDS = {"train": train, "generate": generate, "evaluate": evaluate, "inspect": inspect}

if __name__ == "__main__":
    sys.exit(main())
