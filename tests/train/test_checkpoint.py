"""Checkpoints that do not belong here, or were damaged: one line each, and nothing is written."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from emu_jax import Emu
from emu_jax.checkpoints.load import load_emu
from emu_jax.checkpoints.store import CorruptCheckpoint, newest_folder
from emu_jax.config import load_config
from emu_jax.errors import UserError
from emu_jax.train.loop import train
from emu_jax.workdir import read_metrics
from tests.train import tiny


def config(documents: Path, *overrides: str):
    return load_config(tiny.__file__, [f"--config.data.source={documents}", "--config.train.steps=2", *overrides])


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


def copy(files: dict[str, bytes], folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_a_checkpoint_is_compared_where_config_json_is_missing(trained, documents, tmp_path):
    """Its leaves have the same shapes, so that nothing else tells."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(trained / "checkpoints")
    expected = r"run/checkpoints/2: it belongs to another config: model\.dtype is 'float32' there and 'bfloat16' here"
    with pytest.raises(UserError, match=expected):
        train(config(documents, "--config.model.dtype=bfloat16"), workdir)
    assert list(workdir.iterdir()) == [workdir / "checkpoints"]


@pytest.mark.slow
def test_checkpoints_by_step_by_time_and_for_ever(documents, tmp_path):
    """The time is always up here, so a checkpoint comes with every second row; those of every third step are kept."""
    words = ["steps=7", "log_every=2", "checkpoint_every=100", "checkpoint_minutes=1e-9"]
    words += ["keep_checkpoints=2", "keep_every=3"]
    train(config(documents, *(f"--config.train.{word}" for word in words)), tmp_path / "run")
    saved = [row["step"] for row in read_metrics(tmp_path / "run" / "goodput.jsonl")]
    assert saved == [0, 2, 3, 4, 6, 7]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["3", "6", "7"]


def test_metadata_are_covered_by_their_digest(trained, tmp_path):
    """Also where they are valid JSON, and of the right types; the older checkpoint is named, not taken."""
    original = files(newest_folder(trained))
    content = json.loads(original["meta/metadata"])
    name = next(name for name in content["meta"]["digests"] if name.startswith("params/vision/"))
    content["meta"]["digests"][name] ^= 1
    folder = copy(original | {"meta/metadata": json.dumps(content).encode()}, tmp_path / "4")
    (tmp_path / "3").mkdir()
    mend = f"the checkpoint before it is {tmp_path / '3'}"
    with pytest.raises(UserError, match=f"^{folder}: the checkpoint is corrupt: meta/metadata .* SHA-256; {mend}$"):
        load_emu(folder)


@pytest.mark.parametrize(
    "damaged", [b"", b"{", b"\xff{}", b"[" * 100_000, b"[]", b"null", b'{"meta": {}, "sha256": 1}']
)
def test_damaged_metadata_are_one_line(trained, tmp_path, damaged):
    folder = copy(files(newest_folder(trained)) | {"meta/metadata": damaged}, tmp_path / "4")
    with pytest.raises(CorruptCheckpoint, match=f"^{folder}: the checkpoint is corrupt: meta/metadata [^\n]*again$"):
        load_emu(folder)


def test_damaged_files_never_load_as_other_values(trained, tmp_path):
    """One byte of the largest array file is changed at a time; Orbax alone returns wrong values for most of these."""
    original = files(newest_folder(trained))
    expected = jax.tree.leaves(load_emu(trained).params)
    victim = max((n for n in original if n.startswith("params/") and "/d/" in n), key=lambda n: len(original[n]))
    data, refused = original[victim], 0
    for number in range(8):
        folder = tmp_path / str(number)
        place = (2 * number + 1) * len(data) // 16
        changed = data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]
        copy(original | {victim: changed}, folder)
        try:
            loaded = jax.tree.leaves(load_emu(folder).params)
        except UserError as error:
            assert str(error).startswith(f"{folder}: the checkpoint is corrupt"), error
            refused += 1
        else:  # bytes that no array is read from
            for a, b in zip(expected, loaded, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=f"byte {place}")
    assert refused >= 4, f"{refused} of 8"


def test_a_checkpoint_of_an_earlier_version_is_refused(trained, tmp_path):
    original = files(newest_folder(trained))
    meta = json.dumps(json.loads(original["meta/metadata"])["meta"]).encode()
    folder = copy(original | {"meta/metadata": meta}, tmp_path / "2")
    with pytest.raises(UserError, match=rf"{folder}: a checkpoint of an earlier version, whose metadata have no diges"):
        load_emu(folder)


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
