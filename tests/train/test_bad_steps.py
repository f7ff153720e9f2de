"""A bad step changes nothing and is counted; too many in a row stop a run, whose checkpoints stay good."""

import dataclasses
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax.checkpoints.store import newest_folder, read_meta
from emu_jax.cli import main
from emu_jax.config import load_config
from emu_jax.errors import EXIT_AGAIN, EXIT_DIVERGED
from emu_jax.sharding import make_mesh
from emu_jax.train import loop
from emu_jax.train.bad_step_report import documents, what_broke
from emu_jax.train.bad_steps import WINDOW
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.state import TrainState, create_state
from emu_jax.workdir import read_metrics
from tests.train import line
from tests.train.tasks import compiled_step
from tests.train.test_distributed import finish, free_port, message
from tests.train.test_resume import ROOT

RATE = "--config.optimizer.learning_rate.slope=1e30"


def batch_of(*bad: int) -> dict[str, jax.Array]:
    rows = line.Points(bad).examples([(index, np.random.default_rng(0)) for index in range(line.ROWS)])
    return {name: jnp.asarray([row[name] for row in rows]) for name in rows[0]}


def make_step(*overrides: str):
    """The compiled step and a fresh state."""
    config = load_config(line.__file__, list(overrides))
    task, optimizer = line.Line(config), OptimizerConfig.from_dict(config.optimizer)
    state = create_state(task, optimizer, 0, make_mesh({}, jax.devices()[:1]))
    state = dataclasses.replace(state, total_steps=jnp.full_like(state.total_steps, 1000))
    return compiled_step(task, optimizer, state, batch_of()), state


