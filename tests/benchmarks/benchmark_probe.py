"""What the encoder learns from each source: `python -m tests.benchmarks.benchmark_probe FOLDER/data --out OUT`.

In: the five folders that launch/mixture.sh prepares in FOLDER/data. For each source and seed, a fifth of its records is
held out (seed 0 holds out the first fifth, seed 1 the second, …; of the video whole parts), configs/mixture.py's model
is trained on the rest of that source alone, and its encoder is frozen. Out: how well a linear map reads from an
image's embeddings what belongs to the image, on held-out records, before training and after it:

    retrieval   ridge regression from embeddings to a vector of the image's text (TF-IDF, 256 principal directions),
                fitted on the training records; then the rank of the right text among all distinct held-out texts, by
                cosine. The text is a caption; the first 48 words of the next text on a page; for a video's frame, what
                the narration says before and after it.
    class       ridge regression to one-hot classes: skin tone, role and group of an emoji, topic of a page.

    trained, random      the same network after training and before it (its checkpoint of step 0)
    pixels               the image itself, 16 x 16
    shuffled             `trained`, with the training records' texts or classes dealt at random, three
                         times: near chance (the interval leaves out how they were dealt)

`causal` reads the Q embeddings that the language model reads, one after the other (Q x D numbers); `vision` the mean
over patches of ln_visual; `causal, 8` and `vision, 8` their first eight principal directions over the training records.
The two kinds of probe ask different things. A random network keeps most of what the pixels tell, and a linear map from
all its numbers, fitted on thousands of images, finds it: on emoji, whose variants resemble one another, it names a
held-out image about as well as one from pixels does. The eight directions show what stands out. Their number was chosen
on one run (fluent, seed 0) after all, 8, 16 and 32 directions and 5 nearest neighbours had been compared, some 60
intervals without correction; other seeds confirmed it for fluent, not for every source (docs/ablations.md). A video is
the mean over its frames. Everything is standardised by the training records.
Every figure is a mean over held-out items of all seeds with a 95% interval of a bootstrap over seeds and over records
(of emoji: over names without skin tones). `gain` is trained - random on the same items.

Rows are as long as the source fills them, with about as many images a step as the mixture has: shorter ones for pairs
and videos, which would leave the mixture's 2,048 tokens empty. All else is the config's; words that begin with
--config. are passed on to every training. Trainings that are finished are not made again. OUT/probe.json has every
figure. Sources need different numbers of steps: run them with an OUT each.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import jax
import numpy as np

from emu_jax import Emu
from emu_jax.checkpoints.store import FOLDER as CHECKPOINTS
from emu_jax.data.document import Text
from emu_jax.data.images import EncodedImage, resize
from emu_jax.data.prepared import (
    MANIFEST,
    Record,
    Records,
    StoredImage,
    file_entry,
    read_manifest,
    shard_name,
    write_manifest,
)
from emu_jax.data.records import write_records
from emu_jax.errors import UserError
from emu_jax.evaluate.metrics.ridge import Ridge, assign_folds
from emu_jax.models import emu
from tests.benchmarks import probe
from tests.benchmarks.probe import (
    Ranks,
    Run,
    TextVectors,
    chance_reciprocal,
    mean_with_interval,
    principal,
    unit,
    words,
)

ROOT = Path(__file__).parents[2]
# Source -> tokens and images of a row, rows of a batch: about the mixture's 26 images a step in rows that are full.
ROWS = {
    "fluent": (224, 13, 2),
    "gimp": (1024, 6, 4),
    "sklearn": (1024, 4, 4),
    "animations": (384, 32, 1),
    "bunny": (384, 16, 2),
}
FOLDS = 5
TEXT_WORDS, TEXT_DIMENSIONS = 48, 256
PIXELS = 16  # side of the image that is read as it is
SHUFFLES = 3
FEW = 8  # principal directions that the second probe reads: as many as the model has queries
NAMES = "emojibase-data-17.0.0.tgz"
CLASSES = {"tone": 10, "role": 2, "group": 10, "topic": 10}  # training items that a class needs, else it is left out
BATCH = 64

# ---------------------------------------------------------------- a source in two parts


def hold_out(source: Path, fold: int, out: Path) -> None:
    """Writes `out`/train and `out`/heldout, prepared folders of one split, where they are not there yet.

    A part that is not complete has no manifest and is written again.
    """
    records = Records(source, "train")
    everything = [records[index] for index in range(len(records))]
    fold_of = assign_folds([record.key for record in everything], FOLDS)
    for part, held in (("train", False), ("heldout", True)):
        folder = out / part
        if (folder / MANIFEST).is_file():
            if read_manifest(folder)["of"] != records.fingerprint:
                raise UserError(f"{folder}: cut from other records than {source} holds now; name a new --out")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        chosen = [record for record in everything if (fold_of[record.key] == fold) == held]
        name = records.manifest["name"]
        path = folder / shard_name(name, "train", 0, 1)
        written = write_records(path, (record.serialise() for record in chosen))
        told = {key: records.manifest[key] for key in ("source", "settings")}
        told |= {"documents_read": written, "rejects": {}, "of": records.fingerprint}
        write_manifest(folder, name, {"train": {path.name: file_entry(path, written)}}, told)


@dataclasses.dataclass(frozen=True)
class Item:
    """An image, or a video's frames, with what belongs to it.

    Attributes:
      frames: encoded. text: "" where none follows. document: the record's key.
      group: what the bootstrap keeps together: a document; of emoji, a name without its skin tone.
      classes: by kind.
    """

    frames: tuple[bytes, ...]
    text: str
    document: str
    group: str
    classes: dict[str, str]


def items_of(record: Record, groups: dict[str, str]) -> Iterator[Item]:
    """The items of a record; `groups` are the emoji's by name."""
    if record.kind in ("pair", "video"):
        frames = tuple(part.data for part in record.parts if isinstance(part, StoredImage))
        name = " ".join(part.text for part in record.parts if isinstance(part, Text))
        role, _, tone = name.partition(": ")
        classes = {"group": groups[name]} if name in groups else {}
        if tone.endswith("skin tone") and "," not in tone:
            classes |= {"role": role, "tone": tone}
        yield Item(frames, name, record.key, role, classes)
        return
    folder, slash, page = record.key.rpartition("/")
    topic = folder if slash else "-".join(page.split("-")[:2])  # auto_examples/svm; gimp-filter
    classes = {"topic": topic} if record.kind == "web" else {}
    for place, part in enumerate(record.parts):
        if isinstance(part, StoredImage):
            before, after = (
                [other.text for other in some if isinstance(other, Text)]
                for some in (record.parts[:place], record.parts[place + 1 :])
            )
            texts = after[:1] if record.kind == "web" else [*before[-1:], *after[:1]]
            text = " ".join(" ".join(texts).split()[:TEXT_WORDS])
            yield Item((part.data,), text, record.key, record.key, classes)


