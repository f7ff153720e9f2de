"""Commands, and what users get wrong: one line that names the thing and the place, exit code 2, nothing overwritten."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emu_jax.cli import main
from emu_jax.cli.generate import prompt_part
from emu_jax.cli.options import figures_table
from emu_jax.errors import UserError
from emu_jax.evaluate.intervals import Figure
from emu_jax.generate.files import read_requests
from tests.train import tiny

MODELS = str(Path(__file__).parents[1] / "configs" / "models.py")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys, *arguments: str) -> str:
    """Runs a command that must fail; its one line."""
    code = main(arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"emu-jax {arguments[0]}: ")
    return lines[0]


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder with a good, a cut and a foreign image file."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:900])
    (tmp_path / "words.png").write_text("not an image")
    return tmp_path


@pytest.mark.parametrize("command", ["train", "precompute", "generate", "chat", "evaluate", "inspect"])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"example: emu-jax {command} --" in capsys.readouterr().out


def test_inspect_counts_the_published_model(capsys):
    assert main(["inspect", "--config", f"{MODELS}:14b"]) == 0
    out = capsys.readouterr().out
    assert "14.182 B parameters" in out
    assert "vision/patch_embed/kernel" in out


def test_figures_of_benchmarks_are_printed_as_papers_print_them():
    figures = {
        "CIDEr": Figure(1.1288, (1.1, 1.16), None, 5000, 100.0),
        "FID": Figure(11.66, (11.0, 12.5), None, 30_000),
    }
    cider, fid = figures_table(figures, papers=True).splitlines()
    assert cider.split(maxsplit=1)[1] == "1.129  95% [1.100, 1.160]  in papers 112.9 [110.0, 116.0]"
    assert fid.split(maxsplit=1)[1] == "11.660  95% [11.000, 12.500]"
    assert "in papers" not in figures_table(figures)


def test_generate_continues_and_embeds(trained, images, capsys):
    assert main(["generate", "--model", str(trained), "--prompt", str(images / "good.png"), "a"]) == 0
    capsys.readouterr()
    out = images / "next.npy"
    assert main(["generate", "--model", str(trained), "--prompt", "a red bar", "--embeddings", str(out)]) == 0
    assert np.load(out).shape == (4, 16)  # [Q, D] of the debug model


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gone.png", "gone.png: no such image file"),
        ("cut.png", "cut.png: not a readable image"),
        ("words.png", "words.png: not a readable image"),
    ],
)
def test_images_that_cannot_be_read(trained, images, capsys, name, expected):
    assert expected in refused(capsys, "generate", "--model", str(trained), "--prompt", str(images / name))


def test_an_existing_file_is_an_image(tmp_path, monkeypatch):
    """Whatever its name; a name that looks like an image's is one, too, and anything else is a text."""
    monkeypatch.chdir(tmp_path)
    for name in ("cat.tiff", "scan", "notes.txt"):
        Path(name).write_text("not an image")
    words = ("cat.tiff", "scan", "notes.txt", "gone.TIF", "what is it?", "a.b", "", "x" * 5000, "\0", str(tmp_path))
    paths = [word for word in words if isinstance(prompt_part(word), Path)]
    assert paths == ["cat.tiff", "scan", "notes.txt", "gone.TIF"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": ["cat.png"], "out": "o.png"}', '\'cat.png\' is the name of a file; write {"image": "cat.png"}'),
        ('{"prompt": [null], "out": "o.png"}', "prompt[0] is null; expected a text or"),
        ('{"prompt": [{"image": ""}], "out": "o.png"}', "prompt[0].image is ''; expected the name of a file"),
        ('{"prompt": [{"video": "a.mp4"}], "out": "o.png"}', "prompt[0] is an object; expected a text or"),
        ('{"prompt": ["a"], "out": null}', "out is null; expected the name of a file"),
        ('{"prompt": ["a"], "out": "o.png", "seed": 1.5}', "seed is 1.5; expected a whole number of 0 or more"),
        ('{"prompt": ["a"], "out": "o.png", "seed": -1}', "seed is -1; expected a whole number of 0 or more"),
        ('["a"]', "the line is"),
    ],
)
def test_requests_that_are_none(tmp_path, line, says):
    (tmp_path / "cat.png").write_bytes(b"")
    (tmp_path / "r.jsonl").write_text(f'{{"prompt": "a dog", "out": "o.png"}}\n{line}\n')
    with pytest.raises(UserError, match=r"r\.jsonl:2: ") as error:
        read_requests(tmp_path / "r.jsonl")
    assert says in str(error.value)
    (tmp_path / "r.jsonl").write_text('{"prompt": "a dog", "out": "o.png"}\n')
    assert read_requests(tmp_path / "r.jsonl")[0].prompt == ("a dog",)


