"""Benchmarks from published files to scores, by small models with random weights; real processes, real kills."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from configs import models
from emu_jax import Emu
from emu_jax.config import load_config
from emu_jax.data.system_messages import IMAGE_SYSTEM, VIDEO_SYSTEM
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError
from emu_jax.evaluate.benchmark_runs import EvaluationConfig, evaluate
from emu_jax.evaluate.benchmarks.benchmark import Weights
from emu_jax.evaluate.benchmarks.registry import find_benchmark
from emu_jax.evaluate.metrics import captions, vqa
from emu_jax.evaluate.predict import read_images
from emu_jax.evaluate.prompts import BASE_CAPTION, CAPTION_ASKS, ONE_PHRASE
from emu_jax.models import emu
from emu_jax.train.loop import train
from tests.data.test_clip_scores import clip  # noqa: F401  (a fixture)
from tests.evaluate.metrics.test_captions import fake_java, needs_java, needs_package
from tests.evaluate.samples import write_sample
from tests.train import tiny

DRAWING = {"sampler": "ddim", "steps": 2, "guidance": 5.0}


def _model(instruct: bool) -> Emu:
    """The debug model with words of the prompts, so that they are short, and random weights."""
    texts = [IMAGE_SYSTEM, VIDEO_SYSTEM, ONE_PHRASE, CAPTION_ASKS, BASE_CAPTION, "yes. no. dark medium woman man red"]
    tokenizer = Tokenizer(Tokenizer.train(texts, vocab_size=400, model_type="word").proto, instruct=instruct)
    config = models.debug()
    config.llama.update({"vocab_size": tokenizer.vocab_size, "context": 1024})
    config = emu.EmuConfig.from_dict(config)
    return Emu(config, emu.init(config, jax.random.key(0)), emu.initial_statistics(config), tokenizer)


@pytest.fixture(scope="module")
def tuned() -> Emu:
    return _model(instruct=True)


@pytest.fixture(scope="module")
def pretrained() -> Emu:
    return _model(instruct=False)


def _run(model, names, tmp_path, **fields):
    """Results of benchmarks' samples, by the run's name."""
    for name in names:
        write_sample(name, tmp_path / "data" / name)
    config = EvaluationConfig(names, tmp_path / "data", batch=4, drawing=DRAWING, **fields)
    return {result.run.name: result for result in evaluate(model, config, tmp_path / "out")}


NAMES = ["coco", "vqav2", "okvqa", "vizwiz", "visdial", "msvdqa", "msrvttqa", "mmvet", "mmbench", "mmmu", "seedbench"]
NAMES += ["pope", "gqa", "textvqa", "vist"]
# These differ from coco in their files alone, which tests/evaluate/benchmarks reads.
NAMES += [pytest.param(name, marks=pytest.mark.long) for name in ("nocaps", "flickr30k")]


@pytest.mark.parametrize("name", NAMES)
def test_each_benchmark_runs_from_its_published_files(name, tuned, tmp_path):
    (result,) = _run(tuned, [name], tmp_path).values()
    benchmark = find_benchmark(name)
    questions = benchmark.read(tmp_path / "data" / name)
    lines = [json.loads(line) for line in (result.folder / "0-of-1.jsonl").read_text().splitlines()]
    assert lines[0]["run"]["benchmark"] == name
    assert sorted(line["id"] for line in lines[1:]) == sorted(question.id for question in questions)
    figures = json.loads((result.folder / "scores.json").read_text())["figures"]
    assert bool(figures) == (name != "mmvet"), figures
    for figure in figures.values():
        low, high = figure["interval"]
        assert low - 1e-12 <= figure["value"] <= high + 1e-12, figures
    assert (result.folder / "submission.json").exists() == (benchmark.submission is not None)


def test_what_a_metric_lacks_costs_no_prediction(tuned, tmp_path):
    """WUPS needs a folder of WordNet: without one the predictions stay, and the next run scores them alone."""
    write_sample("nextqa", tmp_path / "data" / "nextqa")
    out = tmp_path / "out"
    lacks = EvaluationConfig(["nextqa"], tmp_path / "data", batch=4, weights=Weights(wordnet=tmp_path / "none"))
    with pytest.raises(UserError, match=f"{tmp_path / 'none'}: no such folder; expected WordNet"):
        list(evaluate(tuned, lacks, out))
    questions = find_benchmark("nextqa").read(tmp_path / "data" / "nextqa")
    lines = (out / "nextqa-test-0shot" / "0-of-1.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["id"] for line in lines[1:]) == sorted(question.id for question in questions)
    assert (out / "nextqa-test-0shot" / "submission.json").exists()


@needs_package
@needs_java
@pytest.mark.slow
def test_a_failing_metric_costs_no_other_figure(tuned, tmp_path, monkeypatch, caplog):
    """What METEOR's failure leaves is scored, and scores.json says what is missing until the same command adds it."""
    with monkeypatch.context() as patch:
        fake_java(tmp_path, patch, "meteor")
        (result,) = _run(tuned, ["coco"], tmp_path).values()
    scores = json.loads((result.folder / "scores.json").read_text())
    assert list(scores["figures"]) == ["CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"]
    assert scores["missing"] == result.missing and list(result.missing) == ["METEOR"]
    assert caplog.messages == [f"METEOR is missing from the scores: {result.missing['METEOR']}"]
    (again,) = evaluate(tuned, EvaluationConfig(["coco"], tmp_path / "data", batch=4), tmp_path / "out")
    scores = json.loads((result.folder / "scores.json").read_text())
    assert "METEOR" in again.figures and not again.missing and "missing" not in scores


