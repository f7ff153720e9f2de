"""The pages to read: every command in them parses, names what exists, and is run by something; links lead somewhere.

`RUNS` says what runs each command. `launch/test.sh -m slow tests/test_pages.py` runs those marked HERE, as they stand,
in a folder that holds what they name: the quick start's run (made by the page's own commands, in few steps), embedded
images, the records of docs/data-formats.md, and a small model in place of the published weights.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image as PIL

from emu_jax.cli import COMMANDS, main, make_parser
from emu_jax.config import load_config
from emu_jax.data.system_messages import IMAGE_SYSTEM
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.evaluate import prompts
from emu_jax.train.loop import train
from tests import pages
from tests.evaluate.people import HELD_OUT, TRAIN, people
from tests.evaluate.samples import WRITERS, write_sample
from tests.pages import CONFIGS, PAGES, ROOT, anchor, blocks, commands, links
from tests.test_data_formats import groups, write
from tests.train import tiny

HERE = "here"
CLOUD = "tests/launch/test_scripts.py::test_commands_of_the_example"
BENCHMARKS = "tests/evaluate/test_benchmark_runs.py"
# The pretraining of 14 B parameters is run by no test; what the compiler says of it is written down.
CONVERT = "tests/checkpoints/convert"
LLAMA = f"{CONVERT}/test_llama.py"
TUNED = "tests/train/test_instruct.py::test_the_five_sets_are_one_stream"
PLANNED = "docs/pods-and-plan.md"
PAPER = "tests/test_paper.py::test_the_papers_training"
# The first pattern that is found in a command -> what runs it: HERE, a test, a line of .ci/run, or a documented check.
RUNS = {
    r"^launch/quickstart\.sh$": ".ci/run",
    r"^launch/quickstart\.sh --all$": "tests/launch/test_quickstart.py",
    r"^launch/test\.sh": ".ci/run",
    r"^launch/emu_mini\.sh": "tests/launch/test_emu_mini.py",
    r"^launch/mixture\.sh( --dry-run)?$": "tests/launch/test_mixture.py::test_commands",
    r"^launch/ablations\.sh( --dry-run)?$": "tests/launch/test_ablations.py::test_commands",
    r"^launch/(tpu-vm|gke)\.sh( --dry-run)? (create|install|image|run|resume|status|logs|stop|delete)$": CLOUD,
    r"^launch/lock\.sh ": "tests/launch/test_locks.py::test_commands",
    r"^cp launch/pod\.env\.example launch/pod\.env$": "tests/launch/test_scripts.py::project",
    r"^ruff (format|check) \.$": ".ci/run",
    r"^python -m mypy$": ".ci/run",
    r"^emu-jax convert --from (Emu/pretrain|Emu-instruct\.pt) ": f"{CONVERT}/test_round_trip.py::converted",
    r"^emu-jax convert --from LLaMA-13B ": f"{LLAMA}::test_sharded_safetensors_have_transformers_logits",
    r"^emu-jax convert --from EVA01": f"{LLAMA}::test_eva_clips_visual_tower",
    r"^emu-jax convert --from stable-diffusion": f"{CONVERT}/test_diffusers.py::test_every_name_comes_back",
    r"^pip install (-e )?\.(\[[a-z,]+\])?$": "launch/environment.sh",
    r"^python -m mkdocs build --strict$": "tests/test_docs.py::test_the_site_builds",
    r"^emu-jax evaluate .*gs://": "tests/test_paths.py::test_evaluate_on_a_bucket_is_evaluate_on_a_disk",
    r"^(lmms-eval|torchrun .* lmms_eval) --model emu_jax ": "tests/evaluate/lmms/test_model.py",
    r"^python run\.py --config emu\.json ": "tests/serve/test_vlmevalkit.py",
    r"^python notebooks/run\.py": "tests/notebooks/test_notebooks.py::test_all_run_from_scratch",
    r"^emu-jax serve( |$)": "tests/serve/conftest.py::served",
    r"^emu-jax plan ": "tests/plan/test_plan.py::test_a_small_step_is_planned",
    r"^emu-jax evaluate .*--watch --benchmark": "tests/evaluate/test_watch.py::test_benchmarks_of_every_checkpoint",
    r"^emu-jax evaluate .*--watch": "tests/evaluate/test_watch.py::test_beside_a_training_and_killed",
    r"^emu-jax sweep ": "tests/test_sweep.py::test_a_sweep_is_stopped_and_goes_on",
    r"^emu-jax compare ": "tests/evaluate/test_compare.py::test_the_command_writes_files",
    r"^emu-jax train --config configs/pretrain\.py:14b ": PLANNED,
    r"^emu-jax train --config configs/decoder\.py:published": PLANNED,
    r"^emu-jax precompute --model runs/emu ": PAPER,
    r"^emu-jax prepare pairs --in laion-(2b|aesthetics|coco --image-size) ": PAPER,
    r"^emu-jax (chat --model runs/emu-i|generate --model runs/emu) ": PAPER,
    r"^cp -r weights/stable-diffusion/vae runs/emu/vae$": PAPER,
    r"^emu-jax train --config configs/instruct\.py --workdir runs/emu-i ": TUNED,
    r"^emu-jax train --config configs/ablations/": "tests/test_ablations.py::test_builds",
    r"^emu-jax train --config configs/mixture\.py": "tests/launch/test_mixture_data.py",
    r"^emu-jax train .*(--change|--skip-windows) ": "tests/train/test_changes.py",
    r"^emu-jax train .*--workdir /shared/run$": "tests/train/test_distributed.py::test_two_processes_train_as_one",
    r"^emu-jax evaluate .*coco_drawing": f"{BENCHMARKS}::test_drawings_are_compared_with_real_images",
    r"^emu-jax evaluate .*geneval": f"{BENCHMARKS}::test_detections_beside_the_drawings_are_scored_by_the_next_run",
    r"^emu-jax evaluate .*vist_drawing": f"{BENCHMARKS}::test_photos_are_drawn_after_a_story",
    r"^emu-jax evaluate .*nextqa": f"{BENCHMARKS}::test_what_a_metric_lacks_costs_no_prediction",
    r"^emu-jax .*(my_emu/|albums|colours|trailing|runs/diverse)": "tests/test_extend.py::follow",
    r"^emu-jax (prepare|inspect-data|train|precompute|generate|chat|evaluate|inspect|bench|export) ": HERE,
}
# Words that are added to a command that is run here, so that it takes seconds.
SMALLER = {
    r"^emu-jax train .*--profile-steps": ("--config.train.steps=16", "--config.train.minutes=0"),
    r"^emu-jax train ": ("--config.train.steps=2", "--config.train.minutes=0"),
    r"^emu-jax inspect-data ": ("--batches=1", "--rows=1", "--config.data.batch_rows=2", "--config.data.shards=1"),
    r"^emu-jax bench ": ("--repetitions=1",),
    r"^emu-jax prepare .*--workers": ("--workers=2",),
    r"^emu-jax precompute ": ("--split=heldout_concepts",),
    r"^emu-jax evaluate .*--data": ("--limit=2",),
    r"^emu-jax evaluate ": ("--split=heldout_concepts",),
}
PATH = re.compile(r"`((?:emu_jax|configs|docs|launch|tests|notebooks|\.ci)/[\w./*-]+)(?::[\w.]+)*`")
# A file of the package, with something that it defines: `train/step.py:train_step`.
PACKAGES = "|".join(path.name for path in sorted((ROOT / "emu_jax").iterdir()) if path.is_dir())
MODULE = re.compile(
    rf"`((?:(?:{PACKAGES})/[\w/]+|sharding|config|errors|workdir|storage|bench|chips|sweep|observation)\.py)(?::(\w+))?`"
)
EXTRA = re.compile(r"(?:\.|emu-jax)\[([a-z,]+)\]")


def everything() -> list[tuple[str, list[str]]]:
    """Where each command stands, and its words."""
    return [(f"{page}:{number}", words) for page in [*PAGES, *CONFIGS] for number, words in commands(page)]


def row(words: list[str]) -> str:
    """The pattern of RUNS that knows a command; "" where none does."""
    line = " ".join(word for word in words if word != "…")
    return next((pattern for pattern in RUNS if re.search(pattern, line)), "")


def runs(words: list[str]) -> str:
    """What runs a command."""
    return RUNS.get(row(words), "")


def parse(words: list[str]):
    """Options and overrides, as the command line reads them."""
    elided = ["--workdir", "elided"] if "…" in words and words[1] == "train" and "--workdir" not in words else []
    options, rest = make_parser().parse_known_args([word for word in words[1:] if word != "…"] + elided)
    assert [word for word in rest if not word.startswith("--config.")] == []
    return options, rest


# ---------------------------------------------------------------- what is written


def test_there_are_pages_and_commands():
    names = {str(page) for page in PAGES}
    assert {"README.md", "CONTRIBUTING.md", "docs/index.md", "docs/data-formats.md", "docs/extend/source.md"} <= names
    assert len(everything()) > 80


@pytest.mark.parametrize(("where", "words"), everything(), ids=[where for where, _ in everything()])
def test_every_command_is_known(where, words):
    """It parses with all its settings, the files that it names are there, and the table says what runs it."""
    assert runs(words), f"{where}: {shlex.join(words)}: no row of RUNS; say what runs this command"
    for word in words:
        if word.startswith(("tests/", "launch/", "configs/")):
            file = word.partition(":")[0].removesuffix("launch/pod.env")
            assert (ROOT / file).exists(), f"{where}: {word}"
    if words[0] == "emu-jax":
        options, overrides = parse(words)
        if "config" in options and options.config.startswith("my_emu/"):  # a file of the page itself
            page = Path(where.partition(":")[0])
            assert options.config in {block.about for block in blocks(page)}, f"{where}: {options.config}"
        elif "config" in options:
            load_config(str(ROOT / options.config), overrides)


def test_what_the_table_names_is_there():
    used = {row(words) for _, words in everything()}
    for pattern, how in RUNS.items():
        assert pattern in used, f"the row {pattern} knows no command"
        if how != HERE:
            file, _, name = how.partition("::")
            text = (ROOT / file).read_text(encoding="utf-8")
            assert not name or f"def {name}(" in text or f"# {name}" in text, how
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    programs = {"ruff": 2, "python": 3}  # words that say what is called
    for words in (words for _, words in everything() if runs(words) == ".ci/run"):
        called = words[: programs.get(words[0], 1)]
        assert any(f" {' '.join(called)} " in f" {line} " for line in lines), called


def test_examples_of_the_command_line_parse():
    for name in COMMANDS:
        line = importlib.import_module(f"emu_jax.cli.{name.replace('-', '_')}").EXAMPLE
        parse(shlex.split(line))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_and_paths_lead_somewhere(page):
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        target, _, fragment = link.partition("#")
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), f"{page}: {link}"
        if fragment:
            headings = {
                anchor(line.lstrip("# ")) for line in file.read_text("utf-8").splitlines() if line.startswith("#")
            }
            assert fragment in headings, f"{page}: {link}"
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in PATH.findall(re.sub(r"\[`[^\]]*\]", "", text)):  # what is a link is relative to the page
        assert list(ROOT.glob(path)) or path == "launch/pod.env", f"{page}: {path}"
    for module in re.findall(r"`python -m\s+([\w.]+)", text):
        known = module.startswith(("mypy", "mkdocs", "nltk.")) or (ROOT / f"{module.replace('.', '/')}.py").is_file()
        assert known, f"{page}: {module}"
    for file, name in MODULE.findall(re.sub(r"\[`[^\]]*\]", "", text)):
        assert (ROOT / "emu_jax" / file).is_file(), f"{page}: {file}"
        if name:
            code = (ROOT / "emu_jax" / file).read_text(encoding="utf-8")
            assert re.search(rf"^\s*(?:def|class) {name}\b|^{name}\b", code, re.MULTILINE), f"{page}: {file}:{name}"
    for extras in EXTRA.findall(text):
        setup = (ROOT / "setup.py").read_text(encoding="utf-8")
        assert all(f'"{extra}": [' in setup for extra in extras.split(",")), f"{page}: [{extras}]"


@pytest.mark.parametrize("folder", ["configs", "launch"])
def test_every_file_of_a_folder_is_in_its_readme(folder):
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    tracked = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    for path in tracked:
        name = str(path.relative_to(ROOT / folder))
        assert name in ("README.md", "pod.env") or f"({name})" in text, f"{folder}/README.md does not tell of {name}"


def test_the_map_names_every_package():
    """And the modules that are in none; the architecture's floors have them too, and the extras are listed."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text[text.index("## Map") :]
    architecture = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    floors = architecture[architecture.index("## The floors") : architecture.index("## The life")]
    for path in (ROOT / "emu_jax").iterdir():
        if path.name.startswith("__") or path.name in ("py.typed", "shipped"):
            continue
        assert f"{path.stem}/" in lines or f"emu_jax/{path.stem}" in lines or f" {path.name} " in lines, path
        assert f"`{path.stem}`" in floors, path
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for extra in re.findall(r'^    "(\w+)": \[', setup, re.MULTILINE):
        assert f"| `{extra}` |" in index, extra


