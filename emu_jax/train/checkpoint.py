"""A run's checkpoints: saved asynchronously and atomically, the newest N kept, and restored to resume the run.

The folders are described in `checkpoints/store.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from emu_jax.buckets import is_transient
from emu_jax.checkpoints.store import (
    FOLDER,
    check_digests,
    check_leaves,
    digests,
    named_leaves,
    pack_tokenizer,
    read_meta,
    unreadable,
)
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError
from emu_jax.storage import Path, absolute
from emu_jax.train.state import TrainState


def _items(state: TrainState) -> dict[str, Any]:
    """The state as the items of a checkpoint, which are stored separately."""
    items = {
        "params": state.params,
        "statistics": state.statistics,
        "optimizer": {"step": state.step, "total_steps": state.total_steps, "opt_state": state.opt_state},
    }
    return {name: item for name, item in items.items() if jax.tree.leaves(item)}  # Orbax refuses empty items


class Checkpoints:
    """The checkpoints of one work directory. Leaving its `with` block waits for unfinished saves."""

    def __init__(self, workdir: Path, *, keep: int):
        self._folder = absolute(workdir) / FOLDER
        self._manager = ocp.CheckpointManager(
            self._folder,
            # A killed save leaves a temporary folder behind, which is removed at the next start.
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
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

        Every process calls it and writes its own part.

        Args:
          iterator: the position in the data, the same on all processes.
          holds: what the parameters are; inference and other runs ask for it.
        """
        items = _items(state)
        meta = {
            "holds": holds,
            "config": json.loads(config_json),
            "tokenizer": pack_tokenizer(tokenizer),
            "iterator": dict(iterator),
            "leaves": {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in named_leaves(items).items()},
            "digests": digests(items),
        }
        arguments = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        self._manager.save(int(state.step), args=ocp.args.Composite(**arguments, meta=ocp.args.JsonSave(meta)))

    def wait(self) -> None:
        """Returns once the last save is on disk; raises the error if it failed."""
        self._manager.wait_until_finished()

    def restore(self, target: TrainState, tokenizer: Tokenizer | None) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint in the shapes and shardings of `target`, and the iterator's state.

        Raises:
          UserError: it has other shapes or another tokenizer, or is damaged.
        """
        step = self._manager.latest_step()
        folder = self._folder / str(step)
        meta = read_meta(folder)
        items = _items(target)
        check_leaves(folder, meta["leaves"], items)
        saved, own = (packed["fingerprint"] for packed in (meta["tokenizer"], pack_tokenizer(tokenizer)))
        if saved != own:
            raise UserError(
                f"{folder}: the checkpoint's tokenizer has fingerprint {saved[:12]}, this "
                f"run's has {own[:12]}; use the same config.tokenizer, or a new work directory"
            )
        arguments = {name: ocp.args.StandardRestore(item) for name, item in items.items()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        except Exception as error:  # Orbax raises plain `Exception` for some damage, ValueError or OSError for other
            raise unreadable(folder, error) from error
        check_digests(folder, meta, {name: restored[name] for name in items})
        optimizer = restored["optimizer"]
        state = TrainState(
            optimizer["step"],
            optimizer["total_steps"],
            restored["params"],
            optimizer["opt_state"],
            restored["statistics"] if "statistics" in items else {},
        )
        return state, meta["iterator"]

    def close(self) -> None:
        """Waits for unfinished saves, which may fail only now (on a full disk), and stops."""
        self.wait()
        self._manager.close()
