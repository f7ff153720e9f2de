"""Options that several commands share, and what their values mean."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import platform
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from emu_jax.errors import UserError
from emu_jax.storage import Path, as_path, check_local, create_text, is_bucket

CONFIG_HELP = "config file[:variant]; override fields with --config.a.b=value"


def path(text: str) -> Path:
    """The type of an option that names a path on a local disk or in a bucket."""
    try:
        return as_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def model(text: str) -> Path:
    """The type of an option that names a model: a path, or one that the wheel carries."""
    from emu_jax.checkpoints.shipped import model_path

    try:
        return model_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class LocalPath:
    """The type of an option that names a path on a local disk.

    Attributes:
      what: what is there, and why it is local; for the error.
    """

    what: str

    def __call__(self, text: str) -> pathlib.Path:
        try:
            return check_local(text, self.what)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error


def check_parent(option: str, file: Path | None) -> None:
    """Raises UserError unless the folder of a file that is to be written exists; in a bucket there are no folders."""
    if file is not None and not is_bucket(file) and not file.parent.is_dir():
        raise UserError(f"{option} {file}: no such folder {file.parent}; make it, or name another")


def add_model(parser: argparse.ArgumentParser, *aliases: str) -> None:
    """The model that a command loads."""
    parser.add_argument(
        "--model",
        *aliases,
        required=True,
        type=model,
        help="work directory, checkpoint, or published files",
    )
    parser.add_argument("--tokenizer", type=path, help="SentencePiece .model, needed by published files")
    parser.add_argument(
        "--vision-head-dim", type=int, help="head size of the vision encoder in published files (default: 88)"
    )
    add_weights(parser)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Which parameters of a checkpoint are read."""
    parser.add_argument(
        "--weights",
        choices=("raw", "ema"),
        default="auto",
        help="parameters of the last step, or their EMA (default: the EMA if the checkpoint has one)",
    )


def add_decoding(parser: argparse.ArgumentParser, beams_help: str = "beam search with this many beams") -> None:
    """How text is decoded, apart from its length."""
    parser.add_argument("--num-beams", type=int, default=1, help=beams_help)
    parser.add_argument("--min-length", type=int, default=1, help="shortest text, in tokens")
    parser.add_argument("--length-penalty", type=float, default=1.0, help="score of a beam = log p / length ** penalty")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token; above 0: sample")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest tokens (0: all)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample among the likeliest tokens of total probability p"
    )


def decoding(options: argparse.Namespace) -> dict[str, Any]:
    """The values of `add_decoding` as arguments of `Emu.generate_text`."""
    names = ("num_beams", "min_length", "length_penalty", "temperature", "top_k", "top_p")
    return {name: getattr(options, name) for name in names}


def add_sampling(parser: argparse.ArgumentParser, guidance: float, guidance_help: str) -> None:
    """How images are drawn."""
    parser.add_argument("--sampler", default="pndm", help="pndm, ddim, euler or dpmpp")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps")
    parser.add_argument("--guidance", type=float, default=guidance, help=guidance_help)


def add_compilation_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compilation-cache", type=path, metavar="DIR", help="keep compiled programs for the next start"
    )


def use_compilation_cache(folder: Path | None) -> None:
    """Makes JAX keep compiled programs in a folder; None leaves that to JAX_COMPILATION_CACHE_DIR."""
    import tempfile

    import jax

    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_bucket(folder):
            create_text(folder / "README", "Compiled programs of JAX.\n")
        else:
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise UserError(
            f"--compilation-cache {folder}: cannot be written ({error.strerror}); name a folder where you may write"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(folder))


PROGRAMS = 1 << 30  # bytes of the user's cache of programs, which is emptied when it is larger


def use_users_cache() -> None:
    """Makes JAX keep compiled programs in the user's cache, unless JAX_COMPILATION_CACHE_DIR names another folder.

    A command that answers one prompt would otherwise compile for longer than it computes. Where the user has no folder
    for caches, nothing is kept.
    """
    import hashlib

    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    # A home folder may be shared by machines whose processors lack each other's instructions.
    flags = pathlib.Path("/proc/cpuinfo")
    lines = flags.read_text().splitlines() if flags.exists() else []
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    name = hashlib.sha256(processor.encode()).hexdigest()[:12]
    try:
        home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        folder = home / "emu_jax" / "programs" / name
        folder.mkdir(parents=True, exist_ok=True)
        if sum(file.stat().st_size for file in folder.iterdir()) > PROGRAMS:
            shutil.rmtree(folder)
            folder.mkdir()
    except (OSError, RuntimeError):  # no home, or one that cannot be written
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def add_mesh(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("--mesh", nargs="+", default=[], metavar="AXIS=N", help=f"shard over devices, e.g. {example}")


def mesh(words: Sequence[str]) -> dict[str, int] | None:
    """["data=4", …] -> {"data": 4, …}; None without any."""
    sizes = {axis: whole(size, f"--mesh {axis}") for axis, _, size in (word.partition("=") for word in words)}
    return sizes or None


def whole(word: str, where: str) -> int:
    """A whole number; UserError, which begins with `where`, for anything else."""
    try:
        return int(word)
    except ValueError as error:
        raise UserError(f"{where}: {word!r} is not a whole number") from error


def figures_table(figures: Mapping[str, Any], *, papers: bool = False) -> str:
    """One line for each figure: its value, interval, and chance where that is known.

    Args:
      papers: whether to add value and interval on the scale of papers, where that is another one.
    """
    lines = []
    for name, figure in figures.items():
        low, high = figure.interval
        chance = "" if figure.chance is None else f"  chance {figure.chance:.4f}"
        lines.append(
            f"{name:88s} {figure.value:6.3f}  95% [{low:.3f}, {high:.3f}]{chance}{_in_papers(figure) if papers else ''}"
        )
    return "\n".join(lines)


def _in_papers(figure: Any) -> str:
    if figure.paper_scale == 1:
        return ""
    value, low, high = (figure.paper_scale * number for number in (figure.value, *figure.interval))
    return f"  in papers {value:.1f} [{low:.1f}, {high:.1f}]"


def part(text: str) -> tuple[int, int]:
    """The value of `--part I/N`."""
    number, _, count = text.partition("/")
    found = whole(number, "--part"), whole(count, "--part")
    if not 0 <= found[0] < found[1]:
        raise UserError(f"--part {text}: expected I/N with I from 0 to N - 1, as in 0/4")
    return found
