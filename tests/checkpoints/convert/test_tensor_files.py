"""Reading files of tensors: what is read is what was written, and nothing in a pickle runs."""

import os
import pickle
import sys

import ml_dtypes
import numpy as np
import pytest

from emu_jax.checkpoints.convert.tensor_files import TensorFile
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
    for damaged in (b"", b"hello, world", data[:7], data[: len(data) // 2], data[:-1], os.urandom(64)):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged") as error:
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


@pytest.mark.parametrize(("name", "says"), [("absent.bin", "no such file"), ("model.ckpt", "not a known kind")])
def test_wrong_paths(tmp_path, name, says):
    with pytest.raises(UserError, match=says) as error:
        TensorFile(tmp_path / name)
    assert str(tmp_path / name) in one_line(error)


@pytest.mark.parametrize(("module", "name"), [("torch", "w.bin"), ("safetensors", "w.safetensors")])
def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch, module, name):
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as error:
        TensorFile(tmp_path / name)
    assert "pip install emu-jax[convert]" in one_line(error)
