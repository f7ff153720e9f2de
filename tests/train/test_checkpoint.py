"""Checkpoints that do not belong here, or were damaged: one line each, and nothing is written."""

import json
from pathlib import Path

import pytest

from emu_jax import Emu
from emu_jax.config import load_config
from emu_jax.errors import UserError
from emu_jax.train.checkpoint import load_for_inference, newest_folder
from emu_jax.train.loop import train
from tests.train.tiny import draw

TINY = str(Path(__file__).with_name("tiny.py"))


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, documents) -> Path:
    """A work directory of two steps."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train(config(documents), workdir)
    return workdir


def config(documents: Path, *overrides: str):
    return load_config(TINY, [f"--config.data.source={documents}", "--config.train.steps=2", *overrides])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.model.llama.width=32", r"model\.llama\.width is 16 there and 32 here; use a new work directory"),
        ("--config.tokenizer.vocab_size=290", r"model\.llama\.vocab_size is \d+ there and \d+ here"),
        ("--config.train.seed=1", r"train\.seed is 0 there and 1 here; use a new work directory"),
        ("--config.data.pairs.order=random", r"data\.pairs\.order is 'both' there and 'random' here"),
    ],
)
def test_a_work_directory_of_another_config_is_refused(trained, documents, override, message):
    before = files(trained)
    with pytest.raises(UserError, match=message):
        train(config(documents, override), trained)
    assert files(trained) == before


def test_what_is_only_observed_may_change(trained, documents):
    train(config(documents, "--config.train.log_every=5", "--config.train.keep_checkpoints=9"), trained)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--config.model.llama.mlp_dim=32",
            r"llama/blocks/mlp/\w+/kernel is float32\[\d.*\] in the checkpoint, float32",
        ),
        ("--config.tokenizer.vocab_size=290", r"kernel|embedding is float32"),
    ],
)
def test_a_checkpoint_of_another_size_is_refused(trained, documents, tmp_path, override, message):
    """Without config.json, as when someone copies only the checkpoints."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(trained / "checkpoints")
    with pytest.raises(UserError, match=message):
        train(config(documents, override), workdir)


def test_a_flipped_bit_is_found_and_the_older_checkpoint_named(trained, tmp_path):
    folder = tmp_path / "2"
    for name, data in files(newest_folder(trained)).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    meta = folder / "meta" / "metadata"
    content = json.loads(meta.read_text())
    name = next(name for name in content["digests"] if name.startswith("params/vision/"))
    content["digests"][name] ^= 1
    meta.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=rf"{folder}: the checkpoint is corrupt: {name} has digest .*; delete this folder"
    ):
        load_for_inference(folder)


@pytest.mark.parametrize("flipped", range(4))
def test_damaged_files_never_load(trained, tmp_path, flipped):
    """One byte of the array files is changed; Orbax alone returns wrong values for most of these."""
    original = files(newest_folder(trained))
    folder = tmp_path / "2"
    data_files = sorted(
        (n for n in original if n.startswith("params/") and "/d/" in n), key=lambda n: -len(original[n])
    )
    victim = data_files[0]
    for name, data in original.items():
        if name == victim:
            place = (2 * flipped + 1) * len(data) // 8
            data = data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{folder}: the checkpoint is corrupt"):
        load_for_inference(folder)


def test_a_foreign_tokenizer_is_refused(trained, golden):
    with pytest.raises(UserError, match=r"the tokenizer has 32\d+ tokens, the weights have \d+; load the tokenizer"):
        Emu.load(trained, tokenizer=golden / "llama_tokenizer.model")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "gone", r"gone: no such file or folder"),
        (lambda p: p, r"multimodal_encoder/pytorch_model\.bin"),
    ],
)
def test_nothing_to_load(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        Emu.load(make(tmp_path))
