"""One key at a time dropped, added, renamed, reshaped or retyped, over every pattern: named, and nothing written."""

import re
import shutil

import numpy as np
import pytest

from emu_jax.checkpoints.convert.formats import Settings, convert
from emu_jax.checkpoints.convert.tensor_files import TensorFile
from emu_jax.errors import UserError

torch = pytest.importorskip("torch", reason="install .[convert]")
safetensors = pytest.importorskip("safetensors.torch", reason="install .[convert]")

SETTINGS = Settings(vision_head_dim=12)


class Broken:
    """A folder or file whose tensors can be replaced, and the keys that stand for all others like them."""

    def __init__(self, source, tensors_file: str, work):
        self.path = work / source.name
        shutil.copytree(source, self.path) if source.is_dir() else shutil.copy(source, self.path)
        self.file = self.path / tensors_file if tensors_file else self.path
        file = TensorFile(self.file)
        self.state = {
            name: torch.from_numpy(np.array(file[name])) for name in file if isinstance(file.dtypes[name], np.dtype)
        }
        patterns: dict[str, str] = {}
        for name in self.state:
            patterns[re.sub(r"\d+", "{}", name)] = name  # the last one: not the layer that sizes are read off first
        self.names = sorted(patterns.values())

    def save(self, state: dict) -> None:
        if self.file.suffix == ".safetensors":
            safetensors.save_file({k: v.contiguous() for k, v in state.items()}, self.file)
        else:
            torch.save(state, self.file)


def faults(name: str, state: dict) -> dict[str, tuple[dict, str]]:
    """What can be wrong with a key: the tensors then, and what the error must name."""
    others = {key: value for key, value in state.items() if key != name}
    value = state[name]
    return {
        "dropped": (others, name),
        "added": (state | {f"{name}.extra": value.clone()}, f"{name}.extra"),
        "renamed": (others | {f"{name}_": value}, f"{name}_"),
        "reshaped": (others | {name: torch.zeros(*value.shape[:-1], 1 + sum(value.shape[-1:]))}, name),
        "flattened": (others | {name: torch.zeros(1, *value.shape)}, name),
        "retyped": (others | {name: value.to(torch.int32)}, name),
    }


KINDS = {
    "emu": ("mini-a/pretrain", "multimodal_encoder/pytorch_model.bin"),
    "instruct": ("mini-a/instruct/Emu-instruct.pt", ""),
    "unet": ("mini-a/pretrain", "unet/diffusion_pytorch_model.safetensors"),
    "vae": ("mini-a/pretrain", "vae/diffusion_pytorch_model.safetensors"),
}


def check(broken: Broken, settings: Settings, unread: str, others: str = "^$") -> None:
    """`unread`: the keys that nothing reads, but known ones; `others`: what is not looked at at all."""
    out = broken.path.with_name("out")
    cases = 0
    names = [name for name in broken.names if not re.search(others, name)]
    for name in names:
        for kind, (state, named) in faults(name, broken.state).items():
            if re.search(unread, name) and kind not in ("added", "renamed"):
                continue  # what nothing reads may be absent, and of any shape
            broken.save(state)
            with pytest.raises(UserError) as error:
                convert(broken.path, out, settings)
            text = str(error.value)
            # Where a size can be read off nowhere else, all others of that size are reported with it.
            assert named in text or published(named) in text, f"{name} {kind}: not named in {text[:500]}"
            left = {path.name for path in broken.path.parent.iterdir()} - {broken.path.name}
            assert not left, f"{name} {kind}: left {left}"
            cases += 1
    print(f"{cases} of {cases} refused")
    assert cases >= 6 * len(names) - 4 * sum(bool(re.search(unread, name)) for name in names)


def published(name: str) -> str:
    """A missing key of a wrapped file is reported by its published name."""
    name = name.replace("decoder.lm.base_model.model.", "decoder.lm.")
    if lora := re.fullmatch(r"(.+)\.(lora_[AB])\.default\.weight", name):
        return f"{lora[2]} of {lora[1]}.weight"
    return name


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_pattern_of_the_published_files(golden, tmp_path, kind):
    folder, file = KINDS[kind]
    if kind in ("unet", "vae"):  # diffusers' names of missing keys are ours: they need not have one name in the files
        return check_diffusers(Broken(golden / folder, file, tmp_path))
    unused = r"^visual\.(norm|head)\.|cformer\.embed_tokens|inv_freq"
    check(Broken(golden / folder, file, tmp_path), SETTINGS, unused)


def check_diffusers(broken: Broken) -> None:
    from emu_jax.checkpoints.convert.diffusers import our_path

    out = broken.path.with_name("out")
    for name in broken.names:
        for kind, (state, named) in faults(name, broken.state).items():
            broken.save(state)
            with pytest.raises(UserError) as error:
                convert(broken.path, out, SETTINGS)
            assert named in str(error.value) or our_path(named) in str(error.value), f"{name} {kind}: {error.value}"
            assert {path.name for path in broken.path.parent.iterdir()} == {broken.path.name}, f"{name} {kind}"


def test_every_pattern_of_transformers_llama(hugging_llama, tmp_path):
    folder, network = hugging_llama
    whole = tmp_path / "whole" / "hf"
    whole.mkdir(parents=True)
    shutil.copy(folder / "config.json", whole)
    safetensors.save_file({k: v.detach().clone() for k, v in network.state_dict().items()}, whole / "model.safetensors")
    (tmp_path / "work").mkdir()
    check(Broken(whole, "model.safetensors", tmp_path / "work"), Settings(), "^$")


def test_every_pattern_of_eva_clip(eva_clip, tmp_path):
    path, _ = eva_clip
    check(Broken(path, "", tmp_path), SETTINGS, r"^visual\.(norm|head)\.", others=r"^text\.|^logit_scale")


@pytest.mark.parametrize("cut", [1, 100, 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_named(golden, tmp_path, kind, cut):
    folder, name = KINDS[kind]
    broken = Broken(golden / folder, name, tmp_path)
    broken.file.write_bytes(broken.file.read_bytes()[:-cut])
    with pytest.raises(UserError, match=re.escape(str(broken.file))) as error:
        convert(broken.path, tmp_path / "out", SETTINGS)
    assert re.search("damaged|truncated after [0-9,]+ ", str(error.value)) and "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {broken.path.name}