def test_python_blocks_compile():
    snippets = [block for page in PAGES for block in blocks(page) if block.language == "python"]
    assert snippets
    for block in snippets:
        compile(block.text, f"{block.page}:{block.line}", "exec")


# ---------------------------------------------------------------- what is run


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Path:
    """A folder with what the pages' commands name, but for the runs that they make themselves."""
    folder = tmp_path_factory.mktemp("stage")
    (folder / "configs").symlink_to(ROOT / "configs")
    for group in groups():
        if not group[-1].headings[1].startswith("Benchmarks"):
            write(group, folder)
    for name, person in zip(("dog", "cat", "tiger", "fairy"), people(HELD_OUT), strict=True):
        PIL.fromarray(person.pixels).save(folder / f"{name}.png")
    shutil.copy(folder / "dog.png", folder / "image.png")
    for name in WRITERS:
        write_sample(name, folder / "benchmarks" / name)
    (folder / "llava_instruct_150k.json").write_bytes((folder / "llava" / "llava_instruct_150k.json").read_bytes())
    for source in ("train2017", "WebVid", "ActivityNet"):
        (found,) = folder.glob(f"*/{source}") if source != "train2017" else [folder / "llava" / source]
        shutil.copytree(found, folder / source)
    for source in ("videochat/videochat_instruct_11k.json", "video_chatgpt/VideoInstruct100K.json"):
        shutil.copy(folder / source, folder)
    with tarfile.open(folder / "laion-coco" / "00000.tar", "w") as archive:  # more than the one record of the page
        for number, person in enumerate(people(TRAIN)):
            jpeg = io.BytesIO()
            PIL.fromarray(person.pixels).save(jpeg, "JPEG")
            fields = {"key": f"{number:09d}", "caption": person.name, "status": "success"}
            members = {"jpg": jpeg.getvalue(), "json": json.dumps(fields).encode(), "txt": person.name.encode()}
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{number:09d}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    said = [person.name for person in people(TRAIN)]
    (folder / "LLaMA-13B").mkdir()
    (folder / "LLaMA-13B" / "tokenizer.model").write_bytes(Tokenizer.train(said, vocab_size=300).proto)
    _small_weights(folder)
    return folder


