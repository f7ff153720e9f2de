"""The real lmms-eval runs `emu-mini` by its command, on local tasks: the answers are those of our own harness.

`lmms-eval` requires torchvision, so no extra of the tests has it. `tests/README.md` has the command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import yaml

from emu_jax import Emu
from emu_jax.cli import main
from emu_jax.data.system_messages import IMAGE_SYSTEM, VIDEO_SYSTEM
from emu_jax.errors import UserError
from emu_jax.evaluate.benchmarks.registry import find_benchmark
from emu_jax.evaluate.question import Question
from emu_jax.generate.messages import Video, read_video
from tests.pages import ROOT
from tests.videos import write_video

ABSENT = "lmms-eval is not installed: it requires torchvision, which brings gigabytes of CUDA; see tests/README.md"
pytestmark = pytest.mark.slow

TUNED, BASE = "emu-mini/chat", "emu-mini"
HEAD = {"dataset_path": "parquet", "test_split": "test", "doc_to_text": "question", "doc_to_target": "answer"}
GREEDY = {"max_new_tokens": 24, "until": [], "do_sample": False}  # as prompts.GREEDY
EXACT = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]


@pytest.fixture(scope="module", autouse=True)
def package():
    """lmms-eval, which must find our entry point."""
    yield pytest.importorskip("lmms_eval.evaluator", reason=ABSENT)


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return find_benchmark("fluent_qa").read(Path())


@pytest.fixture(scope="module")
def shown(questions, tmp_path_factory) -> list[dict]:
    """The benchmark's questions as rows, and one question about a video for each of the first four images."""
    folder, rows = tmp_path_factory.mktemp("videos"), []
    for number, question in enumerate(questions):
        image = PIL.Image.fromarray(question.images[0])  # which is stored as PNG
        rows.append({"id": question.id, "image": image, "question": question.text, "answer": question.answers[0]})
        if number < 4:
            pixels = np.ascontiguousarray(question.images[0])
            write_video(folder / f"{number}.mp4", [np.roll(pixels, 4 * step, axis=1) for step in range(12)])
            rows[-1]["video"] = str(folder / f"{number}.mp4")
    return rows


@pytest.fixture(scope="module")
def tasks(shown, tmp_path_factory) -> Path:
    """Tasks with local data: the benchmark, its yes-or-no questions as a choice, and videos."""
    datasets, folder = pytest.importorskip("datasets"), tmp_path_factory.mktemp("tasks")

    def write(name: str, rows: list[dict], columns: tuple[str, ...], **task) -> None:
        features = datasets.Features({column: datasets.Value("string") for column in columns})
        if "image" in columns:
            features["image"] = datasets.Image()
        kept = [{column: row[column] for column in columns} for row in rows]
        datasets.Dataset.from_list(kept, features=features).to_parquet(folder / f"{name}.parquet")
        files = {"data_files": {"test": str(folder / f"{name}.parquet")}}
        text = yaml.safe_dump({"task": name, "dataset_kwargs": files, **HEAD, **task})
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")

    columns = ("id", "image", "question", "answer")
    generate = {"output_type": "generate_until", "generation_kwargs": GREEDY, "metric_list": EXACT}
    write("fluent_qa", shown, columns, doc_to_visual="image", **generate)
    videos = [row for row in shown if "video" in row]
    write("fluent_video", videos, ("id", "video", "question", "answer"), doc_to_visual="video", **generate)
    choices = [row for row in shown if row["answer"] in ("yes", "no")]
    accuracy = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "exact_match")]
    choose = {"output_type": "multiple_choice", "doc_to_choice": ["yes", "no"], "metric_list": accuracy}
    write("fluent_choice", choices, columns, doc_to_visual="image", **choose)
    return folder


