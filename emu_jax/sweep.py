"""A grid of runs: every combination of values of some fields, each with several seeds.

In: a config, values by field, seeds. Out: the runs' commands, each with a work directory of its own. They run in
processes of their own, as a scheduler would start them.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from emu_jax.config import load_config
from emu_jax.errors import EXIT_AGAIN, EXIT_INTERRUPTED, TransientError, UserError
from emu_jax.storage import Path
from emu_jax.workdir import check_scheme

UNSAFE = re.compile(r"[^\w.=,+-]+")  # characters of values that names of folders do without
LONGEST_NAME = 150
STOPPED = (EXIT_AGAIN, EXIT_INTERRUPTED, -signal.SIGTERM, -signal.SIGINT)  # of a run that was stopped


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is varied.

    Attributes:
      config: a config, as `emu-jax train --config` takes it.
      fields: values by dotted field, as text; every combination of them is a run.
      seeds: values of train.seed; each combination has a run for each.
      fixed: overrides of all runs, as `--config.a.b=value`.
      splits: splits of the embedded images that each finished run is evaluated on, with commas between; "" evaluates
        none.
    """

    config: str
    folder: Path
    fields: Mapping[str, Sequence[str]]
    seeds: Sequence[int] = (0,)
    fixed: Sequence[str] = ()
    splits: str = ""

    def __post_init__(self):
        check_scheme(self.folder)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"seeds={' '.join(map(str, self.seeds))}; expected different numbers, each 0 or more")
        for field, values in self.fields.items():
            if not values or len(set(values)) < len(values):
                raise UserError(f"vary {field} {' '.join(values)}; expected different values")
            if field == "train.seed":
                raise UserError("vary train.seed: seeds has their values; vary other fields")
        for run in self.runs():
            load_config(self.config, run.overrides)  # refuses unknown fields and values of another type

    def runs(self) -> list[SweepRun]:
        """The runs: all seeds of a combination after one another; the last field changes fastest."""
        names = _short_names(self.fields)
        found = []
        for values in itertools.product(*self.fields.values()):
            varied = dict(zip(self.fields, values, strict=True))
            for seed in self.seeds:
                parts = [f"{names[field]}={value}" for field, value in varied.items()]
                name = UNSAFE.sub("_", ",".join(parts) or "base")[:LONGEST_NAME] + f"-{seed}"
                settings = [f"--config.{field}={value}" for field, value in varied.items()]
                overrides = (*self.fixed, *settings, f"--config.train.seed={seed}")
                found.append(SweepRun(name, self.folder / name, self.config, overrides, self.splits))
        folders = [run.name for run in found]
        if len(set(folders)) < len(folders):
            twice = next(name for name in folders if folders.count(name) > 1)
            raise UserError(f"two runs would be in {self.folder / twice}; shorten the values, or vary fewer fields")
        return found


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    workdir: Path
    config: str
    overrides: tuple[str, ...]
    splits: str

    @property
    def commands(self) -> list[list[str]]:
        """The arguments of `emu-jax`, one after another; each resumes what it has begun."""
        train = ["train", "--config", self.config, "--workdir", str(self.workdir), *self.overrides]
        if not self.splits:
            return [train]
        return [train, ["evaluate", "--model", str(self.workdir), "--split", self.splits]]

    @property
    def is_scored(self) -> bool:
        """Whether its evaluation has been done, so that nothing is left to do."""
        return bool(self.splits) and (self.workdir / "scores.json").is_file()

    def as_shell(self) -> str:
        """The commands as one line of a shell."""
        return " && ".join(shlex.join(["emu-jax", *command]) for command in self.commands)


def execute(
    runs: Sequence[SweepRun], *, devices: Sequence[str] = (), jobs: int = 1, tell: Callable[[str], None] = print
) -> list[SweepRun]:
    """Runs them, `jobs` at a time; a run that fails does not stop the others.

    Args:
      devices: values of CUDA_VISIBLE_DEVICES: each job sees one of them. `jobs` is then their number.
      tell: is given a line when a run begins, and when it ends.

    Returns:
      the runs that failed.

    Raises:
      TransientError: a run was asked to stop, and its state is saved; no other one was begun afterwards.
    """
    slots = list(devices) or [""] * jobs
    left, failed, stopped = list(runs), [], threading.Event()
    lock, running = threading.Lock(), set()

    def work(device: str) -> None:
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
        while True:
            with lock:
                if not left or stopped.is_set():
                    return
                run = left.pop(0)
            if run.is_scored:
                tell(f"{run.name}: is there")
                continue
            tell(f"{run.name}: {run.as_shell()}")
            code = 0
            for command in run.commands:
                with lock:
                    if stopped.is_set():
                        return
                    process = subprocess.Popen([sys.executable, "-m", "emu_jax.cli", *command], env=environment)
                    running.add(process)
                code = process.wait()
                running.discard(process)
                if code:
                    break
            with lock:
                if code in STOPPED:
                    stopped.set()
                elif code:
                    failed.append(run)
            tell(f"{run.name}: {f'exit code {code}' if code else 'done'}")

    def stop(*_: object) -> None:
        stopped.set()
        for process in list(running):
            process.terminate()  # a training saves its state

    before = signal.signal(signal.SIGTERM, stop) if threading.current_thread() is threading.main_thread() else None
    try:
        with ThreadPoolExecutor(len(slots)) as pool:
            for done in [pool.submit(work, device) for device in slots]:
                done.result()
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    if stopped.is_set():
        raise TransientError("stopped; run it again to resume")
    return failed


def _short_names(fields: Mapping[str, object]) -> dict[str, str]:
    """The shortest endings of dotted fields that tell them apart.

    >>> _short_names({"optimizer.ema_decay": 0, "model.llama.layers": 0, "model.vision.layers": 0})
    {'optimizer.ema_decay': 'ema_decay', 'model.llama.layers': 'llama.layers', 'model.vision.layers': 'vision.layers'}
    """

    def ending(field: str, parts: int) -> str:
        return ".".join(field.split(".")[-parts:])

    found = {}
    for field in fields:
        counts = range(1, field.count(".") + 2)
        others = [other for other in fields if other != field]
        parts = next((n for n in counts if all(ending(other, n) != ending(field, n) for other in others)), len(counts))
        found[field] = ending(field, parts)
    return found