def _small_weights(folder: Path) -> None:
    """`weights/emu` and `weights/emu-instruct`: the debug model after two steps, which knows the prompts' words."""
    documents = tiny.draw(folder / "weights" / "data")
    words = [IMAGE_SYSTEM, prompts.ONE_PHRASE, prompts.CAPTION_ASKS, prompts.BASE_CAPTION, prompts.CAPTION_BEGINS]
    with documents.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"parts": [{"text": text}]}) + "\n" for text in words)
    config = tiny.get_config()
    config.model.llama.context = 1024
    config.tokenizer.model_type = "word"
    config.data.source = str(documents)
    config.train.steps = 2
    train(config, folder / "weights" / "emu")
    tuned = tiny.instruct_config(documents, folder / "weights" / "emu")
    tuned.model.llama.context = 1024
    tuned.tokenizer.path = str(folder / "weights" / "emu")
    train(tuned, folder / "weights" / "emu-instruct")


def run(words: list[str]) -> None:
    """A command of a page, in this process, made smaller; it must end with 0."""
    line = " ".join(words)
    more = next((extra for pattern, extra in SMALLER.items() if re.search(pattern, line)), ())
    print(f"\n$ {shlex.join([*words, *more])}", flush=True)
    options, _ = parse(words)
    for folder in [getattr(options, "out", None), getattr(options, "folder", None)]:
        if words[1] in ("prepare", "precompute", "export") and folder is not None and folder.exists():
            shutil.rmtree(folder)  # another page made it: each must work from nothing
    assert main([*words[1:], *more]) == 0, line