def values(state: TrainState) -> list[bytes]:
    """All that a bad step must not change."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((state.params, state.opt_state, state.statistics))]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("cause", ["a document", "a weight", "a rate"])
def test_a_bad_step_changes_nothing(cause, count):
    """An infinite height in one document (of four micro-batches in the third), a weight, a learning rate."""
    step, state = make_step(f"--config.optimizer.accumulate_steps={count}", *([RATE] if cause == "a rate" else []))
    if cause == "a weight":
        state.params["slope"]["kernel"] = state.params["slope"]["kernel"].at[0].set(jnp.nan)
    if cause == "a document":
        state, metrics = step(state, batch_of())
        assert float(metrics["bad_steps"]) == 0.0
    before, started = values(state), int(state.step)
    for number in (1, 2):
        state, metrics = step(state, batch_of(2) if cause == "a document" else batch_of())
        assert values(state) == before
        assert int(state.step) == started + number
        assert float(metrics["bad_steps"]) == float(metrics["bad_steps_in_a_row"]) == number
    broken = {
        "a document": "loss=inf",
        "a weight": "param_norm/slope=nan",
        "a rate": "learning_rate/slope=4e+28 overflows",
    }[cause]
    assert broken in what_broke(metrics, {})
    if cause == "a document":
        state, metrics = step(state, batch_of())
        assert values(state) != before
        assert (float(metrics["bad_steps"]), float(metrics["bad_steps_in_a_row"])) == (2.0, 0.0)


def test_spikes_are_skipped_where_asked_for():
    """A height that makes a gradient many times its median: skipped once there are norms to judge by."""
    plain, _ = make_step()
    step, state = make_step("--config.optimizer.skip_spikes=8.0")
    spike = batch_of() | {"y": batch_of()["y"] * 1000}
    state, metrics = step(state, spike)
    assert float(metrics["bad_steps"]) == 0.0, "no norms yet"
    for _ in range(WINDOW):
        state, metrics = step(state, batch_of())
    before = values(state)
    state, metrics = step(state, spike)
    assert float(metrics["grad_norm_ratio"]) > 8 and float(metrics["bad_steps"]) == 1.0
    assert values(state) == before
    assert "times its running median, grad_norm/" in what_broke(metrics, {})
    state, metrics = step(state, batch_of())
    assert values(state) != before and float(metrics["bad_steps_in_a_row"]) == 0.0

    _, state = make_step()
    _, metrics = plain(state, spike)
    assert float(metrics["bad_steps"]) == 0.0 and "norms" not in state.bad_steps


def test_a_dropped_step_leaves_the_state_and_is_repeated():
    step, state = make_step("--config.optimizer.accumulate_steps=4")
    expected, _ = step(jax.tree.map(jnp.copy, state), batch_of())
    before, asked = values(state), iter([False, True])
    state, metrics = step(state, batch_of(3), lambda: next(asked))  # what it had summed up must not remain
    assert metrics is None and values(state) == before and int(state.step) == 0
    state, metrics = step(state, batch_of())
    assert values(state) == values(expected) and float(metrics["bad_steps"]) == 0.0


def test_compile_only_counts_what_is_kept_between_micro_batches(tmp_path, capsys):
    """The sums of the gradients, of the loss, its metric and the statistics: five numbers of 4 bytes more."""
    sizes = []
    for count in (1, 4):
        step, _ = make_step(f"--config.optimizer.accumulate_steps={count}")
        sizes.append([executable.memory_analysis().argument_size_in_bytes for executable in step.executables])
    (whole,), (adding, updating) = sizes
    batch = sum(leaf.nbytes for leaf in batch_of().values())
    assert adding == whole + 5 * 4 + 4 and updating == adding - batch - 4
    command = ["train", "--config", line.__file__, "--workdir", str(tmp_path / "run"), "--compile-only"]
    assert main([*command, "--config.optimizer.accumulate_steps=4"]) == 0
    assert capsys.readouterr().out.startswith("compiled the step in ")


# ---- runs ------------------------------------------------------------------------------------------------------------


def train(workdir, *overrides: str) -> int:
    return main(["train", "--config", line.__file__, "--workdir", str(workdir), *overrides])


def saved(workdir) -> dict:
    return read_meta(newest_folder(workdir))


def test_too_many_in_a_row_stop_the_run(tmp_path, capsys):
    bad = tuple(range(0, line.POINTS, 2))
    assert train(tmp_path / "run", f"--config.bad={bad}") == EXIT_DIVERGED == 70
    error = capsys.readouterr().err
    message = error.splitlines()[-1]
    assert message.startswith(
        "emu-jax train: 3 bad steps in a row, the last one is step 3: at step 1 grad_norm of all parts broke at once, "
        "with loss=inf; they changed nothing, and nothing is saved since; documents of these rows: points: point-"
    )
    assert message.count("point-") == 24 == 3 * line.ROWS
    assert newest_folder(tmp_path / "run").name == "0"
    assert [row["bad_steps"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")][:3] == [1, 2, 3]
    assert "step 2 changes nothing: " in error


def test_a_part_with_an_absurd_rate_is_named_and_nothing_is_saved_meanwhile(tmp_path, capsys):
    """With room for more bad steps than a checkpoint's interval."""
    settings = (RATE, "--config.train.max_bad_steps=6")
    assert train(tmp_path / "run", *settings) == 70
    message = capsys.readouterr().err.splitlines()[-1]
    assert (
        "6 bad steps in a row, the last one is step 6: at step 1 learning_rate/slope=9.99581e+29 overflows" in message
    )
    assert newest_folder(tmp_path / "run").name == "0"


@pytest.mark.slow
def test_a_checkpoint_with_a_spoilt_state_is_set_aside(tmp_path, capsys):
    """A finite rate, whose update is finite and whose next loss is not."""
    settings = ("--config.train.checkpoint_every=1", "--config.optimizer.clip_norm=0")
    assert train(tmp_path / "run", "--config.train.steps=4", *settings) == 0
    change = ("--change", "config.train.steps=16", "--change", "config.optimizer.learning_rate.slope=1.8e19")
    capsys.readouterr()
    assert train(tmp_path / "run", *settings, *change) == 70
    message = capsys.readouterr().err.splitlines()[-1]
    print(message)
    spoilt = tmp_path / "run" / "checkpoints" / "5"
    assert "3 bad steps in a row, the last one is step 8: at step 6 " in message
    assert message.endswith(
        f"; {spoilt}: the first step after this checkpoint was bad, so its state may be spoilt; it is moved to "
        f"{tmp_path / 'run' / 'corrupt' / '5'}"
    )
    assert newest_folder(tmp_path / "run").name == "4" and (tmp_path / "run" / "corrupt" / "5" / "meta").is_dir()
    sane = (*change[:3], "config.optimizer.learning_rate.slope=0.1")
    assert train(tmp_path / "run", *settings, *sane) == 0
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["bad_steps"] == 0


