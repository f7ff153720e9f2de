"""Paths of every command: local, gs:// and s3://, as the table of docs/storage.md says."""

import argparse
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from emu_jax.checkpoints.store import COMMIT_FILE
from emu_jax.cli import main, make_parser
from emu_jax.cli.options import use_compilation_cache
from emu_jax.evaluate.benchmark_runs import _digest
from emu_jax.evaluate.benchmarks.registry import find_benchmark
from emu_jax.evaluate.predict import read_images
from emu_jax.storage import as_path, copy_folder, is_bucket, replace_text
from tests.evaluate.samples import write_sample
from tests.train import tiny

PAGE = Path(__file__).parents[1] / "docs" / "storage.md"
ROW = re.compile(r"^\| `([\w-]+)` \| `([\w-]+)` \| (yes|no) \| (yes|no) \| (yes|no) \|", re.MULTILINE)
TABLE = {
    (row[0], row[1]): dict(zip(("local", "gs", "s3"), row[2:], strict=True)) for row in ROW.findall(PAGE.read_text())
}
REFUSED = [(*row, scheme) for row, cells in TABLE.items() for scheme in ("gs", "s3") if cells[scheme] == "no"]
NAMES = {("prepare", "--name"), ("serve", "--name")}  # of a data set, of a model
NEEDED = {
    "train": ["--config", tiny.__file__, "--workdir", "run", "--config.data.source={documents}"],
    "evaluate": ["--model", "run"],
    "convert": ["--from", "files", "--to", "weights"],
    "plan": ["--topology", "here"],
    "sweep": ["--config", tiny.__file__, "--out", "runs"],
}