def read_items(folder: Path, groups: dict[str, str]) -> list[Item]:
    """All items of a prepared folder."""
    records = Records(folder, "train")
    return [item for index in range(len(records)) for item in items_of(records[index], groups)]


def emoji_groups(archive: Path) -> dict[str, str]:
    """Name -> group, by emojibase."""
    if not archive.is_file():
        raise UserError(
            f"{archive}: no such file; expected the download of launch/mixture.sh, or name it by --emojibase"
        )
    with tarfile.open(archive) as opened:
        file = opened.extractfile("package/en/data.json")
        entries = json.load(file) if file else []
    return {
        each["label"]: str(entry["group"])
        for entry in entries
        if "group" in entry
        for each in [entry, *entry.get("skins", [])]
    }


# ---------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True)
class Training:
    """One source and seed: a work directory beside the source's two parts."""

    source: str
    seed: int
    folder: Path

    @property
    def workdir(self) -> Path:
        return self.folder / f"{self.source}-{self.seed}"

    @property
    def parts(self) -> Path:
        return self.folder / "parts" / f"{self.source}-{self.seed % FOLDS}"

    def command(self, data: Path, steps: int, overrides: Sequence[str]) -> list[str]:
        tokens, images, rows = ROWS[self.source]
        fields: dict[str, Any] = {
            f"data.mixture.{self.source}.source": self.parts / "train",
            "data.seed": self.seed,
            "data.row_tokens": tokens,
            "data.row_images": images,
            "data.batch_rows": rows,
            "train.seed": self.seed,
            "train.steps": steps,
            "train.checkpoint_every": steps,
            "train.keep_checkpoints": 2,  # that of step 0 is the random encoder
        }
        fields |= {f"data.mixture.{other}.weight": 0 for other in ROWS if other != self.source}
        words = [f"--config.{name}={value}" for name, value in fields.items()]
        config = ["--config", f"configs/mixture.py:{data}", "--workdir", str(self.workdir)]
        return [sys.executable, "-m", "emu_jax.cli", "train", *config, *words, *overrides]

    def done(self, steps: int) -> bool:
        return all((self.workdir / CHECKPOINTS / str(step)).is_dir() for step in (0, steps))

    def run(self, core: int, data: Path, steps: int, overrides: Sequence[str]) -> None:
        """Trains on one core, or goes on where a run was stopped.

        Raises:
          UserError: the training did not succeed; its messages are in a file.
        """
        environment = os.environ | {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "JAX_PLATFORMS": "cpu"}
        log = self.folder / f"{self.source}-{self.seed}.log"
        with log.open("a", encoding="utf-8") as file:
            command = ["taskset", "-c", str(core), *self.command(data, steps, overrides)]
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
        if code:
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise UserError(f"{log}: training ended with exit code {code} ({' '.join(last)[:300]})")


