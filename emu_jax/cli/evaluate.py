"""`emu-jax evaluate`."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from emu_jax.cli.options import (
    LocalPath,
    add_mesh,
    add_model,
    add_sampling,
    check_parent,
    figures_table,
    mesh,
    model,
    part,
    path,
    use_users_cache,
    whole,
)
from emu_jax.errors import UserError
from emu_jax.evaluate.benchmarks.registry import benchmark_names
from emu_jax.storage import Path

if TYPE_CHECKING:
    from emu_jax.evaluate.benchmark_runs import EvaluationConfig
    from emu_jax.evaluate.intervals import Figure
    from emu_jax.evaluate.quickstart.fixed_space import FixedSpace
    from emu_jax.evaluate.watch import Score
    from emu_jax.generate.model import Emu

ABOUT = "Evaluate a model: on benchmarks, or without --benchmark write the report of a run."
EXAMPLE = "emu-jax evaluate --model weights/emu --benchmark coco,vqav2 --data benchmarks --shots 0,4"

# Other libraries open these files.
CLIP = LocalPath("a CLIP, which transformers opens,")
INCEPTION = LocalPath("a file of PyTorch, which is memory-mapped,")
WORDNET = LocalPath("WordNet, which NLTK opens,")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--out", type=path, help="folder for the report or the scores (default: the work directory)")
    parser.add_argument(
        "--watch", action="store_true", help="score each checkpoint of a run once, while it trains: evaluations*.jsonl"
    )
    parser.add_argument(
        "--keep-best", default="", metavar="FIGURE", help="with --watch: copy the best checkpoint by it into best/"
    )
    parser.add_argument(
        "--fixed-space",
        type=model,
        metavar="MODEL",
        help="without --benchmark: also score generated embeddings in this model's space, e.g. emu-mini's",
    )
    parser.add_argument("--benchmark", metavar="NAME,…", help=f"some of {', '.join(benchmark_names())}")
    parser.add_argument("--data", type=path, help="folder with one folder of files for each benchmark")
    parser.add_argument(
        "--split", default="", help="(default: the latest with published answers; for a report, all splits)"
    )
    parser.add_argument(
        "--shots", default="0", metavar="N,…", help="numbers of few-shot examples, e.g. 0,2,4,8, chosen by RICES"
    )
    parser.add_argument(
        "--text-examples", action="store_true", help="add two text-only examples (the paper's zero-shot prompts, *)"
    )
    parser.add_argument(
        "--rices", type=CLIP, metavar="CLIP", help="choose examples by this CLIP instead of the model's encoder"
    )
    parser.add_argument(
        "--frames", type=int, default=8, metavar="N", help="images that are shown of a video (default: 8)"
    )
    parser.add_argument(
        "--image-reading",
        default="upright",
        metavar="RULE",
        help="upright (turned by EXIF, transparency on white) or reference (as Pillow converts to RGB)",
    )
    parser.add_argument(
        "--rope-dtype",
        metavar="DTYPE",
        help="round RoPE's tables to it: bfloat16, as when the published weights were trained (default: the model's)",
    )
    parser.add_argument("--limit", type=int, default=0, help="use the first questions only (default: all)")
    parser.add_argument("--batch", type=int, default=16, help="prompts at a time")
    add_mesh(parser, "data=-1 tensor=4")
    parser.add_argument(
        "--part", default="0/1", metavar="I/N", help="process I of N, which answers every N-th question into one --out"
    )
    parser.add_argument("--clip", type=CLIP, help="folder of a CLIP, for CLIP scores of drawings")
    parser.add_argument(
        "--inception", type=INCEPTION, metavar="FILE.pth", help="Inception weights of pytorch-fid, for FID"
    )
    parser.add_argument(
        "--fid",
        default="crop256",
        metavar="RULE",
        help="what Inception sees: crop256 (centre crop, 256 x 256), clean (clean-fid) or native (pytorch-fid)",
    )
    parser.add_argument(
        "--fid-statistics",
        type=path,
        metavar="FILE.npz",
        help="the real images' statistics, for FID: used in their place if the file exists, otherwise written",
    )
    parser.add_argument("--wordnet", type=WORDNET, help="folder of WordNet, for WUPS")
    parser.add_argument("--decoder", type=model, help="folder with unet and vae (default: the model's own)")
    add_sampling(parser, guidance=5.0, guidance_help="guidance scale of drawings (default: the paper's for FID)")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    use_users_cache()
    if options.watch:
        return watch_run(options)
    if options.benchmark and options.fixed_space:
        raise UserError(f"--fixed-space {options.fixed_space}: only the embedded images are scored in another space")
    if options.keep_best:
        raise UserError(f"--keep-best {options.keep_best!r}: only --watch keeps the best checkpoint")
    return run_benchmarks(options) if options.benchmark else report(options)


def report(options: argparse.Namespace) -> int:
    from emu_jax.checkpoints.layout import TUNED
    from emu_jax.checkpoints.store import is_checkpoint, weights_of_parts
    from emu_jax.evaluate.quickstart import captions, chat, drawings
    from emu_jax.evaluate.quickstart.report import write_report
    from emu_jax.generate.model import Emu

    emu = Emu.load(options.model, safety_checker=False, weights=options.weights)
    splits = options.split.split(",") if options.split else captions.SPLITS
    scores = captions.score(emu, splits, _fixed_space(options))
    drawn = drawings.score(emu) if emu.decoder is not None else None
    out, tuned = options.out or _own_folder(options.model), options.model / TUNED
    chats = None
    if is_checkpoint(tuned):
        chats = chat.score(emu, Emu.load(tuned, weights=weights_of_parts(options.weights)), out / "benchmarks")
    page = write_report(out, options.model, scores, drawn, chats)
    print(figures_table(scores.figures | (drawn.figures if drawn else {}) | (chats.figures if chats else {})))
    print(page)
    return 0


def watch_run(options: argparse.Namespace) -> int:
    from emu_jax.evaluate.watch import watch

    if options.out or options.part != "0/1":
        raise UserError("--watch writes into the work directory, in one process; leave out --out and --part")
    name = options.benchmark.replace(",", "+") if options.benchmark else ""
    score, of = _benchmarks(options, name) if name else _embedded_images(options)
    for row in watch(options.model, score, of, name=name, keep_best=options.keep_best):
        shown = ", ".join(f"{figure.partition(': ')[2]} {value:.3f}" for figure, value in row["figures"].items())
        print(f"step {row['step']}{' (best so far)' if 'best' in row else ''}: {shown}", flush=True)
    return 0


def _embedded_images(options: argparse.Namespace) -> tuple[Score, dict[str, Any]]:
    from emu_jax.evaluate.quickstart import captions
    from emu_jax.generate.model import Emu

    splits = options.split.split(",") if options.split else ["heldout_combinations"]
    space = _fixed_space(options)
    of = {"splits": splits, "weights": options.weights} | ({"fixed_space": space.name} if space else {})
    return lambda folder: captions.score(Emu.load(folder, weights=options.weights), splits, space).figures, of


def _fixed_space(options: argparse.Namespace) -> FixedSpace | None:
    from emu_jax.evaluate.quickstart.fixed_space import FixedSpace
    from emu_jax.generate.model import Emu

    if options.fixed_space is None:
        return None
    return FixedSpace(options.fixed_space.name, Emu.load(options.fixed_space, safety_checker=False))


def _benchmarks(options: argparse.Namespace, name: str) -> tuple[Score, dict[str, Any]]:
    """Each checkpoint's predictions stay in WORKDIR/benchmarks/<names>/step-N."""
    from emu_jax.evaluate.benchmark_runs import evaluate

    config = _benchmark_config(options)

    def score(folder: Path) -> dict[str, Figure]:
        runs = evaluate(_model(options, folder), config, options.model / "benchmarks" / name / f"step-{folder.name}")
        return {f"{run.run.name}: {figure}": value for run in runs for figure, value in run.figures.items()}

    asked = ("benchmark", "split", "shots", "text_examples", "limit", "weights")
    return score, {option: getattr(options, option) for option in asked}


