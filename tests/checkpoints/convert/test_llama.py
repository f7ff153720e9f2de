"""LLaMA from transformers' folders and from Meta's files, and back: logits against transformers itself."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_jax import Emu
from emu_jax.checkpoints.convert import eva_clip as clip
from emu_jax.checkpoints.convert import llama
from emu_jax.checkpoints.convert.conversion import gather
from emu_jax.checkpoints.convert.tensor_files import TensorFile
from emu_jax.checkpoints.load import load_emu
from emu_jax.checkpoints.store import read_meta
from emu_jax.cli import main
from emu_jax.errors import UserError
from emu_jax.models import emu as model
from emu_jax.models.paths import flatten

torch = pytest.importorskip("torch", reason="install .[convert]")

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 11))


def logits_of(fields: dict, params: dict, tokens: np.ndarray) -> np.ndarray:
    """Our language model's logits [B, S, V]."""
    vision = {"image_size": 8, "patch_size": 4, "width": 8, "layers": 1, "heads": 2, "mlp_dim": 8}
    causal = {"queries": 2, "width": 8, "layers": 1, "heads": 2, "head_dim": 4, "mlp_dim": 8}
    config = model.EmuConfig.from_dict({"vision": vision, "causal": causal, "llama": fields})
    whole = model.init(config, jax.random.key(0))
    whole["llama"] = {**params["llama"], "visual_head": whole["llama"]["visual_head"]}
    network = model.bind(config, whole).llama
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = network(network.embed(jnp.asarray(tokens)), positions, jnp.ones_like(positions))
    return np.asarray(network.lm_head(hidden))


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    worst = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"off by {worst:.1e} of the largest magnitude")
    assert worst < 1e-4, f"off by {worst:.1e}, expected below 1e-4"


def theirs(network, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return network(torch.from_numpy(tokens)).logits.numpy()


def load_folder(folder):
    conversion = llama.conversion(folder)
    return conversion.config["model"]["llama"], gather(conversion)["params"]


@pytest.mark.slow
def test_sharded_safetensors_have_transformers_logits(hugging_llama):
    folder, network = hugging_llama
    fields, params = load_folder(folder)
    assert fields["norm_eps"] == 3e-6 and fields["context"] == 128
    assert (fields["heads"], fields["kv_heads"]) == (6, 2)
    assert_close(logits_of(fields, params, TOKENS), theirs(network, TOKENS))


def test_sharded_bin_files_are_the_same(hugging_llama, tmp_path):
    folder, _ = hugging_llama
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shutil.copy(folder / "config.json", tmp_path)
    place = {}
    for name in sorted(set(index["weight_map"].values())):
        file = TensorFile(folder / name)
        other = name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        torch.save({key: torch.from_numpy(file[key].copy()) for key in file}, tmp_path / other)
        place |= dict.fromkeys(file, other)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": place}))
    _, params = load_folder(tmp_path)
    _, expected = load_folder(folder)
    for path, value in flatten(expected).items():
        np.testing.assert_array_equal(flatten(params)[path], value)


@pytest.mark.long
def test_metas_files_are_the_same_model(meta_llama, hugging_llama):
    _, network = hugging_llama
    fields, params = load_folder(meta_llama)
    assert fields["vocab_size"] == 98 and fields["norm_eps"] == 3e-6
    assert_close(logits_of(fields, params, TOKENS)[..., :97], theirs(network, TOKENS))


@pytest.mark.slow
def test_an_exported_language_model_loads_in_transformers(golden, tmp_path):
    transformers = pytest.importorskip("transformers", reason="install .[compare]")
    source = golden / "mini-a"
    assert main(["convert", "--from", str(source), "--to", str(tmp_path / "c"), "--vision-head-dim", "12"]) == 0
    assert main(["export", "--from", str(tmp_path / "c"), "--to", str(tmp_path / "o"), "--format", "llama"]) == 0
    network, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "o", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    fields, params = load_folder(tmp_path / "o")
    tokens = np.random.default_rng(0).integers(0, fields["vocab_size"], (2, 9))
    assert_close(logits_of(fields, params, tokens), theirs(network.eval(), tokens))


def test_exported_shards_have_an_index(hugging_llama, tmp_path, monkeypatch):
    from emu_jax.checkpoints.convert import export

    transformers = pytest.importorskip("transformers", reason="install .[compare]")
    folder, network = hugging_llama
    monkeypatch.setattr(export, "SHARD", 60_000)
    assert main(["convert", "--from", str(folder), "--to", str(tmp_path / "c")]) == 0
    assert main(["export", "--from", str(tmp_path / "c"), "--to", str(tmp_path / "o"), "--format", "llama"]) == 0
    assert len(list((tmp_path / "o").glob("*.safetensors"))) > 3
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "o", dtype=torch.float32).eval()
    np.testing.assert_array_equal(theirs(again, TOKENS), theirs(network, TOKENS))