def train_all(
    trainings: Iterable[Training], cores: Sequence[int], data: Path, steps: int, overrides: Sequence[str]
) -> None:
    """Runs them, one at a time on each core; what is done is left as it is."""
    free: SimpleQueue[int] = SimpleQueue()
    for core in cores:
        free.put(core)
    stopped = threading.Event()

    def one(training: Training) -> None:
        if stopped.is_set():
            return
        core = free.get()
        try:
            print(f"{training.workdir}: trains on core {core}", file=sys.stderr, flush=True)
            training.run(core, data, steps, overrides)
        except UserError:
            stopped.set()
            raise
        finally:
            free.put(core)

    with ThreadPoolExecutor(len(cores)) as pool:
        for _ in pool.map(one, [training for training in trainings if not training.done(steps)]):
            pass


# ---------------------------------------------------------------- features


def frame_pixels(items: Sequence[Item], size: int) -> np.ndarray:
    """All frames of all items, uint8 [frames, size, size, 3]."""
    return np.stack([EncodedImage(frame, size, item.group)() for item in items for frame in item.frames])


def mean_of_frames(values: np.ndarray, items: Sequence[Item]) -> np.ndarray:
    """[frames, …] -> float32 [items, F]."""
    counts = np.array([len(item.frames) for item in items])
    flat = values.reshape(len(values), -1).astype(np.float32)
    return np.add.reduceat(flat, np.cumsum(counts) - counts, axis=0) / counts[:, None]


