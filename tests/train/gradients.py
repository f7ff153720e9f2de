"""Gradient norms by part for a batch of each kind of document, config by config: `python -m tests.train.gradients`.

The configs keep all their switches and the model takes the debug size; a batch is what training would read from a
folder of that kind alone. Of a part that is frozen, "frozen"; of documents without images, the encoders have 0.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from configs import models
from emu_jax.config import load_config
from emu_jax.data.config import DataConfig
from emu_jax.data.document import Text
from emu_jax.data.pipeline import Pipeline
from emu_jax.data.prepared import Record
from emu_jax.data.system_messages import IMAGE_SYSTEM
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.models import emu
from emu_jax.models.paths import flatten, nest
from emu_jax.train.groups import part_of
from emu_jax.train.tasks.task import find_task
from tests.data.folders import image, write_folder

ROOT = Path(__file__).parents[2]
ENCODERS = ("vision", "causal")
ROW_TOKENS, ROW_IMAGES, RECORDS = 160, 12, 24
WORDS = ["a red square", "a blue bar", "words before and after", IMAGE_SYSTEM, "user assistant", "what is this:"]
ABLATIONS = (
    *("published_objective", "published_objective:micro-live", "published_objective:micro-raw"),
    *("base", "no_storyboards", "no_regression", "no_causal_transformer", "bidirectional_queries"),
    *("queries:micro-32", "frozen_vision", "frozen_vision:micro-random", "regression_weight:micro-16", "base:7b"),
)
CONFIGS = {
    "quickstart": "configs/quickstart.py",
    "mixture": "configs/mixture.py",
    "pretrain:14b": "configs/pretrain.py:14b",
    "pretrain:7b": "configs/pretrain.py:7b",
    **{f"ablations/{name}": f"configs/ablations/{name.replace(':', '.py:')}" for name in ABLATIONS if ":" in name},
    **{f"ablations/{name}": f"configs/ablations/{name}.py" for name in ABLATIONS if ":" not in name},
    "instruct:14b": "configs/instruct.py:14b",
    "instruct:mini": "configs/instruct.py:mini",
}
KINDS = ("pair", "video", "web", "storyboard", "chat", "text")


def tokenizer(instruct: bool) -> Tokenizer:
    return Tokenizer(Tokenizer.train(WORDS, vocab_size=300, model_type="bpe").proto, instruct=instruct)


def write_sources(folder: Path) -> dict[str, Path]:
    """A source of each kind of document."""
    parts = {
        "pair": lambda n: (image(n), Text("a red square")),
        "video": lambda n: (*(image(8 * n + frame) for frame in range(8)), Text("a blue bar")),
        "web": lambda n: (Text("words before"), image(2 * n), Text("and after"), image(2 * n + 1), Text("a bar")),
        "storyboard": lambda n: tuple(p for f in range(4) for p in (Text("a bar"), image(4 * n + f))),
        "chat": lambda n: (Text(IMAGE_SYSTEM, "system"), image(n), Text("what", "user"), Text("a bar", "assistant")),
    }
    sources = {}
    for kind, make in parts.items():
        records = [Record(f"{kind}/{number}", kind, make(number)) for number in range(RECORDS)]
        sources[kind] = write_folder(folder / kind, records, shards=1)
    sources["text"] = folder / "text.jsonl"
    lines = [json.dumps({"parts": [{"text": "words before and after"}]})] * RECORDS
    sources["text"].write_text("\n".join(lines), encoding="utf-8")
    return sources


def shrunk(config: ConfigDict, vocabulary: int) -> ConfigDict:
    """The config at debug size, with its own switches."""
    small = models.debug()
    for part in ("vision", "causal", "llama"):
        sizes = {n: v for n, v in small[part].items() if n not in ("kind", "dropout", "quantised") and "lora" not in n}
        config.model[part].update(sizes)
    config.model.llama.update({"vocab_size": vocabulary, "context": ROW_TOKENS})
    config.model.update({"dtype": "float32", "param_dtype": "float32", "loss_chunk": 32})
    config.data.update({"row_tokens": ROW_TOKENS, "row_images": ROW_IMAGES, "batch_rows": 4, "packing_window": RECORDS})
    config.data.update({"shards": 1, "workers": 0, "max_padding": 1.0, "source": ""})
    return config


@functools.partial(jax.jit, static_argnames=("config", "ids"))
def _gradients(params: dict, batch: emu.Batch, config: emu.EmuConfig, ids: emu.SpecialIds) -> dict:
    statistics = emu.initial_statistics(config)
    return jax.grad(lambda p: emu.loss(p, statistics, batch, config=config, ids=ids)[0])(params)


def norms(spec: str, kind: str, source: Path) -> dict[str, float | None]:
    """Gradient norm of each part over its trainable parameters; None of a frozen part."""
    config = load_config(str(ROOT / spec))
    words = tokenizer(config.objective == "instruct")
    config = shrunk(config, words.vocab_size)
    config.data.mixture = ConfigDict({kind: {"source": str(source), "subsequences": kind == "web"}})
    model = emu.EmuConfig.from_dict(config.model)
    ids = emu.SpecialIds(words.pad_id, words.img_id, words.img_end_id, words.image_id)
    task = find_task(config.objective)(config)
    pipeline = Pipeline(
        DataConfig.from_dict(config.data),
        words,
        queries=model.causal.queries,
        image_size=model.vision.image_size,
        learn_image_token=model.learn_image_token,
    )
    batch = emu.Batch(**{name: jnp.asarray(values) for name, values in next(pipeline).items()})
    pipeline.close()
    grads = flatten(_gradients(emu.init(model, jax.random.key(0)), batch, model, ids))
    found: dict[str, float | None] = {}
    for part in (*ENCODERS, "llama"):
        mine = {n: g for n, g in grads.items() if part_of(n) == part and task.is_trainable(n)}
        found[part] = float(optax.tree.norm(nest(mine))) if mine else None
    return found


def kinds_of(name: str) -> tuple[str, ...]:
    """The kinds of documents that a config reads: chats need [USER], which tuning alone has."""
    return ("chat",) if name.startswith("instruct") else tuple(kind for kind in KINDS if kind != "chat")


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sources = write_sources(Path(folder))
        print(f"{'config':36s}{'documents':12s}{'vision':>10s}{'causal':>10s}{'llama':>10s}")
        for name, spec in CONFIGS.items():
            for kind in kinds_of(name):
                found = norms(spec, kind, sources[kind])
                cells = ("frozen" if value is None else f"{value:.3g}" for value in found.values())
                print(f"{name:36s}{kind:12s}" + "".join(f"{cell:>10s}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