def test_prompts_that_cannot_be(trained, capsys):
    model = ("generate", "--model", str(trained), "--prompt")
    assert "prompt 0 is empty; give it a text or an image" in refused(capsys, *model, "")
    line = refused(capsys, *model, "bar " * 400)
    assert "exceed the model's context of 128; shorten the prompt or ask for fewer tokens" in line
    line = refused(capsys, *model, "a", "--num-beams", "4", "--temperature", "0.5")
    assert "num_beams=4 and temperature=0.5; beams do not sample" in line


def test_an_output_that_exists_is_not_overwritten(trained, tmp_path, capsys):
    out = tmp_path / "taken.npy"
    out.write_text("mine")
    line = refused(capsys, "generate", "--model", str(trained), "--prompt", "a", "--embeddings", str(out))
    assert f"--embeddings {out}: the file exists; name a new one" in line
    assert out.read_text() == "mine"


def test_training_images_that_cannot_be_read(images, capsys):
    for name, expected in {"gone": "no such image file", "cut": "not a readable image"}.items():
        source = images / f"{name}.jsonl"
        source.write_text(f'{{"image": "{name}.png", "text": "a bar"}}\n')
        workdir = images / f"run-{name}"
        line = refused(
            capsys, "train", "--config", tiny.__file__, "--workdir", str(workdir), f"--config.data.source={source}"
        )
        assert f"{name}.png: {expected}" in line
        assert not workdir.exists()


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--config.train.stepz=5", "--config.train.stepz: config.train has no field 'stepz'; did you mean steps?"),
        ("--config.train.steps=many", "--config.train.steps=many: expected int like 8, got str"),
        ("--config.train=5", "--config.train is a group of fields"),
        (
            "--config.optimizer.accumulate_steps=3",
            "the batch of 8 rows does not divide by config.optimizer.accumulate_steps=3",
        ),
        ("--config.model.vision.patch_size=5", "model.vision.image_size=16 is not a multiple of"),
        ("--config.train.mesh.fsdp=3", "does not multiply to the"),
        (
            "--config.data.source=images",
            "config.data source 'images': no such folder; expected a folder of",
        ),
    ],
)
def test_settings_that_cannot_work(documents, tmp_path, capsys, flag, expected):
    workdir = tmp_path / "run"
    source = () if "source" in flag else (f"--config.data.source={documents}",)
    command = ("train", "--config", tiny.__file__, "--workdir", str(workdir), *source, flag)
    assert expected in refused(capsys, *command)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config.train.minutes", "60"], "--config.train.minutes 60: write --config.train.minutes=60"),
        (["--config.train.steps", "=", "-1"], "--config.train.steps = -1: write --config.train.steps=-1"),
        (["--config.train.steps=", "5"], "--config.train.steps= 5: write --config.train.steps=5"),
        (["--config.a=[3,", "4]"], "--config.a=[3, 4]: write '--config.a=[3, 4]' if 4] belongs to the value"),
        (["--config.train.steps"], "--config.train.steps: expected --config.<field>=<value>; write --config.train.st"),
        (["--track", "wandb", "--config.a.b=(1, 2)"], "--config.a.b: config has no field 'a'"),
    ],
)
def test_overrides_that_spaces_split(tmp_path, capsys, words, says):
    """An override with a space in it does not become a word of the option before it."""
    command = ["train", "--config", tiny.__file__, "--workdir", str(tmp_path / "run"), *words, "--name", "x"]
    try:
        code = main(command)
    except SystemExit as stop:
        code = stop.code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and line.startswith(f"emu-jax train: {says}"), line


def test_an_s3_bucket_is_no_work_directory(documents, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ("train", "--config", tiny.__file__, "--workdir", "s3://bucket/run", f"--config.data.source={documents}")
    assert "workdir=s3://bucket/run: Orbax writes no checkpoints to s3://; name" in refused(capsys, *command)
    assert not (tmp_path / "s3:").exists()


def test_a_work_directory_of_another_config(trained, documents, capsys):
    before = files(trained)
    command = ("train", "--config", tiny.__file__, "--workdir", str(trained), f"--config.data.source={documents}")
    line = refused(capsys, *command, "--config.model.llama.width=32")
    assert f"workdir={trained}: it belongs to another config: model.llama.width is 16 there and 32 here" in line
    assert files(trained) == before


def test_names_that_lead_nowhere(tmp_path, capsys):
    assert "no such file; expected a config" in refused(capsys, "inspect", "--config", str(tmp_path / "x.py"))
    line = refused(capsys, "inspect", "--config", f"{MODELS}:70b")
    assert "models.py:70b: no such variant; choose one of debug, micro, mini, 7b, 14b" in line
    gone = str(tmp_path / "gone")
    assert f"{gone}: no such file or folder" in refused(capsys, "evaluate", "--model", gone)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", MODELS, "--workdir", gone, "--steps=3"])
    assert stop.value.code == 2