def encode(model: Emu, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Frozen features of frames [N, H, W, 3]: causal [N, Q * D], vision [N, Dv]."""

    @jax.jit
    def features(params: emu.Params, pixels: jax.Array) -> dict[str, jax.Array]:
        named = emu.bind(model.config, params).encode(emu.normalise_pixels(pixels, model.config))
        return {"causal": named["causal_embeds"].reshape(len(pixels), -1), "vision": named["ln_visual"].mean(1)}

    padded = np.concatenate([pixels, np.zeros((-len(pixels) % BATCH, *pixels.shape[1:]), np.uint8)])
    batches = [jax.device_get(features(model.params, padded[i : i + BATCH])) for i in range(0, len(padded), BATCH)]
    return {name: np.concatenate([batch[name] for batch in batches])[: len(pixels)] for name in batches[0]}


def features_of(training: Training, steps: int, items: Sequence[Item]) -> dict[tuple[str, str], np.ndarray]:
    """(encoder, what is read of it) -> [items, F]."""
    found = {}
    for name, step in (("trained", steps), ("random", 0)):
        model = Emu.load(training.workdir / CHECKPOINTS / str(step))
        pixels = frame_pixels(items, model.config.vision.image_size)
        for read, values in encode(model, pixels).items():
            found[name, read] = mean_of_frames(values, items)
    small = np.stack([resize(frame, PIXELS) for frame in pixels])
    return found | {("pixels", "pixels"): mean_of_frames(small, items)}


# ---------------------------------------------------------------- measures

CODE = hashlib.sha256(Path(__file__).read_bytes() + Path(probe.__file__).read_bytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Score:
    """One measure of one training: each held-out item's score, float64 [N], and what guessing gets."""

    values: np.ndarray
    groups: tuple[str, ...]
    chance: float


Scores = dict[tuple[str, str, str], Score]  # (measure, encoder, what is read of it)


def shuffled(items: Sequence[Item], draw: int) -> list[Item]:
    """The items' images with the texts and classes of others."""
    order = np.random.default_rng(draw).permutation(len(items))
    pairs = zip(items, order, strict=True)
    return [dataclasses.replace(item, text=items[other].text, classes=items[other].classes) for item, other in pairs]


def retrieval(known: Sequence[Item], x: np.ndarray, held: Sequence[Item], x_held: np.ndarray) -> dict[str, Score]:
    """The rank of a held-out item's text among all held-out texts; x [N, F] and x_held are the items' features."""
    with_text, held_text = ([place for place, item in enumerate(some) if item.text] for some in (known, held))
    texts = [known[place].text for place in with_text]
    vectors = TextVectors.fit(texts, TEXT_DIMENSIONS)
    ridge = Ridge.fit(x[with_text], vectors(texts), [known[place].document for place in with_text])
    spelt = [" ".join(words(held[place].text)) for place in held_text]
    candidates = sorted(set(spelt))
    scores = unit(ridge(x_held[held_text])) @ unit(vectors(candidates) - ridge.centre).T
    ranks = Ranks.of(scores, np.array([candidates.index(text) for text in spelt]))
    count = len(candidates)
    groups = tuple(held[place].group for place in held_text)
    return {
        "recall@1": Score(ranks.recall(1), groups, 1 / count),
        "recall@5": Score(ranks.recall(5), groups, min(1.0, 5 / count)),
        "mean reciprocal rank": Score(ranks.reciprocal(), groups, chance_reciprocal(count)),
        "wrong texts beaten": Score(ranks.beaten(), groups, 0.5),
    }


def classification(
    kind: str, known: Sequence[Item], x: np.ndarray, held: Sequence[Item], x_held: np.ndarray
) -> dict[str, Score]:
    """Whether a held-out item's class has the largest output; empty where no two classes are common enough."""
    counts = collections.Counter(item.classes[kind] for item in known if kind in item.classes)
    names = sorted(name for name, count in counts.items() if count >= CLASSES[kind])
    if len(names) < 2:
        return {}
    chosen, held_chosen = (
        [place for place, item in enumerate(some) if item.classes.get(kind) in names] for some in (known, held)
    )
    labels, held_labels = (
        np.array([names.index(some[place].classes[kind]) for place in places])
        for some, places in ((known, chosen), (held, held_chosen))
    )
    ridge = Ridge.fit(x[chosen], np.eye(len(names))[labels], [known[place].document for place in chosen])
    right = (ridge(x_held[held_chosen]) + ridge.centre).argmax(1) == held_labels
    commonest = np.bincount(labels).argmax()
    groups = tuple(held[place].group for place in held_chosen)
    return {kind: Score(right.astype(np.float64), groups, float(np.mean(held_labels == commonest)))}


def measure(training: Training, steps: int, groups: dict[str, str]) -> Scores:
    """All scores of a finished training; kept beside it as long as this measurement's code is the same."""
    file = training.workdir / "probe.json"
    if file.is_file() and (kept := json.loads(file.read_text(encoding="utf-8")))["code"] == CODE:
        return {
            tuple(each["of"]): Score(np.array(each["values"]), tuple(each["groups"]), each["chance"])
            for each in kept["scores"]
        }
    known, held = (read_items(training.parts / part, groups) for part in ("train", "heldout"))
    found: Scores = {}

    def add(encoder: str, read: str, items: Sequence[Item], x: np.ndarray) -> None:
        fitted = (items, x[: len(known)], held, x[len(known) :])
        scores = retrieval(*fitted)
        for kind in CLASSES:
            scores |= classification(kind, *fitted)
        found.update({(name, encoder, read): score for name, score in scores.items()})

    for (encoder, source), everything in features_of(training, steps, [*known, *held]).items():
        for read, x in ((source, everything), (f"{source}, {FEW}", principal(everything, len(known), FEW))):
            add(encoder, read, known, x)
            if encoder == "trained":
                for draw in range(SHUFFLES):
                    add(f"shuffled {draw}", read, shuffled(known, draw), x)
    scores = [dataclasses.asdict(score) | {"of": of, "values": score.values.tolist()} for of, score in found.items()]
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"code": CODE, "scores": scores}), encoding="utf-8")
    partial.replace(file)
    return found


# ---------------------------------------------------------------- the table