@pytest.mark.long
def test_lora_loads_in_peft(golden, tmp_path):
    """The language model without LoRA, exported, and the adapter folder, loaded by PEFT: logits of the merged model."""
    transformers = pytest.importorskip("transformers", reason="install .[compare]")
    peft = pytest.importorskip("peft", reason="install .[compare]")
    file = golden / "mini-a" / "instruct" / "Emu-instruct.pt"
    for name, extra in (("apart", []), ("merged", ["--merge-lora"])):
        out = str(tmp_path / name)
        assert main(["convert", "--from", str(file), "--to", out, "--vision-head-dim", "12", *extra]) == 0
    assert main(["export", "--from", str(tmp_path / "apart"), "--to", str(tmp_path / "peft"), "--format", "peft"]) == 0
    # PEFT wants the weights that the adapters belong to: those of the file, not merged.
    state = torch.load(file, weights_only=True)["module"]
    prefix = "decoder.lm.base_model.model."
    base = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix) and "lora" not in k}
    meta = read_meta(tmp_path / "apart")
    described = llama.describe(meta["config"]["model"]["llama"])
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**described))
    missing, _ = network.load_state_dict(base, strict=False)
    assert not missing
    adapted = peft.PeftModel.from_pretrained(network, tmp_path / "peft").eval()
    adapters = {k: v for k, v in adapted.state_dict().items() if "lora" in k}
    assert len(adapters) == 2 * len(meta["source"]["adapters"])
    assert main(["export", "--from", str(tmp_path / "merged"), "--to", str(tmp_path / "o"), "--format", "llama"]) == 0
    fields, params = load_folder(tmp_path / "o")
    tokens = np.random.default_rng(0).integers(0, fields["vocab_size"], (2, 9))
    assert_close(logits_of(fields, params, tokens), theirs(adapted, tokens))


@pytest.mark.slow
def test_adapters_trained_here_load_in_peft(instructed, tmp_path):
    """Over the language model that the same run exports without them; logits are those of the merged model."""
    transformers = pytest.importorskip("transformers", reason="install .[compare]")
    peft = pytest.importorskip("peft", reason="install .[compare]")
    for name, extra in (("peft", []), ("llama-base", []), ("llama", ["--merge-lora"]), ("emu", ["--merge-lora"])):
        out = ["--to", str(tmp_path / name), "--format", name, *extra]
        assert main(["export", "--from", str(instructed), *out]) == 0
    described = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["lora_dropout"]) == (2, 4.0, 0.1)
    assert described["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama-base", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, base.config.vocab_size, (2, 9))
    before = theirs(base.eval(), tokens)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    assert len([k for k in adapted.state_dict() if "lora" in k]) == 3 * 2 * base.config.num_hidden_layers
    found = theirs(adapted, tokens)
    assert np.abs(found - before).max() > 1e-4 * np.abs(found).max(), "adapters that do something"
    fields, params = load_folder(tmp_path / "llama")
    assert_close(logits_of(fields, params, tokens), found)
    emu = Emu.load(instructed)
    network = model.bind(emu.config, emu.params).llama
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = network(network.embed(jnp.asarray(tokens)), positions, jnp.ones_like(positions))
    assert_close(np.asarray(network.lm_head(hidden)), found)