@pytest.mark.long
def test_drawings_are_compared_with_real_images(drawing, tmp_path):
    model = Emu.load(drawing)
    (result,) = _run(model, ["coco_drawing"], tmp_path).values()
    questions = find_benchmark("coco_drawing").read(tmp_path / "data" / "coco_drawing")
    drawn = {file.name for file in (result.folder / "drawn").iterdir()}
    assert drawn == {f"{question.id}.png" for question in questions}
    assert {"Frechet distance, own features", "Frechet distance, VGG-16 features"} <= set(result.figures)
    assert all(figure.count == len(questions) for figure in result.figures.values())
    assert result.run.drawing == " ".join(f"{name}={value}" for name, value in DRAWING.items())
    other = EvaluationConfig(["coco_drawing"], tmp_path / "data", batch=4, drawing={**DRAWING, "guidance": 9.0})
    with pytest.raises(UserError, match="how images are drawn was"):
        list(evaluate(model, other, tmp_path / "out"))
    assert model.decoder is not None
    model.decoder.safety = lambda images: images
    with pytest.raises(UserError, match="the model has a safety checker"):
        list(evaluate(model, other, tmp_path / "none"))
    assert not (tmp_path / "none").exists(), "refused before anything is drawn"


@pytest.mark.long
def test_detections_beside_the_drawings_are_scored_by_the_next_run(drawing, tmp_path):
    """GenEval: the first run draws, the detector writes its file, and the second run scores without drawing."""
    model = Emu.load(drawing)
    (result,) = _run(model, ["geneval"], tmp_path, limit=8).values()
    assert result.figures == {} and not result.waits
    drawn = sorted(str(path.relative_to(result.folder / "drawn")) for path in result.folder.rglob("*.*png*"))
    assert drawn == [f"0000{prompt}/samples/000{sample}.png" for prompt in range(2) for sample in range(4)]
    before = {name: (result.folder / "drawn" / name).stat().st_mtime_ns for name in drawn}
    images = {(result.folder / "drawn" / name).read_bytes() for name in drawn}
    assert len(images) == 8  # each has a seed of its own
    bench = {"class": "bench", "score": 0.9, "box": [0, 0, 9, 9]}
    rows = [{"image": name, "objects": [bench] * (not name.endswith("3.png"))} for name in drawn]
    (result.folder / "detections.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (again,) = _run(model, ["geneval"], tmp_path, limit=8).values()
    shares = {name: figure.value for name, figure in again.figures.items()}
    assert shares["GenEval (single_object)"] == 0.75 and shares["GenEval (two_object)"] == 0  # there is no cow
    assert {name: (result.folder / "drawn" / name).stat().st_mtime_ns for name in drawn} == before
    assert json.loads((again.folder / "scores.json").read_text())["figures"]["GenEval"]["value"] == 0.375


@pytest.mark.long
def test_grids_and_answers(drawing, tmp_path):
    """DPG-Bench."""
    model = Emu.load(drawing)
    (result,) = _run(model, ["dpg"], tmp_path).values()
    assert result.figures == {} and len(list((result.folder / "grids").iterdir())) == 2
    names = [f"{item}/{number}.png" for item in ("partiprompts97", "drawtext3") for number in range(4)]
    rows = [{"image": name, "answers": {"1": "yes", "2": "no"}} for name in names]
    (result.folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (again,) = _run(model, ["dpg"], tmp_path).values()
    assert again.figures["DPG-Bench"].value == 50 and again.figures["DPG-Bench"].count == 1  # as the official program


@pytest.mark.long
def test_photos_are_drawn_after_a_story(drawing, tmp_path, clip):  # noqa: F811
    model = Emu.load(drawing)
    longer = dataclasses.replace(model.config, llama=dataclasses.replace(model.config.llama, context=512))
    model = Emu(longer, model.params, model.statistics, model.tokenizer, model.decoder)
    weights = Weights(clip=Path(clip))
    results = {}
    for split in ("val", "val-captions"):
        results |= _run(model, ["vist_drawing"], tmp_path, split=split, weights=weights)
    for result in results.values():
        ((name, figure),) = result.figures.items()
        assert name.startswith("CLIP similarity, ") and figure.count == 2 and -1 <= figure.value <= 1
        names = sorted(str(path.relative_to(result.folder / "drawn")) for path in result.folder.rglob("*.png"))
        assert names == ["46024/4602439.png", "46025/4602439.png"]  # of two stories with one last photo
    assert [result.run.split for result in results.values()] == ["val", "val-captions"]


def test_vizwiz_is_scored_by_both_of_its_tasks(tuned, tmp_path):
    (result,) = _run(tuned, ["vizwiz"], tmp_path).values()
    kinds = {question.kind for question in find_benchmark("vizwiz").read(tmp_path / "data" / "vizwiz")}
    assert "unanswerable" in kinds
    assert {"accuracy", "answerability: average precision", "answerability: F1"} <= set(result.figures)


def test_videos_that_do_not_fit_are_refused_before_anything_is_predicted(tuned, tmp_path):
    """As many frames as fit, without examples; with two examples they are three times as many."""
    context, of_one = tuned.config.llama.context, tuned.config.causal.queries + 2
    frames = context // of_one
    with pytest.raises(UserError) as error:
        _run(tuned, ["msvdqa"], tmp_path, few_shot=(0, 2), frames=frames)
    assert str(error.value) == (
        f"benchmark msvdqa: 2 examples and the question show {3 * frames} images, {3 * frames * of_one:,} of the "
        f"{context:,} tokens that the model takes; expected room for text as well: ask for fewer (--frames)"
    )
    assert not (tmp_path / "out").exists()
    _run(tuned, ["msvdqa"], tmp_path, frames=2)
    with pytest.raises(UserError, match="predictions for another run: "):  # of other frames
        _run(tuned, ["msvdqa"], tmp_path, frames=3)


def test_how_images_are_read_is_part_of_a_run(tuned, tmp_path):
    """The reference's reading gives a model other pixels of a turned image, and its predictions are another run's."""
    write_sample("mmvet", tmp_path / "data" / "mmvet")
    for file in (tmp_path / "data" / "mmvet" / "images").iterdir():
        exif = Image.Exif()
        exif[0x0112] = 3
        Image.open(file).convert("RGB").save(file, exif=exif)
    (question, *_) = find_benchmark("mmvet").read(tmp_path / "data" / "mmvet")
    (upright,), (turned,) = read_images(question, 16), read_images(question, 16, "reference")
    np.testing.assert_array_equal(turned, upright[::-1, ::-1])
    settings = {"benchmarks": ["mmvet"], "data": tmp_path / "data", "batch": 4}
    (result,) = evaluate(tuned, EvaluationConfig(**settings, image_reading="reference"), tmp_path / "out")
    assert result.run.image_reading == "reference"
    with pytest.raises(UserError, match="how images are read was 'reference'"):
        list(evaluate(tuned, EvaluationConfig(**settings), tmp_path / "out"))
    with pytest.raises(UserError, match="image_reading='exif': expected one of upright, reference"):
        EvaluationConfig(**settings, image_reading="exif")


@pytest.mark.long
def test_nocaps_is_scored_by_domain(tuned, tmp_path):
    """A domain's CIDEr is that of its captions alone."""
    (result,) = _run(tuned, ["nocaps"], tmp_path).values()
    domains = {name: figure for name, figure in result.figures.items() if name.startswith("CIDEr")}
    counts = {"CIDEr": 4, "CIDEr (in-domain)": 1, "CIDEr (near-domain)": 2, "CIDEr (out-domain)": 1}
    assert {name: figure.count for name, figure in domains.items()} == counts
    rows = json.loads((result.folder / "submission.json").read_text())
    said = {str(row["image_id"]): row["caption"] for row in rows}
    near = [q for q in find_benchmark("nocaps").read(tmp_path / "data" / "nocaps") if q.kind == "near-domain"]
    assert domains["CIDEr (near-domain)"] == captions.cider([said[q.id] for q in near], near)


def test_the_score_is_the_metric_of_what_was_said(tuned, tmp_path):
    (result,) = _run(tuned, ["vqav2"], tmp_path).values()
    said = {line["id"]: line["answer"] for line in _submission(result)}
    questions = find_benchmark("vqav2").read(tmp_path / "data" / "vqav2")
    expected = np.mean([vqa.accuracy(said[int(question.id)], question.answers) for question in questions])
    assert result.figures["accuracy"].value == pytest.approx(expected, abs=1e-12)


def _submission(result):
    return [{"id": row["question_id"], **row} for row in json.loads((result.folder / "submission.json").read_text())]


@pytest.mark.long
def test_the_pretrained_model_is_called_twice_or_with_examples(pretrained, tmp_path):
    results = _run(pretrained, ["vqav2"], tmp_path, few_shot=(0, 2))
    two_calls, examples = (
        [json.loads(line) for line in (results[name].folder / "0-of-1.jsonl").read_text().splitlines()[1:]]
        for name in ("vqav2-val-0shot", "vqav2-val-2shot")
    )
    assert {len(line["said"]) for line in two_calls} == {2}
    assert {len(line["said"]) for line in examples} == {1}
    assert len(list((tmp_path / "out" / "features").glob("*.npy"))) == 2  # of the examples' images and the questions'


@pytest.mark.long
def test_examples_with_images_inside_their_texts(tuned, tmp_path):
    """MMMU's images are in its tables; a letter or an answer follows each example."""
    (result,) = _run(tuned, ["mmmu"], tmp_path, few_shot=[2]).values()
    lines = [json.loads(line) for line in (result.folder / "0-of-1.jsonl").read_text().splitlines()[1:]]
    questions = {question.id: question for question in find_benchmark("mmmu").read(tmp_path / "data" / "mmmu")}
    assert len(lines) == len(questions) == 4
    for line in lines:
        options, found = questions[line["id"]].candidates, line["prediction"]
        assert len(found["sum"]) == len(options) if options else isinstance(found, str)


@pytest.mark.long
def test_zero_shot_is_the_same_run_with_or_without_others(pretrained, tmp_path):
    """The pool of examples does not matter if none is shown: earlier predictions are kept."""
    _run(pretrained, ["okvqa"], tmp_path, few_shot=[0, 2], limit=2)
    again = _run(pretrained, ["okvqa"], tmp_path, few_shot=[0], limit=2)
    assert list(again) == ["okvqa-val-0shot"]


@pytest.mark.long
def test_batches_change_no_prediction(pretrained, tmp_path):
    """Prompts of other lengths beside one, and a last batch that is not full."""
    write_sample("msvdqa", tmp_path / "msvdqa")
    found = []
    for batch in (1, 5):
        config = EvaluationConfig(["msvdqa"], tmp_path, batch=batch)
        (result,) = evaluate(pretrained, config, tmp_path / f"out{batch}")
        lines = (result.folder / "0-of-1.jsonl").read_text().splitlines()[1:]
        found.append({json.loads(line)["id"]: json.loads(line)["prediction"] for line in lines})
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"benchmarks": ["coc"]}, "no benchmark 'coc'; did you mean coco?"),
        ({"benchmarks": ["coco"]}, "benchmark coco: data is missing; give a folder with .*dataset_coco.json"),
        ({"benchmarks": ["mmvet"], "few_shot": (2,)}, "benchmark mmvet: .*"),
        (
            {"benchmarks": ["mmvet"], "data": Path(), "text_examples": True},
            "mmvet: has no split to take few-shot",
        ),
        ({"benchmarks": ["fluent"], "few_shot": (-1,)}, "few_shot=.-1.*expected 0 or more"),
    ],
    ids=["unknown", "no files", "no examples", "no text examples", "negative"],
)
def test_impossible_configs_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        EvaluationConfig(**fields)


