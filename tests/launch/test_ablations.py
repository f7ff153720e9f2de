"""launch/ablations.sh: the commands it prints, what it does not do twice, and what it refuses."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PEOPLE = "python launch/ablation_data.py FOLDER/data/people"
DATA = """\
rm -rf FOLDER/download/partial
mkdir -p FOLDER/download/partial
cd FOLDER/download/partial && \
python -m pip download --quiet --no-deps --no-binary=moviepy moviepy==2.2.1 && mv moviepy-2.2.1.tar.gz ..
rm -rf FOLDER/download/partial
python launch/mixture_data.py FOLDER/download FOLDER/raw bunny
emu-jax prepare storyboards --in FOLDER/raw/bunny --out FOLDER/data/bunny --image-size 64
""".splitlines()
HEADS = ("l2", "l1", "smooth_l1", "cosine", "infonce", "flow", "codes", "queries")
BEFORE = ["source launch/environment.sh", "install_emu_jax '.[prepare]'"]
CACHE = "export JAX_COMPILATION_CACHE_DIR=FOLDER/cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2"


def run(name: str, config: str, seed: int, *more: str) -> list[str]:
    settings = f"--config.train.seed={seed} --config.data.seed={seed}"
    settings += " --config.data.mixture.pairs.source=FOLDER/data/people"
    settings += " --config.data.mixture.storyboard.source=FOLDER/data/bunny"
    train = f"emu-jax train --config configs/ablations/{config} --workdir FOLDER/{name}-{seed} {settings}"
    evaluate = f"emu-jax evaluate --model FOLDER/{name}-{seed} --split heldout_combinations --fixed-space emu-mini"
    return [" ".join([train, *more]), evaluate]


def launch(*words: str, **env: str) -> subprocess.CompletedProcess:
    command = [ROOT / "launch" / "ablations.sh", "--dry-run", *words]
    plain = {name: value for name, value in os.environ.items() if name not in ("STEPS", "SEEDS", "ABLATIONS", "JOBS")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=plain | env)


def printed(folder: Path, *words: str, **env: str) -> list[str]:
    done = launch(str(folder), *words, **env)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.replace(str(folder), "FOLDER").splitlines()


def test_commands(tmp_path):
    """The bases come first: frozen_vision takes the encoder of its seed's."""
    steps = "--config.train.steps=9", "--config.data.batch_rows=4"
    expected = [
        *BEFORE,
        PEOPLE,
        *DATA,
        CACHE,
        *run("base", "base.py:micro", 0, *steps),
        *run("base", "base.py:micro", 3, *steps),
        *run("frozen_vision", "frozen_vision.py:micro", 0, steps[0], "--config.init.vision=FOLDER/base-0", steps[1]),
        *run("frozen_vision", "frozen_vision.py:micro", 3, steps[0], "--config.init.vision=FOLDER/base-3", steps[1]),
        "emu-jax compare FOLDER/base-0 FOLDER/base-3 FOLDER/frozen_vision-0 FOLDER/frozen_vision-3 "
        "--out FOLDER --markdown",
    ]
    env = {"STEPS": "9", "SEEDS": "0 3", "ABLATIONS": "base frozen_vision"}
    assert printed(tmp_path, "--config.data.batch_rows=4", **env) == expected


def test_every_ablation_with_eight_seeds(tmp_path):
    lines = printed(tmp_path)
    trained = [line.split()[3].removeprefix("configs/ablations/") for line in lines if line.startswith("emu-jax train")]
    assert trained[:8] == ["base.py:micro"] * 8 and "base.py:micro" not in trained[8:]
    assert len(trained) == 8 * 16 and trained[8:] == trained[8:23] * 8
    files = {path.name for path in (ROOT / "configs" / "ablations").glob("*.py")}
    assert {config.partition(":")[0] for config in trained} == files - {"visual_head.py"}


def test_visual_heads_are_a_table_of_their_own(tmp_path):
    """They need no pairs and no storyboards; codes need a codebook; emu-mini's decoder draws what each predicts."""
    heads = [f"head_{name}" for name in HEADS]
    lines = printed(tmp_path, ABLATIONS=" ".join(heads), SEEDS="3")
    assert lines[: len(BEFORE)] == BEFORE
    assert lines[len(BEFORE)] == "emu-jax train --config configs/codebook.py --workdir FOLDER/codebook"
    trained = [line for line in lines if "visual_head.py" in line]
    for name, line in zip(HEADS, trained, strict=True):
        codebook = " --config.init.codebook=FOLDER/codebook" if name == "codes" else ""
        assert line == (
            f"emu-jax train --config configs/ablations/visual_head.py:drawn-{name} --workdir FOLDER/head_{name}-3 "
            f"--config.train.seed=3 --config.data.seed=3{codebook}"
        )
    scored = [line for line in lines if line.startswith("emu-jax evaluate")]
    assert all(line.endswith("--fixed-space emu-mini --decoder emu-mini") for line in scored) and len(scored) == 8
    assert not any("ablation_data" in line or "storyboards" in line for line in lines)
    assert lines[-1].startswith("emu-jax compare FOLDER/head_l2-3 ")


def test_jobs_share_the_runs(tmp_path):
    """Each job prints its own runs, in its own time; together they are all, once."""
    one, three = printed(tmp_path, SEEDS="0 1"), printed(tmp_path, SEEDS="0 1", JOBS="3")
    assert sorted(line for line in three if "emu-jax" in line) == sorted(line for line in one if "emu-jax" in line)


def test_what_is_there_is_not_made_again(tmp_path):
    """A run with scores is not repeated; one without goes on; the video is not fetched for prepared storyboards."""
    for name in ("base-0", "no_storyboards-0"):
        (tmp_path / name).mkdir()
    (tmp_path / "base-0" / "scores.json").write_text("{}")
    (tmp_path / "no_storyboards-0" / "scores.json").touch()  # cut short
    (tmp_path / "data" / "bunny").mkdir(parents=True)
    (tmp_path / "data" / "bunny" / "manifest.json").touch()
    assert printed(tmp_path, SEEDS="0", ABLATIONS="base no_storyboards") == [
        *BEFORE,
        PEOPLE,
        CACHE,
        *run("no_storyboards", "no_storyboards.py:micro", 0),
        "emu-jax compare FOLDER/base-0 FOLDER/no_storyboards-0 --out FOLDER --markdown",
    ]


@pytest.mark.parametrize(
    ("words", "env", "expected"),
    [
        (["--steps=3"], {}, "'--steps=3' is not an argument; expected [--dry-run] [FOLDER] [--config.a.b=value …]"),
        ([], {"ABLATIONS": "base no_loss"}, "ABLATIONS: 'no_loss' is unknown; choose among base no_storyboards "),
        ([], {"SEEDS": "0 one"}, "SEEDS, JOBS, STEPS: 'one' is not a whole number"),
        ([], {"JOBS": "0"}, "JOBS: 0 runs at a time; expected 1 or more"),
        ([], {"STEPS": "1e3"}, "SEEDS, JOBS, STEPS: '1e3' is not a whole number"),
    ],
)
def test_what_is_refused(words, env, expected):
    done = launch(*words, **env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"launch/ablations.sh: {expected}") and done.stderr.count("\n") == 1
