"""What integer weights cost: `python -m tests.benchmarks.benchmark_quantise MODEL [MODEL …]` prints a row a model and
kind.

MODEL is a work directory of pretraining, or published files with the widths of their heads: PATH:vision_head_dim. A
trained model reads the held-out documents it was made for, published files random tokens and images. Compared are
the logits wherever a text token is classified: largest error over the largest logit, root mean square error over the
logits' own, and how often the likeliest token is the same.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np

from emu_jax.checkpoints.load import load_emu
from emu_jax.checkpoints.store import is_checkpoint, open_checkpoint
from emu_jax.data.config import DataConfig
from emu_jax.data.pipeline import Pipeline
from emu_jax.models import emu
from emu_jax.models.paths import flatten
from emu_jax.models.quantise import KINDS
from tests.models.quantised import quantise_params
from tests.models.reference_batch import reference_batch

BATCHES = 12
ROWS, LENGTH, IMAGES = 4, 128, 2  # of random documents


def trained(path: Path) -> tuple[emu.EmuConfig, dict, dict, emu.SpecialIds, list[emu.Batch]]:
    """A work directory's model and its held-out documents."""
    loaded, config = load_emu(path), open_checkpoint(path).config
    model, tokenizer = loaded.config, loaded.tokenizer
    config.data.split = "heldout_combinations"
    sizes = {"queries": model.causal.queries, "image_size": model.vision.image_size}
    stream = Pipeline(DataConfig.from_dict(config.data), tokenizer, **sizes)
    batches = [emu.Batch(**next(stream)) for _ in range(BATCHES)]
    ids = emu.SpecialIds(tokenizer.pad_id, tokenizer.img_id, tokenizer.img_end_id, tokenizer.image_id)
    return model, loaded.params, loaded.statistics, ids, batches


def foreign(path: Path, vision_head_dim: int) -> tuple[emu.EmuConfig, dict, dict, emu.SpecialIds, list[emu.Batch]]:
    """Published files, and random documents: text, an image, text."""
    loaded = load_emu(path, vision_head_dim=vision_head_dim)
    config = loaded.config
    first = config.llama.vocab_size - (4 if config.llama.vocab_size % 2 == 0 else 6)
    ids = emu.SpecialIds(pad=first, img=first + 1, img_end=first + 2, image=first + 3)
    random, queries, size = np.random.default_rng(0), config.causal.queries, config.vision.image_size
    batches = []
    for _ in range(BATCHES):
        tokens = random.integers(3, first, (ROWS, LENGTH)).astype(np.int32)
        for start in np.linspace(4, LENGTH // 2, IMAGES).astype(int):
            tokens[:, start : start + queries + 2] = [ids.img, *[ids.image] * queries, ids.img_end]
        images = random.standard_normal((ROWS, IMAGES, size, size, 3), np.float32)
        batches.append(reference_batch(images, tokens, np.ones_like(tokens), ids))
    return config, loaded.params, loaded.statistics, ids, batches


def size_of(params: dict) -> tuple[int, int]:
    """Bytes of the language model's blocks, and of everything."""
    bits = {
        path: 4 if value.dtype == KINDS["int4"] else 8 * value.dtype.itemsize for path, value in flatten(params).items()
    }
    sizes = {path: value.size * bits[path] // 8 for path, value in flatten(params).items()}
    return sum(size for path, size in sizes.items() if path.startswith("llama/blocks/")), sum(sizes.values())


def measure(
    name: str, kind: str, config: emu.EmuConfig, params: dict, statistics: dict, ids: emu.SpecialIds, batches: list
) -> str:
    params = jax.tree.map(np.asarray, params)
    small = dataclasses.replace(config, llama=dataclasses.replace(config.llama, quantised=kind))
    quantised = quantise_params(params, kind)

    @jax.jit
    def logits(batch: emu.Batch) -> tuple:
        pair = ((params, config), (quantised, small))
        return tuple(emu.intermediates(p, statistics, batch, config=c, ids=ids)["logits"][:, :-1] for p, c in pair)

    agree, total, largest, error, square, top = 0, 0, 0.0, 0.0, 0.0, 0.0
    for batch in batches:
        labelled = np.asarray(batch.text_weights[:, 1:]) > 0
        exact, rounded = (np.asarray(x)[labelled] for x in logits(batch))  # [n, V]
        agree += int((exact.argmax(-1) == rounded.argmax(-1)).sum())
        total += len(exact)
        largest = max(largest, float(np.abs(exact - rounded).max()))
        top = max(top, float(np.abs(exact).max()))
        error += float(np.square(exact - rounded).sum())
        square += float(np.square(exact).sum())
    (blocks, whole), (blocks8, whole8) = size_of(params), size_of(quantised)
    return (
        f"{name:24s}{kind:6s}{blocks / 1e6:9.2f} -> {blocks8 / 1e6:6.2f} MB{whole / 1e6:9.2f} -> {whole8 / 1e6:6.2f} MB"
        f"{agree / total:12.4f}{largest / top:12.4f}{(error / square) ** 0.5:12.4f}{total:8d}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+")
    names = ("model", "blocks", "all parameters", "same token", "largest err.", "rms error", "tokens")
    print(f"{names[0]:30s}{names[1]:>22s}{names[2]:>22s}" + "".join(f"{name:>12s}" for name in names[3:6]) + "  tokens")
    for spec in parser.parse_args().model:
        path, _, head = spec.partition(":")
        loaded = trained(Path(path)) if is_checkpoint(Path(path)) else foreign(Path(path), int(head or 88))
        for kind in KINDS:
            print(measure(Path(path).name, kind, *loaded))


if __name__ == "__main__":
    main()
