"""A run's checkpoints: saved asynchronously and atomically, rotated, and restored to resume the run.

The folders are described in `checkpoints/store.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from emu_jax.buckets import is_transient
from emu_jax.checkpoints.digests import named_leaves, summaries
from emu_jax.checkpoints.store import (
    FOLDER,
    CorruptCheckpoint,
    check_digests,
    check_leaves,
    disk_error,
    pack_tokenizer,
    read_meta,
    seal_meta,
    unreadable,
)
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError
from emu_jax.storage import Path, absolute, move_folder
from emu_jax.train import distributed
from emu_jax.train.state import TrainState

# A work directory's folder to which corrupt checkpoints are moved. It is not among the checkpoints: in a bucket Orbax
# takes any folder there for a save that was killed, and removes it.
CORRUPT = "corrupt"
NAMED = 5  # leaves that an error names
UNFILLED = "optimizer/bad_steps/"  # leaves that are NaN until there is something to put there (`bad_steps.py`)


def _items(state: TrainState) -> dict[str, Any]:
    """The state as the items of a checkpoint, which are stored separately."""
    items = {
        "params": state.params,
        "statistics": state.statistics,
        "optimizer": {
            "step": state.step,
            "total_steps": state.total_steps,
            "opt_state": state.opt_state,
            "bad_steps": state.bad_steps,
        },
    }
    return {name: item for name, item in items.items() if jax.tree.leaves(item)}  # Orbax refuses empty items


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Which checkpoints are kept: the newest ones, for ever those of every so many steps, and others by name.

    Attributes:
      newest: number of newest checkpoints; 2 or more, since only the step after the last one shows whether it is good.
      every: interval in steps; 0 keeps none for ever. Step 0 is the first start, which init or the seed gives again.
      others: the steps of those that are kept beside them, asked for at every save.
    """

    newest: int
    every: int = 0
    others: Callable[[], Collection[int]] = tuple

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's protocol of a preservation policy."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(sorted(steps)[-self.newest :]) | set(self.others())
        if self.every:
            kept |= {step for step in steps if step > 0 and step % self.every == 0}
        return [step in kept for step in steps]


class SaveTimer:
    """Whether a checkpoint is due by time. The processes ask at the same steps and take the clock of process 0.

    Args:
      seconds: longest time between two checkpoints; 0: none is ever due.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._saved = self._asked = time.monotonic()

    def restart(self) -> None:
        """A checkpoint was saved."""
        self._saved = time.monotonic()

    def due(self) -> bool:
        """Whether at the next question, as much later as this one is than the last, it would be too late."""
        if not self._seconds:
            return False
        now = time.monotonic()
        interval, self._asked = now - self._asked, now
        return bool(distributed.broadcast_from_process_0(now + interval - self._saved > self._seconds))


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a run resumes from.

    Attributes:
      meta: the checkpoint's metadata (`store.read_meta`).
      corrupt: newer checkpoints that could not be restored: step -> what is wrong.
    """

    step: int
    state: TrainState
    meta: dict[str, Any]
    corrupt: dict[int, str]