# ---- real processes --------------------------------------------------------------------------------------------------


def _command(model, out, *words):
    return [sys.executable, "-m", "emu_jax.cli", "evaluate", "--model", str(model), "--out", str(out), *words]


def _predicted(out):
    """Lines of predictions so far, of all files."""
    files = out.glob("fluent-*/*.jsonl")
    return [json.loads(line) for file in files for line in file.read_bytes().splitlines()[1:] if line.endswith(b"}")]


@pytest.mark.long
def test_a_killed_run_resumes_without_losing_or_repeating_one(trained, tmp_path):
    command = _command(trained, tmp_path, "--benchmark", "fluent", "--limit", "120", "--batch", "2")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until = time.monotonic() + 240
    while len(_predicted(tmp_path)) < 10 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = _predicted(tmp_path)
    assert 10 <= len(before) < 120, process.stderr.read().decode()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = _predicted(tmp_path)
    assert after[: len(before)] == before
    assert len({line["id"] for line in after}) == len(after) == 120


@pytest.mark.long
def test_parts_and_devices_change_no_prediction(documents, tmp_path):
    """Two processes' parts over a mesh of eight devices, against one process on one.

    The model has learnt its captions: after two steps all tokens are about as likely, and the rounding of sums over
    other devices can change which of two comes first.
    """
    model = tmp_path / "model"
    train(load_config(tiny.__file__, [f"--config.data.source={documents}", "--config.train.steps=150"]), model)
    words = ("--benchmark", "fluent", "--limit", "24", "--batch", "8")
    done = subprocess.run(_command(model, tmp_path / "one", *words), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "exactly right" in done.stdout
    eight = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    for part, expected in (("1/2", "the process that finishes last scores"), ("0/2", "exactly right")):
        split = ("--part", part, "--mesh", "data=4", "tensor=2")
        command = _command(model, tmp_path / "parts", *words, *split)
        done = subprocess.run(command, capture_output=True, text=True, env=eight)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
    one, parts = ({line["id"]: line["prediction"] for line in _predicted(tmp_path / name)} for name in ("one", "parts"))
    assert len(one) == 24
    assert len(set(one.values())) > 2, f"expected that the captions depend on the images: {one}"
    assert one == parts
