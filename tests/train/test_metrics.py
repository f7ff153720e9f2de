"""Where numbers go: rows of metrics.jsonl, TensorBoard, plots; norms by part for every kind of run."""

import io
import json
import math
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from tensorboardX.proto.summary_pb2 import Summary

from emu_jax.config import load_config
from emu_jax.observation import Observation
from emu_jax.train.metrics import PLOTS, MetricsWriter, Trace, lines_of, plot_metrics
from emu_jax.train.sections import tag
from emu_jax.train.trackers import TrackedRun
from emu_jax.workdir import read_metrics
from tests.train import line

NORMS = ("grad_norm", "update_norm", "param_norm")


def events(workdir: Path) -> dict[tuple[str, int], float]:
    """(tag, step) -> value, of every scalar that TensorBoard shows."""
    found = {}
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            at += length + 16
    return found


def test_losses_by_source_are_means_of_an_interval_and_norms_of_the_row_s_step(tmp_path):
    rows = [
        {"loss": 3.0, "grad_norm": 5.0, "grad_norm/vision": 4.0, "text_loss/rare": math.nan, "text_loss/often": 1.0},
        {"loss": 2.0, "grad_norm": 1.0, "grad_norm/vision": 0.5, "text_loss/rare": 7.0, "text_loss/often": 2.0},
    ]
    run = TrackedRun("a", "1", tmp_path, load_config(line.__file__), {"python": "3"})
    writer = MetricsWriter(run, start=0, total=2, losses=("text_loss",))
    for row in rows:
        writer.note({name: jnp.asarray(value) for name, value in row.items()})
    writer.hold(2, {name: jnp.asarray(value) for name, value in rows[-1].items()}, {"step_ms": 1.5})
    writer.close()
    expected = {"step": 2, "loss": 2.0, "grad_norm": 1.0, "grad_norm/vision": 0.5, "step_ms": 1.5}
    expected |= {"text_loss/rare": 7.0, "text_loss/often": 1.5}
    assert read_metrics(tmp_path / "metrics.jsonl") == [expected]
    about = [f"{name}/text_summary" for name in ("config", "start")]
    about += [f"_hparams_/{name}" for name in ("experiment", "session_start_info", "session_end_info")]
    numbers = {(tag(name), 2): value for name, value in expected.items() if name != "step"}
    assert events(tmp_path) == {(name, 0): 0.0 for name in about} | numbers


def summaries(workdir: Path) -> dict[str, Summary.Value]:
    """Whatever TensorBoard shows, by tag, the last of each."""
    (path,) = (workdir / "tensorboard").iterdir()
    data, at, found = path.read_bytes(), 0, {}
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        found |= {value.tag: value for value in Event.FromString(data[at + 12 : at + 12 + length]).summary.value}
        at += length + 16
    return found


def test_tensorboard_has_images_histograms_and_hyperparameters(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    seen = Observation({}, {"sheet": pixels}, {"ranks": np.array([0.0, 0.0, 3.0])})
    run = TrackedRun("a", "1", tmp_path, load_config(line.__file__), {})
    writer = MetricsWriter(run, start=0, total=1, losses=())
    writer.add(1, {"loss": jnp.asarray(1.0)}, {}, seen)
    writer.close()
    found = summaries(tmp_path)
    stored = Image.open(io.BytesIO(found[tag("sheet")].image.encoded_image_string))
    np.testing.assert_array_equal(np.asarray(stored), pixels)
    assert (found[tag("ranks")].histo.num, found[tag("ranks")].histo.sum) == (3, 3.0)
    session = HParamsPluginData.FromString(found["_hparams_/session_start_info"].metadata.plugin_data.content)
    parameters = session.session_start_info.hparams
    assert parameters["optimizer.b1"].number_value == run.config.optimizer.b1
    assert parameters["objective"].string_value == json.dumps(run.config.objective)


RUNS = {
    "pretrain": ("trained", "", {"vision", "causal", "llama"}),
    "instruct": ("instructed", "", {"llama"}),
    "vae": ("drawing", "vae", {"vae"}),
    "decoder": ("drawing", "unet", {"unet"}),
}


@pytest.mark.parametrize("kind", RUNS)
def test_norms_by_part_of_every_kind_of_run(request, kind):
    fixture, folder, parts = RUNS[kind]
    workdir = request.getfixturevalue(fixture) / folder
    shown = events(workdir)
    for row in read_metrics(workdir / "metrics.jsonl"):
        for name in NORMS:
            found = {metric.partition("/")[2]: value for metric, value in row.items() if metric.startswith(f"{name}/")}
            print(row["step"], name, found)
            assert set(found) == parts
            assert all(value > 0 for value in found.values())
            for part, value in found.items():
                assert shown[tag(f"{name}/{part}"), row["step"]] == pytest.approx(value, rel=1e-6)
        total = np.linalg.norm([row[f"grad_norm/{part}"] for part in parts])
        assert row["grad_norm"] == pytest.approx(total, rel=1e-5)
        assert {name for name in row if name.startswith("learning_rate/")} == {
            f"learning_rate/{part}" for part in parts
        }
        assert ("ema_decay" in row) == (kind == "decoder")


def test_plots_show_the_whole_and_its_parts(trained, tmp_path):
    known = {name for row in read_metrics(trained / "metrics.jsonl") for name in row}
    for name in PLOTS["optimisation"][:4]:
        parts = [f"{name}/{part}" for part in ("causal", "llama", "vision")]
        assert lines_of(name, known) == (["grad_norm", *parts] if name == "grad_norm" else parts)
    (tmp_path / "metrics.jsonl").write_bytes((trained / "metrics.jsonl").read_bytes())
    assert tmp_path / "plots" / "optimisation.png" in plot_metrics(tmp_path, {"losses": ("text_loss",)})
    assert (tmp_path / "plots" / "losses.png").exists()


def test_a_running_run_is_traced_on_request(tmp_path):
    """The file is removed, and says how many of the next steps; without a number there are three."""
    request = tmp_path / "profile.request"
    for text, steps in (("2\n", (6, 7)), ("please", (6, 7, 8))):
        request.write_text(text)
        trace = Trace(tmp_path / text.strip(), range(0))
        (tmp_path / text.strip()).mkdir()
        trace.look_for_request(4)
        assert request.exists(), "it is another run's"
        request.rename(tmp_path / text.strip() / request.name)
        trace.look_for_request(5)
        assert not (tmp_path / text.strip() / request.name).exists()
        running = []
        for step in range(6, 10):
            trace.begin(step)
            running += [step] if trace._running else []
            trace.end(step, jnp.zeros(()))
        assert tuple(running) == steps
        assert list((tmp_path / text.strip() / "profile").rglob("*.xplane.pb"))
