"""Reading files of tensors: what is read is what was written, and nothing in a pickle runs."""

import json
import os
import pickle
import sys

import ml_dtypes
import numpy as np
import pytest

from emu_jax.checkpoints.convert.tensor_files import TensorFile, open_tensors
from emu_jax.errors import UserError

torch = pytest.importorskip("torch", reason="PyTorch files need PyTorch; install .[convert]")
save_safetensors = pytest.importorskip("safetensors.torch", reason="install .[convert]").save_file

TENSORS = {
    "half": torch.tensor([[1.0, -2.5, 3.0]], dtype=torch.float16),
    "brain": torch.tensor([[1.0, 0.1], [-3e38, 1e-40]], dtype=torch.bfloat16),
    "single": torch.tensor([0.1, 0.2]),
    "double": torch.tensor(0.1, dtype=torch.float64),
}
DTYPES = {"half": np.float16, "brain": ml_dtypes.bfloat16, "single": np.float32, "double": np.float64}


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.numpy().tobytes()


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", ["w.bin", "w.pt", "nested.pt", "old.bin", "w.safetensors"])
def test_reads_what_was_written_bit_for_bit(tmp_path, name):
    path = tmp_path / name
    if name == "w.safetensors":
        save_safetensors(TENSORS, path)
    elif name == "nested.pt":
        torch.save({"module": TENSORS, "iteration": 7}, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=name != "old.bin")
    file = TensorFile(path)
    assert set(file) == set(TENSORS) and len(file) == 4
    assert file.shapes == {"half": (1, 3), "brain": (2, 2), "single": (2,), "double": ()}
    assert file.dtypes == {key: np.dtype(dtype) for key, dtype in DTYPES.items()}
    assert file.beside == (("iteration",) if name == "nested.pt" else ())
    for key, tensor in TENSORS.items():
        assert file[key].dtype == DTYPES[key]
        assert file[key].shape == tuple(tensor.shape)
        assert file[key].tobytes() == bits(tensor)