@pytest.mark.slow
def test_adapters_trained_here_come_back(instructed, tmp_path):
    """As Emu-instruct.pt, which holds them apart, and merged; both are the run's model again."""
    for name, extra in (("apart", []), ("merged", ["--merge-lora"])):
        assert main(["export", "--from", str(instructed), "--to", str(tmp_path / name), "--format", "emu", *extra]) == 0
    heads = {"vision_head_dim": 8, "llama_head_dim": 8}
    apart = load_emu(tmp_path / "apart" / "Emu-instruct.pt", merge_lora=False, lora_alpha=4.0, **heads)
    emu = Emu.load(instructed)
    assert apart.config.llama.lora_targets == emu.config.llama.lora_targets
    jax.tree.map(np.testing.assert_array_equal, apart.params, emu.params)
    merged = load_emu(tmp_path / "merged", **heads).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, emu.merged().params)


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama"], "holds LoRA beside its weights; set merge_lora, or export the formats llama-base and peft"),
        (["llama-base", "--merge-lora"], "the format llama-base is without LoRA; use the format llama with merge_lora"),
    ],
)
def test_lora_is_not_lost_without_a_word(instructed, tmp_path, capsys, arguments, message):
    out = ["--to", str(tmp_path / "o"), "--format", *arguments]
    assert main(["export", "--from", str(instructed), *out]) == 2
    assert message in capsys.readouterr().err