def path_options() -> dict[tuple[str, str], argparse.Action]:
    """The options that name paths: by their types, or by what their help calls them."""
    (commands,) = (action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
    found = {}
    for command, parser in commands.choices.items():
        for action in parser._actions:
            name = next(iter(action.option_strings), action.metavar)
            about = f"{action.metavar} {action.help}"
            called = action.type is None and action.nargs != 0 and re.search(r"\b(file|folder|FILE|DIR)", about)
            if action.type not in (None, int, float) or called:
                found[command, name] = action
    return {key: action for key, action in found.items() if key not in NAMES}


def test_the_table_has_every_option():
    assert set(TABLE) == set(path_options()) and all(cells["local"] == "yes" for cells in TABLE.values())


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_an_option_takes_a_path_in_a_bucket(scheme):
    for key, action in path_options().items():
        if TABLE[key][scheme] == "yes" and action.type is not None:
            assert is_bucket(action.type(f"{scheme}://bucket/a.png")), key


@pytest.mark.parametrize(("command", "option", "scheme"), REFUSED)
def test_what_stays_local_refuses_a_bucket(command, option, scheme, documents, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    needed = [word.format(documents=documents) for word in NEEDED.get(command, ())]
    try:
        code = main([command, *needed, option, f"{scheme}://bucket/a"])
    except SystemExit as stopped:
        code = stopped.code
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and f"{scheme}://bucket/a" in line and "local" in line, line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "path, expected",
    [
        ("gs:/bucket/run", "argument --model: gs:/bucket/run: expected gs://<bucket>/…, with two slashes"),
        (
            "hdfs://bucket/run",
            "hdfs:// is no storage that emu_jax reads; expected a local path, or one of gs://, s3://",
        ),
    ],
)
def test_urls_of_no_bucket_are_one_line(path, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--model", path, "--prompt", "a"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and expected in line


# ---- commands whose every path is in a bucket, in a current directory where nothing can be written -------------------


def put(workdir: Path, target) -> None:
    """Copies work directories to a bucket as training writes them there."""
    copy_folder(workdir, target)
    for step in workdir.rglob("checkpoints/*"):
        replace_text(target / step.relative_to(workdir).as_posix() / COMMIT_FILE, "")


@pytest.mark.slow
def test_evaluate_on_a_bucket_is_evaluate_on_a_disk(trained, bucket, tmp_path, monkeypatch, capsys):
    put(trained, bucket / "run")
    monkeypatch.chdir("/proc")
    words = ["--benchmark", "fluent", "--limit", "6", "--batch", "4"]
    assert main(["evaluate", "--model", str(trained), "--out", str(tmp_path), *words]) == 0
    assert main(["evaluate", "--model", f"{bucket}/run", *words]) == 0
    run = "fluent-heldout_combinations-0shot"
    for name in ("0-of-1.jsonl", "scores.json"):
        stored = (bucket / "run" / "benchmarks" / run / name).read_bytes()
        assert stored == (tmp_path / run / name).read_bytes()
    capsys.readouterr()
    assert main(["evaluate", "--model", f"{bucket}/run", *words]) == 0  # nothing is predicted again
    assert "exactly right" in capsys.readouterr().out


@pytest.mark.long
def test_generate_on_a_bucket_is_generate_on_a_disk(drawing, bucket, tmp_path, monkeypatch, capsys):
    put(drawing, bucket / "run")
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(tmp_path / "grey.png")
    copy_folder(tmp_path, bucket / "files")
    monkeypatch.chdir("/proc")
    texts = []
    for folder, model in ((f"{bucket}/files", f"{bucket}/run"), (str(tmp_path), str(drawing))):
        prompt = ["generate", "--model", model, "--prompt", f"{folder}/grey.png", "a red bar"]
        assert main([*prompt, "--out", f"{folder}/drawn.png", "--steps", "2", "--sampler", "ddim"]) == 0
        assert main([*prompt, "--embeddings", f"{folder}/next.npy"]) == 0
        capsys.readouterr()
        assert main(prompt) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    with (bucket / "files" / "drawn.png").open("rb") as file:
        assert np.array_equal(Image.open(file), Image.open(tmp_path / "drawn.png"))
    assert (bucket / "files" / "next.npy").read_bytes() == (tmp_path / "next.npy").read_bytes()
    line = ["generate", "--model", f"{bucket}/run", "--prompt", "a", "--out", f"{bucket}/files/drawn.png"]
    assert main(line) == 2
    assert capsys.readouterr().err.strip().endswith("drawn.png: the file exists; name a new one")


def test_requests_name_files_beside_theirs_or_urls(bucket):
    from emu_jax.generate.files import read_requests

    record = {"prompt": ["a", {"image": "a.png"}, {"image": "s3://bucket/b.png"}], "out": "c.png"}
    replace_text(bucket / "requests.jsonl", json.dumps(record))
    (request,) = read_requests(bucket / "requests.jsonl")
    assert request.prompt == ("a", bucket / "a.png", as_path("s3://bucket/b.png")) and request.out == bucket / "c.png"


def test_compare_reads_and_writes_a_bucket(trained, bucket, monkeypatch):
    config = json.loads((trained / "config.json").read_text())
    for seed in (0, 1):
        run = bucket / f"base-{seed}"
        replace_text(run / "config.json", json.dumps(config | {"train": config["train"] | {"seed": seed}}))
        (run / "metrics.jsonl").write_bytes((trained / "metrics.jsonl").read_bytes())
    monkeypatch.chdir("/proc")
    assert main(["compare", f"{bucket}/base-0", f"{bucket}/base-1", "--out", f"{bucket}/out", "--markdown"]) == 0
    assert [len(group["runs"]) for group in json.loads((bucket / "out" / "compare.json").read_bytes())["groups"]] == [2]
    assert (bucket / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["coco", "nextqa", "msvdqa"])  # JSON, CSV, lines; images and videos
def test_benchmarks_are_read_from_a_bucket(name, bucket, tmp_path):
    write_sample(name, tmp_path)
    copy_folder(tmp_path, bucket)
    benchmark = find_benchmark(name)
    ours, theirs = benchmark.read(tmp_path), benchmark.read(bucket)
    assert _digest(ours) == _digest(theirs)
    assert all(map(np.array_equal, read_images(ours[0], 16), read_images(theirs[0], 16)))


def test_compiled_programs_are_kept_in_a_bucket(bucket):
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", MINIMUM)}
    try:
        use_compilation_cache(bucket / "cache")
        jax.config.update(MINIMUM, 0.0)
        compilation_cache.reset_cache()
        jax.jit(lambda x: jnp.sin(x) * 3.25)(jnp.ones(3))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert any(path.name.endswith("-cache") for path in (bucket / "cache").iterdir())


MINIMUM = "jax_persistent_cache_min_compile_time_secs"