@pytest.mark.slow
def test_commands_of_the_pages_run(stage, monkeypatch):
    """Page by page, the quick start first: its commands make the run that the others use."""
    monkeypatch.chdir(stage)
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is this?\n"))
    first = Path("docs/quick-start.md")
    done: set[str] = set()
    for page in [first, *(page for page in PAGES if page != first)]:
        shutil.rmtree("runs/mine", ignore_errors=True)  # which pages train on data of their own
        for _, words in commands(page):
            if runs(words) == HERE and (shlex.join(words) not in done or "runs/mine" in words):
                sys.stdin.seek(0)
                run(words)
                done.add(shlex.join(words))
    asked = {words[1] for page in PAGES for _, words in commands(page) if runs(words) == HERE}
    assert {words.split()[1] for words in done} == asked and len(done) > 30
    for name in ("report.html", "scores.json"):
        assert Path("runs/quickstart", name).stat().st_size
    assert {path.name for path in Path().glob("blend-*.png")} == {"blend-0.png", "blend-1.png", "blend-2.png"}
    assert Path("rows.html").stat().st_size and Path("speed.json").stat().st_size and Path("exported").is_dir()


PRELUDE = """
import PIL.Image
image, cat, tiger = (PIL.Image.open(name) for name in ("dog.png", "cat.png", "tiger.png"))
"""


@pytest.mark.slow
def test_python_of_the_pages_runs(stage, monkeypatch):
    """In the folder that the commands have filled, on eight simulated devices."""
    assert (stage / "runs" / "quickstart" / "chat").is_dir(), "test_commands_of_the_pages_run makes the run; run it too"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    for page in (page for page in PAGES if page.parent.name != "extend"):  # tests/test_extend.py runs those
        python = [block.text for block in blocks(page) if block.language == "python"]
        # What asks a server is run by tests/serve/test_server.py, against one.
        if snippets := [text for text in python if "from openai" not in text]:
            code = "\n".join([PRELUDE, *snippets])
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=stage, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{page}\n{done.stderr}"


def test_a_command_that_nobody_runs_is_found():
    """The check of the table can fail."""
    assert runs(["emu-jax", "sing", "--model", "runs/quickstart"]) == ""
    assert runs(["emu-jax", "train", "--config", "configs/quickstart.py", "--workdir", "runs/mine"]) == HERE
    with pytest.raises(SystemExit):
        parse(["emu-jax", "train", "--workdir", "runs/mine"])
    assert pages.COMMAND.match("emu-jax train") and not pages.COMMAND.match("emu_jax/cli.py   the console script")