def test_eva_clips_visual_tower(eva_clip, golden):
    path, _ = eva_clip
    conversion = clip.conversion(TensorFile(path), vision_head_dim=12)
    expected = load_emu(golden / "mini-a" / "pretrain", vision_head_dim=12).params
    found, wanted = flatten(gather(conversion)["params"]["vision"]), flatten(expected["vision"])
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)
    assert set(conversion.shapes) == {f"params/vision/{name}" for name in wanted}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_key_value_heads", 6, "its config says a kv_heads of 6, its weights 2"),
        ("tie_word_embeddings", True, r"tie_word_embeddings=True \(expected False\)"),
        ("model_type", "mistral", r"model_type='mistral' \(expected 'llama'\)"),
        ("num_attention_heads", 5, "5 attention heads and a width of 48, which do not divide"),
        ("rms_norm_eps", None, "is missing or not a number"),
        ("num_hidden_layers", 2, "its config says a layers of 2, its weights 3"),
        ("vocab_size", 98, "its config says a vocab_size of 98, its weights 97"),
        ("head_dim", 16, "head_dim=16, but 6 heads share a width of 48"),
        ("rope_parameters", {"rope_type": "llama3", "factor": 8.0}, "rope_parameters=.*expected rope_type 'default'"),
        ("rope_scaling", {"type": "linear", "factor": 8.0}, "rope_scaling=.*'linear'.*expected rope_type 'default'"),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}, "rope_scaling=.*expected rope_type 'default'"),
        ("quantization_config", {"quant_method": "gptq"}, "quantization_config=.*expected None"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor=0.5"),
    ],
)
def test_other_models_are_refused(hugging_llama, tmp_path, field, value, message):
    folder, _ = hugging_llama
    shutil.copytree(folder, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(UserError, match=message):
        llama.conversion(tmp_path / "hf")


# What config.json of other ages says of the same weights: changed fields (None: null), and removed ones.
SAME = {
    "of two slices": ({"pretraining_tp": 2}, (), {}),
    "no context": ({}, ("max_position_embeddings",), {"context": 2048}),
    "March 2023": ({"max_sequence_length": 64}, ("max_position_embeddings",), {"context": 64}),
    "nulls": (dict.fromkeys(["rope_scaling", "rope_parameters", "rope_theta", "head_dim", "mlp_bias"]), (), {}),
    "no RoPE": ({}, ("rope_parameters", "rope_theta"), {"rope_base": 10000.0}),
    "RoPE's base": ({"rope_theta": 5e5}, ("rope_parameters",), {"rope_base": 5e5}),
    "RoPE's default": ({"rope_scaling": {"rope_type": "default"}}, (), {}),
    "linear by 1": ({"rope_scaling": {"type": "linear", "factor": 1.0}}, (), {}),
    "swish": ({"hidden_act": "swish", "torch_dtype": "float16", "dtype": "bfloat16"}, (), {}),
    "no epsilon": ({}, ("rms_norm_eps",), {"norm_eps": 1e-6}),
    "no sizes": ({}, ("num_hidden_layers", "intermediate_size", "vocab_size"), {}),
}


@pytest.mark.parametrize(("change", "removed", "fields"), SAME.values(), ids=SAME)
def test_config_json_of_all_ages(hugging_llama, change, removed, fields, tmp_path):
    folder, _ = hugging_llama
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in (config | change).items() if k not in removed}))
    expected = llama._fields(folder / "config.json") | fields
    found = llama._fields(tmp_path / "config.json")
    assert found == {name: value for name, value in expected.items() if name in found}
    assert {"width", "heads", "kv_heads", "norm_eps", "rope_base", "context"} <= set(found)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "factor", "x"]), inner),
    max_leaves=3,
)
KEYS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling")
KEYS += ("rope_parameters", "max_position_embeddings", "head_dim", "vocab_size", "model_type", "tie_word_embeddings")


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4))
def test_any_config_json_is_read_or_refused_in_one_line(tmp_path_factory, change):
    """A number above 0 is read as it is; what is no such number is named."""
    file = tmp_path_factory.mktemp("config") / "config.json"
    base = {"hidden_size": 48, "num_attention_heads": 6, "rms_norm_eps": 1e-5}
    file.write_text(json.dumps(base | change))
    try:
        fields = llama._fields(file)
    except UserError as error:
        text = str(error).removeprefix(f"{file}: ")
        assert "\n" not in text and any(key in text for key in change), text
        return
    assert fields["width"] == change.get("hidden_size", 48)
    assert fields["norm_eps"] == change.get("rms_norm_eps", 1e-5)
    assert fields["kv_heads"] == (change.get("num_key_value_heads") or fields["heads"])
    assert fields["context"] == (change.get("max_position_embeddings") or 2048)


def test_an_index_cannot_lead_out_of_its_folder(hugging_llama, tmp_path):
    folder, _ = hugging_llama
    shutil.copytree(folder, tmp_path / "hf")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    text = index.read_text()
    name = json.loads(text)["weight_map"]["model.norm.weight"]
    index.write_text(text.replace(name, f"../hf/{name}"))
    with pytest.raises(UserError, match=r"lists \.\./hf/.*, which is no file in"):
        llama.conversion(tmp_path / "hf")
    (tmp_path / "hf" / name).unlink()
    index.write_text(text)
    with pytest.raises(UserError, match=f"lists {name}, which is no file in"):
        llama.conversion(tmp_path / "hf")


def test_an_index_must_be_right(hugging_llama, tmp_path):
    folder, _ = hugging_llama
    shutil.copytree(folder, tmp_path / "hf")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    place = json.loads(index.read_text())["weight_map"]
    files = sorted(set(place.values()))
    wrong = dict(place) | {"model.norm.weight": next(f for f in files if f != place["model.norm.weight"])}
    index.write_text(json.dumps({"weight_map": wrong | {"model.extra": files[0]}}))
    with pytest.raises(UserError) as error:
        llama.conversion(tmp_path / "hf")
    assert f"model.norm.weight (in {place['model.norm.weight']}, which" in str(error.value)
    assert f"model.extra (listed in model.safetensors.index.json, absent from {files[0]})" in str(error.value)