class Checkpoints:
    """The checkpoints of one work directory. Leaving its `with` block waits for unfinished saves.

    Args:
      timeout: seconds after which a save that has not ended is an error.
    """

    def __init__(self, workdir: Path, rotation: Rotation, *, timeout: float):
        self._folder = absolute(workdir) / FOLDER
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=rotation,
                # A killed save leaves a temporary folder behind, which is removed at the next start.
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(timeout_secs=max(1, int(timeout))),
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        # After an error in one process of several the others never join the save, and without storage it does not end
        # for a long time: nobody waits for it then.
        if kind is None or (
            jax.process_count() == 1 and not any(isinstance(e, BaseException) and is_transient(e) for e in error)
        ):
            self.close()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return list(self._manager.all_steps())

    def doubt(self, step: int) -> str:
        """Sets a checkpoint aside if the run has an older one: the first step after it was bad; every process calls it.

        Returns:
          a line about it.
        """
        self.wait()
        if min(self._manager.all_steps()) == step:
            return f"{self._folder / str(step)}, saved before them, is the only checkpoint; it may hold a spoilt state"
        return self.set_aside({step: "the first step after this checkpoint was bad, so its state may be spoilt"})[0]

    def save(
        self,
        state: TrainState,
        config_json: str,
        tokenizer: Tokenizer | None,
        iterator: Mapping[str, Any],
        *,
        holds: str,
    ) -> None:
        """Starts an asynchronous save once the last one has ended; the state may be donated to the next step.

        Every process calls it and writes its own part. An error of the last save is raised here.

        Args:
          iterator: the position in the data, the same on all processes.
          holds: what the parameters are; inference and other runs ask for it.

        Raises:
          distributed.Diverged: a leaf is not finite; nothing is written.
        """
        items = _items(state)
        digests, infinite = summaries(items)
        if infinite := [name for name in infinite if not name.startswith(UNFILLED)]:
            self.wait()
            raise distributed.Diverged(_not_finite(int(state.step), infinite, self.latest_step()))
        meta = {
            "holds": holds,
            "config": json.loads(config_json),
            "tokenizer": pack_tokenizer(tokenizer),
            "iterator": dict(iterator),
            "leaves": {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in named_leaves(items).items()},
            "digests": digests,
        }
        arguments: dict[str, Any] = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        arguments["meta"] = ocp.args.JsonSave(seal_meta(meta))
        with _disk_errors(self._folder):
            self._manager.save(int(state.step), args=ocp.args.Composite(**arguments))

    def wait(self) -> None:
        """Returns once the last save is on disk; raises the error if it failed."""
        with _disk_errors(self._folder):
            self._manager.wait_until_finished()

    def restore(self, target: TrainState, tokenizer: Tokenizer | None) -> Restored:
        """The newest checkpoint that is not corrupt, in the shapes and shardings of `target`; changes no files.

        All processes restore the same one: it is corrupt for all if it is for one.

        Raises:
          UserError: it has other shapes or another tokenizer, or every checkpoint is corrupt.
        """
        corrupt: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, meta = self._restore(self._folder / str(step), target, tokenizer)
            except CorruptCheckpoint as error:
                corrupt[step] = error.what
            else:
                return Restored(step, state, meta, corrupt)
        newest = max(corrupt)
        raise UserError(
            f"{self._folder}: all {len(corrupt)} checkpoints are corrupt, the newest because {corrupt[newest]}; copy "
            "one back from a backup, or use a new work directory"
        )

    def _restore(
        self, folder: Path, target: TrainState, tokenizer: Tokenizer | None
    ) -> tuple[TrainState, dict[str, Any]]:
        items = _items(target)
        with _together(folder):
            meta = read_meta(folder)
        check_leaves(folder, meta["leaves"], items)
        saved, own = (packed["fingerprint"] for packed in (meta["tokenizer"], pack_tokenizer(tokenizer)))
        if saved != own:
            raise UserError(
                f"{folder}: the checkpoint's tokenizer has fingerprint {saved[:12]}, this "
                f"run's has {own[:12]}; use the same config.tokenizer, or a new work directory"
            )
        with _together(folder):
            try:
                restored = {name: _read(folder / name, item) for name, item in items.items()}
            except Exception as error:  # for some damage a plain one, for other ValueError or OSError
                raise unreadable(folder, error) from error
        check_digests(folder, meta, restored)
        optimizer = restored["optimizer"]
        state = TrainState(
            optimizer["step"],
            optimizer["total_steps"],
            restored["params"],
            optimizer["opt_state"],
            restored["statistics"] if "statistics" in items else {},
            optimizer["bad_steps"],
        )
        return state, meta

    def set_aside(self, bad: Mapping[int, str]) -> list[str]:
        """Moves checkpoints to the work directory's `corrupt`, where nothing looks; every process calls it.

        Args:
          bad: their steps, and what is wrong with each, as a sentence.

        Returns:
          a line for each.
        """
        lines = []
        for step, what in sorted(bad.items()):
            folder, number = self._folder / str(step), 1
            while (to := self._folder.parent / CORRUPT / (f"{step}.{number}" if number > 1 else f"{step}")).exists():
                number += 1
            lines.append(f"{folder}: {what}; it is moved to {to}")
            if jax.process_index() == 0:
                move_folder(folder, to)
        if bad:
            distributed.broadcast_from_process_0(0)  # nobody looks before the folders are moved
            self._manager.reload()
        return lines

    def close(self) -> None:
        """Waits for unfinished saves, which may fail only now (on a full disk), and stops."""
        self.wait()
        self._manager.close()


def _read(folder: Path, item: Any) -> Any:
    """One item of a checkpoint. Without Orbax's manager, whose barrier waits for a process that finds damage."""
    handler = ocp.StandardCheckpointHandler()
    try:
        return handler.restore(epath.Path(folder), args=ocp.args.StandardRestore(item))
    finally:
        handler.close()


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Raises what a full or broken disk did to a save as the OSError that it was, of the folder of checkpoints."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(folder)
        raise
    except ValueError as error:
        if (found := disk_error(folder, error)) is None:
            raise
        raise found from error


@contextlib.contextmanager
def _together(folder: Path) -> Iterator[None]:
    """Raises the CorruptCheckpoint of one process on every process."""
    found = None
    try:
        yield
    except CorruptCheckpoint as error:
        found = error
    reasons = distributed.merge_across_processes({"what": found.what} if found else {})
    if reasons:
        raise CorruptCheckpoint(folder, reasons["what"]) from found


def _not_finite(step: int, leaves: Sequence[str], newest: int | None) -> str:
    more = f" and {len(leaves) - NAMED} more" if len(leaves) > NAMED else ""
    if step == 0:
        return (
            f"step 0: the state is not finite in {', '.join(leaves[:NAMED])}{more}; it is not saved: name weights in "
            "config.init that are finite"
        )
    last = "there is no checkpoint" if newest is None else f"the newest checkpoint is that of step {newest}"
    return (
        f"step {step}: the state is not finite in {', '.join(leaves[:NAMED])}{more}; it is not saved, and {last}: "
        "resume with a lower learning rate (change), or without the data that did it (skip_windows)"
    )