def run(tasks: Path, names: str, out: Path, model: str, *more: str, launcher: tuple[str, ...] = ()) -> dict[str, list]:
    """The samples that lmms-eval logs, by task, in the questions' order; its results are beside them in `out`."""
    command = [sys.executable, *launcher, "-m", "lmms_eval", "--model", "emu_jax", "--model_args", model]
    options = ["--tasks", names, "--include_path", str(tasks), "--batch_size", "16", "--log_samples"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    offline = {"HF_HOME": str(tasks / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [*command, *options, "--output_path", str(out), *more],
        env=os.environ | offline,
        capture_output=True,
        text=True,
        check=False,
    )
    found = {}
    for name in names.split(","):
        files = list(out.glob(f"*/*_samples_{name}.jsonl"))
        assert len(files) == 1, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        found[name] = sorted(map(json.loads, files[0].read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return found


def results(out: Path, name: str) -> dict[str, float]:
    (file,) = out.glob("*/*_results.json")
    return json.loads(file.read_text())["results"][name]


@pytest.fixture(scope="module")
def ours(tmp_path_factory, questions):
    """Predictions and figures of `emu-jax evaluate`, by model."""

    def evaluate(model: str) -> tuple[list[str], dict]:
        out = tmp_path_factory.mktemp("ours")
        assert main(["evaluate", "--model", model, "--benchmark", "fluent_qa", "--batch", "16", "--out", str(out)]) == 0
        lines = (out / "fluent_qa-heldout_combinations-0shot" / "0-of-1.jsonl").read_text().splitlines()[1:]
        said = {line["id"]: line["prediction"] for line in map(json.loads, lines)}
        figures = json.loads((out / "fluent_qa-heldout_combinations-0shot" / "scores.json").read_text())["figures"]
        return [said[question.id] for question in questions], figures

    return {model: evaluate(model) for model in (TUNED, BASE)}


def answers(samples: list[dict]) -> list[str]:
    return [sample["filtered_resps"].strip() for sample in samples]


def test_lmms_eval_finds_the_model():
    assert [entry.name for entry in entry_points(group="lmms_eval.models")] == ["emu_jax"], "pip install -e . again"
    from lmms_eval.models import get_model

    assert get_model("emu_jax").__name__ == "ChatEmu"
    assert get_model("emu_jax", force_simple=True).__name__ == "SimpleEmu"


@pytest.mark.parametrize(
    ("model", "more"),
    [(TUNED, ()), (TUNED, ("--force_simple",)), (BASE, ())],
    ids=["tuned", "tuned, simple", "pretrained"],
)
def test_the_answers_are_our_harnesss_one_for_one(model, more, tasks, ours, questions, tmp_path):
    samples = run(tasks, "fluent_qa", tmp_path, f"model={model}", *more)["fluent_qa"]
    predictions, figures = ours[model]
    assert len(samples) == len(questions) == 280
    assert answers(samples) == predictions
    right = sum(
        figure["value"] * sum(f"exactly right ({question.kind})" == name for question in questions)
        for name, figure in figures.items()
    )
    assert results(tmp_path, "fluent_qa")["exact_match,none"] == pytest.approx(right / 280)


def test_two_processes_share_the_questions(tasks, ours, tmp_path):
    """An odd number: the second process has one fewer, and answers one twice, which is not counted."""
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29511")
    out = run(tasks, "fluent_qa", tmp_path, f"model={TUNED}", "--limit=33", launcher=launcher)
    assert [sample["doc_id"] for sample in out["fluent_qa"]] == list(range(33))
    assert answers(out["fluent_qa"]) == ours[TUNED][0][:33]
    assert results(tmp_path, "fluent_qa")["exact_match,none"] == pytest.approx(
        np.mean([said == sample["target"] for said, sample in zip(ours[TUNED][0], out["fluent_qa"], strict=False)])
    )


def test_a_choice_is_the_candidate_with_the_lowest_loss(tasks, questions, tmp_path):
    samples = run(tasks, "fluent_choice", tmp_path, f"model={TUNED}", "--force_simple", "--limit=32")["fluent_choice"]
    asked = [question for question in questions if question.answers[0] in ("yes", "no")][:32]
    emu = Emu.load(TUNED)
    parts = [[f"{IMAGE_SYSTEM} [USER]: ", q.images[0], f" {q.text} [ASSISTANT]:"] for q in asked]
    scored = emu.score_candidate_lists(parts, [["yes", "no"]] * 32)
    losses = np.array([[float(pair[0]) for pair in sample["filtered_resps"]] for sample in samples])
    np.testing.assert_allclose(losses, [scores.by("tokens") for scores in scored], rtol=1e-3, atol=1e-4)
    greedy = [[pair[1] == "True" for pair in sample["filtered_resps"]] for sample in samples]
    assert greedy == [scores.greedy.tolist() for scores in scored]
    said = emu.generate_text(parts, max_new_tokens=24)
    assert [[text.text.startswith(word) for word in ("yes", "no")] for text in said] == greedy
    chosen = [("yes", "no")[row.argmin()] for row in losses]
    right = np.mean([one == question.answers[0] for one, question in zip(chosen, asked, strict=True)])
    assert results(tmp_path, "fluent_choice")["acc,none"] == pytest.approx(right) and right > 0.5


def test_videos_and_beams(tasks, shown, tmp_path):
    """4 frames by our reader, and settings of the command line."""
    options = ("--gen_kwargs", "num_beams=3,max_new_tokens=12,until=:")
    samples = run(tasks, "fluent_video", tmp_path, f"model={TUNED},frames=4", *options)["fluent_video"]
    emu = Emu.load(TUNED)
    for sample, row in zip(samples, [row for row in shown if "video" in row], strict=True):
        frames = read_video(Video(Path(row["video"]), 4))
        parts = [f"{VIDEO_SYSTEM} [USER]: ", *frames, f" {row['question']} [ASSISTANT]:"]
        (said,) = emu.generate_text([parts], num_beams=3, max_new_tokens=12)
        assert sample["filtered_resps"] == said.text.split(":")[0]


class Request:
    """What lmms-eval asks, with its own class of requests."""

    @staticmethod
    def make(given: dict, number: int = 0, text: str = "what is this?"):
        from lmms_eval.api.instance import Instance

        arguments = (text, given, lambda doc: [doc["image"]], number, "task", "test")
        metadata = {"task": "task", "doc_id": number, "repeats": 1}
        return Instance("generate_until", arguments, 0, metadata)


@pytest.fixture(scope="module")
def model(questions):
    """The simple kind in this process, in batches of 4."""
    from emu_jax.evaluate.lmms.model import SimpleEmu

    model = SimpleEmu(model=TUNED, batch_size="4", begins="man")
    model.task_dict = {"task": {"test": [{"image": question.images[0]} for question in questions[:8]]}}
    return model


def test_requests_of_several_settings_keep_their_order(model):
    """And answers begin with the words that the model's argument gives."""
    long, short = {"max_new_tokens": 12}, {"max_new_tokens": 1, "num_beams": 2}
    given = [long, short, long, long, short, long, long]
    found = model.generate_until([Request.make(settings, number) for number, settings in enumerate(given)])
    for number, (settings, answer) in enumerate(zip(given, found, strict=True)):
        image = model.task_dict["task"]["test"][number]["image"]
        parts = [f"{IMAGE_SYSTEM} [USER]: ", image, " what is this? [ASSISTANT]: man"]
        assert answer == model.emu.generate_text([parts], **settings)[0].text


def test_repeated_requests_are_sampled_apart(model):
    requests = [Request.make({"temperature": 3.0, "max_new_tokens": 8})] * 8
    assert len(set(model.generate_until(requests))) > 4


def test_more_tokens_than_fit_are_cut_to_what_fits(model):
    context = model.emu.config.llama.context
    (answer,) = model.generate_until([Request.make({"max_new_tokens": 10 * context})])
    assert answer
    with pytest.raises(UserError, match=rf"^task task, question 0: the prompt has \d+ tokens, and .* takes {context};"):
        model.generate_until([Request.make({}, text="man " * context)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "model_args model is missing; name a work directory"),
        ({"model": BASE, "frame": 3}, "model_args frame is unknown; did you mean frames"),
        ({"model": BASE, "frames": 0}, "model_args frames=0: expected 1 or more"),
        ({"model": BASE, "rule": "mean"}, "model_args rule=mean: expected one of reference, sum, tokens"),
        ({"model": BASE, "mesh": "data"}, "model_args mesh=data: expected axes and their sizes"),
        ({"model": BASE, "batch_size": "auto"}, "--batch_size auto: expected a whole number"),
        ({"model": BASE, "device": "cuda"}, "--device means nothing here; leave it out"),
    ],
)
def test_arguments_that_cannot_work(arguments, said):
    from emu_jax.evaluate.lmms.model import SimpleEmu

    with pytest.raises(UserError, match=f"^{said}"):
        SimpleEmu(**arguments)


def test_what_is_refused(model):
    with pytest.raises(
        UserError, match=r"^task task, question 0: generation_kwargs penalty_alpha=0\.6 is not supported"
    ):
        model.generate_until([Request.make({"penalty_alpha": 0.6})])
    with pytest.raises(UserError, match=r"^task task: emu_jax does not support generate_until_multi_round"):
        model.generate_until_multi_round([Request.make({})])
    request = Request.make({})
    request.arguments = ("", "yes")
    with pytest.raises(
        UserError, match=r"^task task: acc_mutual_info compares log-likelihoods, but acc compares losses"
    ):
        model.loglikelihood([request])