def test_a_rare_bad_document_is_named_and_the_run_goes_on(tmp_path, capsys):
    assert train(tmp_path / "run", "--config.bad=(5,)") == 0
    lines = [text for text in capsys.readouterr().err.splitlines() if "changes nothing" in text]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["bad_steps"] == len(lines) == 2, "16 steps of 8 rows read 64 points twice"
    assert all("point-5" in text for text in lines)
    assert np.isfinite(rows[-1]["loss"] if rows[-1]["bad_steps_in_a_row"] == 0 else rows[-2]["loss"])


def test_the_last_step_is_judged_before_it_is_saved(tmp_path, capsys):
    assert train(tmp_path / "run", RATE, "--config.train.steps=3") == 70
    assert newest_folder(tmp_path / "run").name == "0" and "bad steps in a row" in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_is_heard_between_micro_batches(tmp_path, capsys, monkeypatch):
    """It drops the step that it has begun, and the run resumes bitwise."""

    class Interval(loop.Interval):
        _steps = 0

        def next_batch(self, batches):
            self._steps += 1
            if self._steps == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().next_batch(batches)

    settings = ("--config.optimizer.accumulate_steps=4",)
    assert train(tmp_path / "whole", *settings) == 0
    with monkeypatch.context() as patched:
        patched.setattr(loop, "Interval", Interval)
        assert train(tmp_path / "run", *settings) == EXIT_AGAIN
    assert "asked to stop after step 6 of 16: saved" in capsys.readouterr().err
    assert newest_folder(tmp_path / "run").name == "6"
    assert train(tmp_path / "run", *settings) == 0
    one, other = saved(tmp_path / "whole"), saved(tmp_path / "run")
    assert one["digests"] == other["digests"] and one["iterator"] == other["iterator"]


@pytest.mark.slow
def test_all_processes_stop_and_name_the_documents_of_all(tmp_path):
    """Of two processes, the first one reads the first four rows of a batch, the second one the others."""
    bad = tuple(range(0, line.POINTS, 2))
    address, started = f"127.0.0.1:{free_port()}", []
    command = [sys.executable, "-m", "emu_jax.cli", "train", "--config", line.__file__]
    for process in "01":
        job = {"EMU_JAX_COORDINATOR": address, "EMU_JAX_PROCESSES": "2", "EMU_JAX_PROCESS": process}
        started.append(
            subprocess.Popen(
                [*command, "--workdir", str(tmp_path / "run"), f"--config.bad={bad}"],
                cwd=ROOT,
                env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | job,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    done = finish(started)
    assert [code for code, _ in done] == [EXIT_DIVERGED] * 2, "\n".join(error for _, error in done)
    first, second = (message(error) for _, error in done)
    assert first == second and "3 bad steps in a row" in first
    assert first.count("point-") == 24 == 3 * line.ROWS
    assert newest_folder(tmp_path / "run").name == "0"


def test_a_suspect_is_named_where_all_gradients_break():
    good = {"param_norm/a": 2.0, "param_norm/b": 3.0, "update_norm/a": 0.1, "update_norm/b": 3e9}
    bad = {"loss": np.nan, "grad_norm": np.nan, "param_norm/a": 2.0, "param_norm/b": 3e9}
    bad |= {"grad_norm/a": np.nan, "grad_norm/b": np.nan}
    assert what_broke(bad, good) == (
        "grad_norm of all parts broke at once, with loss=nan; the last good step changed b by 1e+09 times its norm"
    )
    assert what_broke(bad, good | {"update_norm/b": 0.01}).endswith("with loss=nan")


def test_a_line_names_some_documents_of_every_source():
    many = [str(n) for n in range(99)]
    assert documents({"web": many, "chats": ["x", "y"]}) == f"web: {', '.join(many[:12])}, …; chats: x, y"
