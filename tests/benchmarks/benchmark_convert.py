"""Time and memory of a conversion: `python -m tests.benchmarks.benchmark_convert [7b|13b] [--dense]` prints a table.

Writes a LLaMA of that shape in bfloat16 as transformers shards it, converts it in a process of its own and reports
that process's peak resident memory beside the bound: three times the largest tensor, and 1 GB. The files are sparse,
zeros that take no disk, unless --dense fills them with noise; what is written takes its 14 or 26 GB in any case.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from emu_jax.checkpoints.convert import emu, llama

SHAPES = {
    "7b": {"width": 4096, "layers": 32, "heads": 32, "mlp_dim": 11008},
    "13b": {"width": 5120, "layers": 40, "heads": 40, "mlp_dim": 13824},
}
VOCABULARY = 32_000
SHARDS = 3
GB = 1e9


def tensors(sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Transformers' keys and shapes."""
    fields = {"vocab_size": VOCABULARY, "norm_eps": 1e-6, "rope_base": 1e4, "context": 2048} | sizes
    part = {"image_size": 8, "patch_size": 4, "width": 8, "layers": 1, "heads": 1, "mlp_dim": 8}
    causal = {"queries": 1, "width": 8, "layers": 1, "heads": 1, "head_dim": 8, "mlp_dim": 8}
    shapes = emu.published_shapes({"vision": part, "causal": causal, "llama": fields})
    keys = {rule.key for rule in emu.table_of(llama=sizes["layers"]) if llama.in_scope(rule.path)}
    return {key.removeprefix(llama.PREFIX): shape for key, shape in shapes.items() if key in keys}


def write(folder: Path, sizes: dict[str, int], dense: bool) -> int:
    """Writes the folder; returns the bytes of its tensors."""
    shapes = tensors(sizes)
    names, place, total = list(shapes), {}, 0
    noise = np.random.default_rng(0).integers(0, 2**16, 1 << 24, np.uint16)
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        header, offset = {}, 0
        for name in names[shard::SHARDS]:
            size = 2 * int(np.prod(shapes[name]))
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [offset, offset + size]}
            place[name], offset = file, offset + size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            for start in range(0, offset if dense else 0, noise.nbytes):
                stream.write(noise.tobytes()[: offset - start])
            stream.truncate(8 + len(text) + offset)
        total += offset
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    fields = {"vocab_size": VOCABULARY, "norm_eps": 1e-6, "rope_base": 1e4, "context": 2048} | sizes
    (folder / "config.json").write_text(json.dumps(llama.describe(fields)))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", choices=SHAPES, default="13b")
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    sizes = SHAPES[options.size]
    folder = Path(tempfile.mkdtemp(prefix="benchmark_convert-"))
    try:
        (folder / "in").mkdir()
        total = write(folder / "in", sizes, options.dense)
        command = [sys.executable, "-m", "emu_jax.cli", "convert", "--from", str(folder / "in")]
        command += ["--to", str(folder / "out"), "--dtype", options.dtype]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        printed, _ = process.communicate()
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed")
        largest = max(int(np.prod(shape)) for shape in tensors(sizes).values())
        written = np.dtype(np.float32).itemsize if options.dtype == "float32" else 2
        bound = 3 * largest * max(2, written) / GB + 1.0
        stored = sum(f.stat().st_blocks * 512 for f in (folder / "out").rglob("*") if f.is_file()) / GB
        print(
            f"{options.size}, {SHARDS} {'dense' if options.dense else 'sparse'} shards, {total / GB:.1f} GB of bfloat16"
        )
        print(printed.strip().splitlines()[0])
        print(
            f"on disk {stored:.1f} GB; peak resident memory {usage.ru_maxrss * 1024 / GB:.2f} GB, bound {bound:.2f} GB"
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