def test_views_and_trainable_parameters_are_read(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    brain = base.bfloat16()
    state = {"transposed": base.T, "brain": brain.T, "parameter": torch.nn.Parameter(base)}
    torch.save(state, tmp_path / "w.bin")
    file = TensorFile(tmp_path / "w.bin")
    np.testing.assert_array_equal(file["transposed"], base.numpy().T)
    np.testing.assert_array_equal(file["brain"].astype(np.float32), base.numpy().T)
    np.testing.assert_array_equal(file["parameter"], base.numpy())


def test_what_is_no_floating_tensor_is_named(tmp_path):
    torch.save({"epoch": 3, "ids": torch.tensor([1]), "w": torch.ones(1)}, tmp_path / "w.bin")
    file = TensorFile(tmp_path / "w.bin")
    assert file.others == {"epoch": "int, not a tensor"}
    assert file.dtypes["ids"] == "int64"
    with pytest.raises(UserError, match="ids is int64") as error:
        file["ids"]
    one_line(error)
    save_safetensors({"ids": torch.tensor([1])}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="ids is I64"):
        TensorFile(tmp_path / "w.safetensors")["ids"]


@pytest.mark.parametrize("kind", ["zip", "old", "bare"])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, kind):
    path, made = tmp_path / "evil.bin", tmp_path / "made"
    state = {"w": torch.ones(1), "evil": Evil(made)}
    if kind == "bare":
        path.write_bytes(pickle.dumps({"evil": Evil(made)}, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UserError) as error:
        TensorFile(path)
    text = one_line(error)
    assert str(path) in text and "nothing was loaded" in text
    assert "weights_only" not in text  # PyTorch advises to switch the protection off; we do not
    if kind == "zip":
        assert "mkdir" in text
    assert not made.exists()


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_damaged_files_are_one_line_errors(tmp_path, suffix):
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"damaged{suffix}"
    torch.save(TENSORS, whole) if suffix == ".bin" else save_safetensors(TENSORS, whole)
    data = whole.read_bytes()
    noise = np.random.default_rng(0).bytes(64)
    for damaged in (b"", data[:7], data[: len(data) // 2], data[:-1], b"\xff" * 40, noise):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged|empty|truncated") as error:
            TensorFile(path)
        assert str(path) in one_line(error)


def test_flipped_bytes_never_escape_as_other_errors(tmp_path):
    path = tmp_path / "flipped.bin"
    rng = np.random.default_rng(0)
    for zipped in (True, False):
        torch.save({"a": torch.ones(2), "b": torch.ones(3)}, path, _use_new_zipfile_serialization=zipped)
        data = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(60):
            flipped = data.copy()
            flipped[rng.integers(len(data), size=3)] = rng.integers(256, size=3)
            path.write_bytes(flipped.tobytes())
            try:
                TensorFile(path)
            except UserError as error:
                assert "\n" not in str(error)


def test_what_is_no_state_dict_is_refused(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(UserError, match="object of type list; expected a state dict") as error:
        TensorFile(tmp_path / "list.pt")
    one_line(error)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 9\n"


@pytest.mark.parametrize("name", ["w.bin", "w.pt", "w.safetensors"])
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (LFS, "a Git-LFS pointer, not the file itself; run `git lfs pull`"),
        (b"../../.git/annex/objects/X/MD5E-s9--0.bin", "a git-annex pointer"),
        (b"\n<!DOCTYPE html>\n<html><head>", r"an HTML page, not the file itself; .* with /resolve/"),
        (b"\xef\xbb\xbf<html>", "an HTML page"),
        (b"Entry not found", "the text 'Entry not found' in place of the file"),
        (b"Access to model x is restricted.\n", "the text 'Access to model x is restricted.' in place"),
        (b'{"error":"Repository not found"}', "a server's error message"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied', "a server's error message"),
        (b"", "an empty file; download it again"),
    ],
)
def test_what_a_failed_download_left_is_named(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=says) as error:
        TensorFile(tmp_path / name)
    assert one_line(error).startswith(f"{tmp_path / name}: ") and "nothing was loaded" in str(error.value)


@pytest.mark.parametrize("name", ["w.bin", "w.safetensors"])
def test_a_truncated_file_says_so(tmp_path, name):
    path = tmp_path / name
    torch.save(TENSORS, path) if name == "w.bin" else save_safetensors(TENSORS, path)
    data = path.read_bytes()
    for size in (len(data) - 1, len(data) // 2, 9):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match=f"truncated after {size:,} (of [0-9,]+ )?bytes"):
            TensorFile(path)


# ------------------------------------------------------------------------------------- the files of a folder

NAMES = ("model.safetensors", "pytorch_model.bin")


def write(folder, *names: str, value: float = 1.0) -> None:
    """Files with a tensor of their own each, named after the file; an index names all shards."""
    for name in names:
        state = {f"in {name}": torch.full((1,), value)}
        torch.save(state, folder / name) if name.endswith(".bin") else save_safetensors(state, folder / name)


def write_index(folder, index: str, *names: str) -> None:
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": {f"in {name}": name for name in names}}))


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
OLD = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
HALF = ("model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("files", "indexes", "read"),
    [
        (NAMES, {}, NAMES[:1]),
        ((*OLD, *NAMES[:1]), {}, NAMES[:1]),
        (("model.fp16.safetensors", NAMES[1]), {}, NAMES[1:]),  # full precision first
        (("model.fp16.safetensors",), {}, ("model.fp16.safetensors",)),
        (("model.non_ema.safetensors", "model.bf16.safetensors"), {}, ("model.bf16.safetensors",)),
        (SHARDS, {"model.safetensors.index.json": SHARDS}, SHARDS),
        (SHARDS, {}, SHARDS),
        (OLD, {}, OLD),
        (OLD, {"model.safetensors.index.json": SHARDS, "pytorch_model.bin.index.json": OLD}, OLD),  # *.bin alone
        (OLD, {"model.safetensors.index.json": SHARDS}, OLD),
        ((*SHARDS, *NAMES[:1]), {"model.safetensors.index.json": SHARDS}, NAMES[:1]),
        (HALF, {"model.safetensors.index.fp16.json": HALF}, HALF),
        (HALF, {"model.fp16.safetensors.index.json": HALF}, HALF),
        (HALF, {}, HALF),
        ((*SHARDS, "model-00001-of-00003.safetensors"), {"model.safetensors.index.json": SHARDS}, SHARDS),
    ],
)
def test_the_files_of_a_folder(tmp_path, files, indexes, read):
    write(tmp_path, *files)
    for index, names in indexes.items():
        write_index(tmp_path, index, *names)
    tensors = open_tensors(tmp_path, NAMES, "weights")
    assert [file.name for file in tensors.files] == list(read)
    assert sorted(tensors) == [f"in {name}" for name in sorted(read)] and not tensors.others
    assert all(tensors[name] == 1.0 for name in tensors)


@pytest.mark.parametrize(
    ("files", "indexes", "says"),
    [
        ((), {}, "holds no weights; expected weights"),
        (("model.non_ema.safetensors",), {}, "holds no weights; .*; the folder holds model.non_ema.safetensors"),
        (SHARDS[:1], {}, f"holds 1 of 2 shards; {SHARDS[1]} is missing; download the folder again"),
        ((*SHARDS, "model-00001-of-00003.safetensors"), {}, "shards of model that are parts of 2 and of 3 files"),
        (
            SHARDS[:1],
            {"model.safetensors.index.json": SHARDS},
            f"lists {SHARDS[1]}, which is no file in .* holds {SHARDS[0]}",
        ),
        ((), {"model.safetensors.index.json": SHARDS}, f"lists {SHARDS[0]}, {SHARDS[1]}, which is no file in"),
        (SHARDS, {"model.safetensors.index.json": ()}, "holds no weight_map"),
    ],
)
def test_what_a_folder_lacks_is_named(tmp_path, files, indexes, says):
    write(tmp_path, *files)
    for index, names in indexes.items():
        write_index(tmp_path, index, *names)
    with pytest.raises(UserError, match=says) as error:
        open_tensors(tmp_path, NAMES, "weights")
    assert str(tmp_path) in one_line(error)


@pytest.mark.parametrize(
    "text", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{", LFS.decode(), "Entry not found"]
)
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: ") as error:
        open_tensors(tmp_path, NAMES, "weights")
    one_line(error)


def test_a_broken_link_is_named(tmp_path):
    """As in a cache of Hugging Face whose blobs are gone."""
    (tmp_path / "model.safetensors").symlink_to("../../blobs/3f")
    with pytest.raises(UserError, match=r"the folder holds model\.safetensors \(a broken link\)"):
        open_tensors(tmp_path, NAMES, "weights")
    with pytest.raises(UserError, match=r"model\.safetensors: a link to \.\./\.\./blobs/3f, which is not there"):
        TensorFile(tmp_path / "model.safetensors")


@pytest.mark.parametrize(("name", "says"), [("absent.bin", "no such file"), ("model.ckpt", "not a known kind")])
def test_wrong_paths(tmp_path, name, says):
    with pytest.raises(UserError, match=says) as error:
        TensorFile(tmp_path / name)
    assert str(tmp_path / name) in one_line(error)


@pytest.mark.parametrize(("module", "name"), [("torch", "w.bin"), ("safetensors", "w.safetensors")])
def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch, module, name):
    (tmp_path / name).write_bytes(b"\x00" * 600)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as error:
        TensorFile(tmp_path / name)
    assert "pip install emu-jax[convert]" in one_line(error)
