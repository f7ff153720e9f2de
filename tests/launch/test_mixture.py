"""launch/mixture.sh: the commands it prints, what it refuses, and what it does not do twice."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = """\
rm -rf FOLDER/download/partial
mkdir -p FOLDER/download/partial
cd FOLDER/download/partial && npm pack --loglevel=error emojibase-data@17.0.0 && mv emojibase-data-17.0.0.tgz ..
cd FOLDER/download/partial && npm pack --loglevel=error @lobehub/fluent-emoji-3d@1.1.0 && \
mv lobehub-fluent-emoji-3d-1.1.0.tgz ..
cd FOLDER/download/partial && npm pack --loglevel=error @lobehub/fluent-emoji-anim-1@1.0.0 && \
mv lobehub-fluent-emoji-anim-1-1.0.0.tgz ..
cd FOLDER/download/partial && apt-get download gimp-help-en && dpkg-deb -x gimp-help-en_*.deb gimp-help-en && \
mv gimp-help-en ..
cd FOLDER/download/partial && apt-get download python-sklearn-doc && \
dpkg-deb -x python-sklearn-doc_*.deb python-sklearn-doc && mv python-sklearn-doc ..
source launch/environment.sh
install_emu_jax '.[prepare]'
cd FOLDER/download/partial && \
python -m pip download --quiet --no-deps --no-binary=moviepy moviepy==2.2.1 && mv moviepy-2.2.1.tar.gz ..
rm -rf FOLDER/download/partial
python launch/mixture_data.py FOLDER/download FOLDER/raw
emu-jax prepare pairs --in FOLDER/raw/fluent --out FOLDER/data/fluent --image-size 64
emu-jax prepare html --in FOLDER/raw/gimp --out FOLDER/data/gimp --image-size 64 --set \
'decorations=images/note.png,images/tip.png,images/warning.png,images/caution.png,images/important.png,\
images/dialogs/stock-*,images/toolbox/stock-*,images/callouts/*'
emu-jax prepare html --in FOLDER/raw/sklearn --out FOLDER/data/sklearn --image-size 64 --set \
'exclude=*index.html,*sg_execution_times.html' \
'drop=sphx-glr-download*,sphx-glr-timing,sphx-glr-signature,sphx-glr-thumb*,sk-top-container'
emu-jax prepare videos --in FOLDER/raw/animations --out FOLDER/data/animations --image-size 64
emu-jax prepare storyboards --in FOLDER/raw/bunny --out FOLDER/data/bunny --image-size 64
emu-jax inspect-data --config configs/mixture.py:FOLDER/data --out FOLDER/rows.html
emu-jax train --config configs/mixture.py:FOLDER/data --workdir FOLDER
""".splitlines()
DOWNLOADS = [
    "emojibase-data-17.0.0.tgz",
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "lobehub-fluent-emoji-anim-1-1.0.0.tgz",
    "gimp-help-en",
    "python-sklearn-doc",
    "moviepy-2.2.1.tar.gz",
]


def launch(*words: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    command = [ROOT / "launch" / "mixture.sh", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | env)


def printed(*words: str, cwd: Path = ROOT) -> list[str]:
    done = launch("--dry-run", *words, cwd=cwd)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_commands(tmp_path):
    expected = [line.replace("FOLDER", f"{tmp_path}/demo") for line in COMMANDS]
    assert printed("demo", cwd=tmp_path) == expected  # a folder is named from where the user is
    assert printed(f"{tmp_path}/demo") == expected
    assert list(tmp_path.iterdir()) == []


def test_overrides_go_to_both_that_read_the_config(tmp_path):
    *_, inspect, train = printed(f"{tmp_path}/d", "--config.train.steps=20", "--config.data.seed=a b")
    assert inspect == (
        f"emu-jax inspect-data --config configs/mixture.py:{tmp_path}/d/data --out {tmp_path}/d/rows.html "
        "--config.train.steps=20 '--config.data.seed=a b'"
    )
    assert train == (
        f"emu-jax train --config configs/mixture.py:{tmp_path}/d/data --workdir {tmp_path}/d "
        "--config.train.steps=20 '--config.data.seed=a b'"
    )


def test_a_folder_with_a_space_is_quoted(tmp_path):
    first, *_, train = printed(f"{tmp_path}/a b")
    assert first == f"rm -rf '{tmp_path}/a b/download/partial'"
    assert train == f"emu-jax train --config 'configs/mixture.py:{tmp_path}/a b/data' --workdir '{tmp_path}/a b'"
    assert f"cd '{tmp_path}/a b/download/partial' && npm pack --loglevel=error emojibase-data@17.0.0 && " in (
        "\n".join(printed(f"{tmp_path}/a b"))
    )


def test_what_is_there_is_not_made_again(tmp_path):
    for name in DOWNLOADS:
        (tmp_path / "download" / name).mkdir(parents=True)
    for name in ("fluent", "gimp", "sklearn", "bunny"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "manifest.json").touch()
    (tmp_path / "data" / "animations").mkdir()  # cut short
    left = [line for line in COMMANDS if not line.startswith("cd ")]
    left = [line for line in left if not line.startswith("emu-jax prepare") or " videos " in line]
    assert printed(str(tmp_path)) == [line.replace("FOLDER", str(tmp_path)) for line in left]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--steps=3",), "'--steps=3' is not an argument; expected [--dry-run] [FOLDER] [--config.a.b=value …]"),
        (("",), "'' is not an argument; expected [--dry-run] [FOLDER] [--config.a.b=value …]"),
        (("/a", "b"), "'b' is a second folder, after /a; expected one"),
    ],
)
def test_words_that_cannot_be(words, expected):
    done = launch("--dry-run", *words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"launch/mixture.sh: {expected}\n")


def _programs(folder: Path, **scripts: str) -> str:
    """A PATH of little else than programs that say what they do."""
    folder.mkdir()
    for name in ("bash", "basename", "dirname", "mkdir", "mv", "rm"):
        (folder / name).symlink_to(shutil.which(name))
    for name, script in scripts.items():
        (folder / name).write_text(f"#!{shutil.which('bash')}\n{script}\n")
        (folder / name).chmod(0o755)
    return str(folder)


def test_without_npm(tmp_path):
    done = launch(str(tmp_path / "demo"), PATH=_programs(tmp_path / "bin"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "launch/mixture.sh: npm is not on the PATH; install it, or look at the commands with --dry-run\n"
    )


def test_apt_that_knows_no_packages(tmp_path):
    for name in DOWNLOADS[:3]:
        (tmp_path / "download" / name).mkdir(parents=True)
    path = _programs(tmp_path / "bin", **{"apt-get": "exit 100", "dpkg-deb": "exit 1"})
    done = launch(str(tmp_path), PATH=path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "launch/mixture.sh: gimp-help-en was not downloaded; run 'apt-get update' once, as root, and see that this is "
        "Debian or Ubuntu with its usual packages\n"
    )


def test_a_download_has_its_name_when_it_is_whole(tmp_path):
    """npm writes half a file and fails."""
    path = _programs(tmp_path / "bin", npm="echo half > emojibase-data-17.0.0.tgz; exit 1")
    done = launch(str(tmp_path / "demo"), PATH=path)
    assert (done.returncode, done.stderr) == (
        2,
        "launch/mixture.sh: emojibase-data-17.0.0.tgz was not downloaded; see npm's message above\n",
    )
    assert [path.name for path in (tmp_path / "demo" / "download").iterdir()] == ["partial"]