def summary(source: str, scores: Sequence[Scores]) -> Iterator[dict[str, Any]]:
    """A row a measure and feature, from the scores of a source's trainings, one for each seed."""
    for name, _, read in [of for of in scores[0] if of[1] == "trained"]:

        def figure(encoder: str, minus: str = "", name: str = name, read: str = read) -> dict[str, Any]:
            runs = []
            for found in scores:
                draws = [f"{encoder} {draw}" for draw in range(SHUFFLES)] if encoder == "shuffled" else [encoder]
                own = read.replace(read.partition(",")[0], encoder) if encoder == "pixels" else read
                same = [found[name, draw, own] for draw in draws]
                base = found[name, minus, read].values if minus else 0.0
                runs.append(Run(np.mean([score.values for score in same], axis=0) - base, np.array(same[0].groups)))
            value, low, high = mean_with_interval(runs)
            return {"value": value, "low": low, "high": high}

        trained = [found[name, "trained", read] for found in scores]
        items = [len(score.values) for score in trained]
        yield {
            "source": source,
            "measure": name,
            "features": read,
            "seeds": len(scores),
            "items": sum(items),
            "chance": float(np.average([score.chance for score in trained], weights=items)),
            "pixels": figure("pixels"),
            "random": figure("random"),
            "trained": figure("trained"),
            "gain": figure("trained", minus="random"),
            "shuffled": figure("shuffled"),
        }


COLUMNS = ("pixels", "random", "trained", "gain", "shuffled")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table; a gain whose interval lies above 0 is bold."""
    head = ["source", "measure", "features", "items", "chance", *COLUMNS]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = [row["source"], row["measure"], row["features"], f"{row['items']:,}", f"{row['chance']:.3f}"]
        for column in COLUMNS:
            value, low, high = (row[column][end] for end in ("value", "low", "high"))
            sign = "+" if column == "gain" else ""
            text = f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"
            cells.append(f"**{text}**" if column == "gain" and low > 0 else text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- the command


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Makes the folder these settings' own.

    Raises:
      UserError: it holds trainings with others.
    """
    file = out / "settings.json"
    if file.is_file():
        old = json.loads(file.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if old[name] != value:
                raise UserError(
                    f"--out {out}: its trainings have {name} {old[name]!r}, not {value!r}; name a new folder"
                )
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="the folder of prepared folders that launch/mixture.sh makes")
    parser.add_argument("--out", type=Path, required=True, help="for trainings and probe.json; run again to resume")
    parser.add_argument("--sources", default=",".join(ROWS), help="comma-separated (default: all five)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings a source (default: 3)")
    parser.add_argument("--first-seed", type=int, default=0, help="theirs are this one and the next ones (default: 0)")
    parser.add_argument("--steps", type=int, default=300, help="of each training (default: 300)")
    parser.add_argument("--cores", default="0", help="comma-separated: a training at a time on each (default: 0)")
    parser.add_argument("--emojibase", type=Path, help=f"default: {NAMES} in `download` beside the data")
    options, overrides = parser.parse_known_args(arguments)
    if wrong := [word for word in overrides if not word.startswith("--config.")]:
        parser.error(f"unknown argument {wrong[0]}; trainings take --config.<field>=<value>")
    sources, cores = options.sources.split(","), [int(core) for core in options.cores.split(",")]
    if unknown := set(sources) - set(ROWS):
        parser.error(f"--sources {min(unknown)}: choose among {', '.join(ROWS)}")
    if options.seeds < 1 or options.steps < 1 or options.first_seed < 0:
        parser.error(
            f"--seeds {options.seeds}, --steps {options.steps}, --first-seed {options.first_seed}; "
            "expected at least 1, 1 and 0"
        )

    data, out = options.data.resolve(), options.out.resolve()
    groups = emoji_groups(options.emojibase or data.parent / "download" / NAMES)
    check_settings(out, {"data": str(data), "steps": options.steps, "overrides": overrides})
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    trainings = {source: [Training(source, seed, out) for seed in seeds] for source in sources}
    for training in (each for some in trainings.values() for each in some):
        hold_out(data / training.source, training.seed % FOLDS, training.parts)
    # Seed by seed: what was stopped early has something of every source.
    queue = [some[place] for place in range(options.seeds) for some in trainings.values()]
    train_all(queue, cores, data, options.steps, overrides)

    rows = []
    for source, some in trainings.items():
        rows += list(summary(source, [measure(training, options.steps, groups) for training in some]))
        print(f"{source}: measured", file=sys.stderr, flush=True)
    (out / "probe.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"{options.steps} steps, {options.seeds} seeds, {' '.join(overrides) or 'configs/mixture.py as it is'}\n")
    print(markdown(rows))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