def _own_folder(model: Path) -> Path:
    """Where a model's scores go by default: into its own folder, or for a shipped one into runs/<name>."""
    from emu_jax.checkpoints.shipped import is_shipped

    return pathlib.Path("runs", model.name) if is_shipped(model) else model


def _benchmark_config(options: argparse.Namespace) -> EvaluationConfig:
    from emu_jax.evaluate.benchmark_runs import EvaluationConfig
    from emu_jax.evaluate.benchmarks.benchmark import Weights

    check_parent("--fid-statistics", options.fid_statistics)
    return EvaluationConfig(
        benchmarks=options.benchmark.split(","),
        data=options.data,
        split=options.split,
        frames=options.frames,
        image_reading=options.image_reading,
        few_shot=[whole(word, "--shots") for word in options.shots.split(",")],
        text_examples=options.text_examples,
        limit=options.limit,
        batch=options.batch,
        part=part(options.part),
        rices=options.rices,
        weights=Weights(options.clip, options.inception, options.wordnet, options.fid, options.fid_statistics),
        drawing={name: getattr(options, name) for name in ("sampler", "steps", "guidance")},
    )


def _model(options: argparse.Namespace, folder: Path) -> Emu:
    from emu_jax.generate.model import Emu

    return Emu.load(
        folder,
        tokenizer=options.tokenizer,
        vision_head_dim=options.vision_head_dim,
        weights=options.weights,
        decoder=options.decoder,
        safety_checker=False,  # black images would be scored
        mesh=mesh(options.mesh),
        rope_dtype=options.rope_dtype,
    )


def run_benchmarks(options: argparse.Namespace) -> int:
    from emu_jax.evaluate.benchmark_runs import evaluate

    out = options.out or _own_folder(options.model) / "benchmarks"
    if not options.out and not options.model.is_dir():
        raise UserError(f"--model {options.model}: a file; name the folder of the scores with --out")
    config = _benchmark_config(options)
    for result in evaluate(_model(options, options.model), config, out):
        print(result.folder)
        if result.waits:
            print("  this part is predicted; the process that finishes last scores")
        elif result.figures:
            print(figures_table(result.figures, papers=True))
        else:
            print("  predicted; only the benchmark's own server or scorer can score it")
        if result.missing:
            print(f"  missing: {', '.join(result.missing)}; scores.json says why, and the same command adds them")
    return 0
