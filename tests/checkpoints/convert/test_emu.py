"""The table between published keys and our parameters: complete, exact in both directions, and strict."""

import ast
import dataclasses
import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_jax.checkpoints.convert import emu as convert
from emu_jax.checkpoints.convert.emu_keys import TABLE, TRANSFORMS, UNUSED
from emu_jax.checkpoints.convert.tensor_files import TensorFile
from emu_jax.checkpoints.load import load_emu
from emu_jax.errors import UserError
from emu_jax.models import emu

torch = pytest.importorskip("torch", reason="PyTorch files need PyTorch; install .[convert]")
pytest.importorskip("safetensors", reason="install .[convert]")

SMALL = {
    "vision": {"image_size": 8, "patch_size": 4, "width": 12, "layers": 2, "heads": 3, "mlp_dim": 7},
    "causal": {"queries": 3, "width": 10, "layers": 3, "heads": 2, "head_dim": 4, "mlp_dim": 9, "buckets": 8},
    "llama": {"vocab_size": 11, "width": 24, "layers": 4, "heads": 3, "mlp_dim": 13},
}
HEADS = {"vision_head_dim": 4, "llama_head_dim": 8}
PEFT = "decoder.lm.base_model.model."


def draw(shapes, seed=0):
    """A state dict of random tensors."""
    rng = np.random.default_rng(seed)
    return {key: torch.from_numpy(rng.standard_normal(s).astype(np.float32)) for key, s in shapes.items()}


def draw_params(config):
    """Random parameters of a model of these sizes."""
    rng = np.random.default_rng(0)
    abstract = emu.abstract(emu.EmuConfig.from_dict(config))
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), abstract)


def save(tensors, path):
    torch.save(tensors, path)
    return path


def as_emu_i(tensors, rank=2):
    """The same weights as Emu-I's file keeps them, with adapters on the LLM's attention."""
    state, extra = {}, {}
    for key, tensor in tensors.items():
        name = key.replace("decoder.lm.", PEFT, 1)
        state[name] = tensor
        if ".self_attn." in key and key.startswith("decoder.lm.") and tensor.ndim == 2:
            stem = name.removesuffix(".weight")
            extra[f"{stem}.lora_A.default.weight"] = (rank, tensor.shape[1])
            extra[f"{stem}.lora_B.default.weight"] = (tensor.shape[0], rank)
    return state | draw(extra, seed=1)


def faults(error):
    """The summary and the set of the lines below it."""
    summary, *rest = str(error.value).split("\n")
    return summary, {line.strip() for line in rest}


# ---------------------------------------------------------------------------------------------- the table


def test_transforms_place_every_element():
    x = np.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)  # [D, 3, p, p]
    ours = TRANSFORMS["patches"].forward(x)
    assert ours.shape == (12, 2)
    for d, c, ph, pw in np.ndindex(2, 3, 2, 2):
        assert ours[(ph * 2 + pw) * 3 + c, d] == x[d, c, ph, pw]
    np.testing.assert_array_equal(TRANSFORMS["transpose"].forward(np.array([[1, 2, 3]])), [[1], [2], [3]])
    np.testing.assert_array_equal(TRANSFORMS["squeeze"].forward(np.array([[[1, 2]]])), [[1, 2]])


@given(name=st.sampled_from(sorted(TRANSFORMS)), a=st.integers(1, 5), b=st.integers(1, 5))
def test_transforms_invert(name, a, b):
    shape = {"identity": (a, b), "transpose": (a, b), "squeeze": (1, a, b), "patches": (a, 3, b, b)}[name]
    x = np.random.default_rng(0).standard_normal(shape)
    transform = TRANSFORMS[name]
    np.testing.assert_array_equal(transform.inverse(transform.forward(x)), x)


def test_the_table_repeats_nothing():
    keys, paths, names = zip(*TABLE, strict=True)
    assert len(set(keys)) == len(keys)
    assert len(set(paths)) == len(paths)
    assert set(names) == set(TRANSFORMS)
    assert not {key for key, _ in UNUSED} & set(keys)
    expanded = [rule.key for rule in convert.table(SMALL)]
    assert len(set(expanded)) == len(expanded)
    assert sum("relative_attention_bias" in key for key in expanded) == 1


def test_the_table_covers_the_parameters_of_the_model():
    rules = convert.table(SMALL)
    leaves = jax.tree.leaves_with_path(emu.abstract(emu.EmuConfig.from_dict(SMALL)))
    paths = {"/".join(part.key for part in path) for path, _ in leaves}
    assert {rule.path for rule in rules} == paths
    assert [r.layer for r in rules if r.path == "causal/blocks/mlp/wi/kernel"] == [0, 1, 2]


# ------------------------------------------------------------------------------------------- the 14B model


@pytest.mark.parametrize(
    ("name", "keys", "vocab", "adapters"), [("pretrain", 1096, 32004, 0), ("instruct", 1416, 32006, 160)]
)
def test_the_published_keys_map_with_nothing_left_over(golden, name, keys, vocab, adapters):
    rows = [line.split("\t") for line in (golden / f"emu-14b-{name}-keys.tsv").read_text().splitlines()]
    shapes = {key: ast.literal_eval(shape) for key, shape, _ in rows}
    assert len(shapes) == len(rows) == keys

    matched = convert.match(shapes)
    read = [*matched.names.values(), *(key for pair in matched.adapters.values() for key in pair), *matched.unused]
    assert sorted(read) == sorted(shapes)  # every key once
    assert len(matched.adapters) == adapters
    assert len(matched.unused) == 45  # norm and head of the vision encoder, T5's vocabulary, 40 inv_freq

    config = emu.EmuConfig.from_dict(matched.config)
    assert json.loads(json.dumps(matched.config)) == matched.config
    assert (config.vision.width, config.vision.layers, config.vision.heads) == (1408, 40, 16)
    assert (config.vision.image_size, config.vision.patch_size, config.vision.mlp_dim) == (224, 14, 6144)
    assert (config.causal.queries, config.causal.width, config.causal.layers) == (32, 768, 12)
    assert (config.causal.heads, config.causal.head_dim, config.causal.mlp_dim) == (12, 64, 3072)
    assert (config.causal.buckets, config.causal.max_distance) == (32, 128)
    assert (config.llama.vocab_size, config.llama.width, config.llama.layers) == (vocab, 5120, 40)
    assert (config.llama.heads, config.llama.mlp_dim) == (40, 13824)
    total = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(emu.abstract(config)))
    assert round(total / 1e9, 1) == 14.2


# --------------------------------------------------------------------------------------------------- mini-a


def test_mini_a_round_trip_is_bitwise(golden):
    file = golden / "mini-a" / "pretrain" / "multimodal_encoder" / "pytorch_model.bin"
    loaded = load_emu(golden / "mini-a" / "pretrain", vision_head_dim=12)
    config, params, source = loaded.config, loaded.params, loaded.source
    state = torch.load(file, weights_only=True)
    back = dict(convert.to_published(params, config))
    assert (
        convert.find_weights(golden / "mini-a" / "pretrain") == file
        and source["lora"] is None
        and source["beside"] == []
    )
    unused = set(source["unused"])
    assert set(back) | unused == set(state) and not set(back) & unused
    for key, array in back.items():
        assert array.flags.c_contiguous
        assert array.dtype == np.float32 and array.shape == tuple(state[key].shape)
        assert array.tobytes() == state[key].numpy().tobytes(), key
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(("kind", "path"), [("pretrain", "pretrain"), ("instruct", "instruct/Emu-instruct.pt")])
def test_mini_a_sizes_are_those_of_the_reference(golden, kind, path):
    config = dataclasses.asdict(load_emu(golden / "mini-a" / path, vision_head_dim=12).config)
    reference = json.loads((golden / "mini-a" / kind / "reference.json").read_text())["config"]
    vision, causal, llama = config["vision"], config["causal"], config["llama"]
    wanted = reference["vision_cfg"]
    assert (vision["image_size"], vision["patch_size"]) == (wanted["image_size"], wanted["patch_size"])
    assert (vision["width"], vision["layers"]) == (wanted["width"], wanted["layers"])
    assert vision["width"] // vision["heads"] == wanted["head_width"]
    wanted = reference["causal_former"]
    assert (causal["width"], causal["head_dim"], causal["mlp_dim"]) == (
        wanted["d_model"],
        wanted["d_kv"],
        wanted["d_ff"],
    )
    assert (causal["layers"], causal["heads"]) == (wanted["num_layers"], wanted["num_heads"])
    assert causal["buckets"] == wanted["relative_attention_num_buckets"]
    assert causal["max_distance"] == wanted["relative_attention_max_distance"]
    assert causal["queries"] == reference["n_causal"]
    wanted = reference["llama"]
    assert (llama["width"], llama["mlp_dim"]) == (wanted["hidden_size"], wanted["intermediate_size"])
    assert (llama["layers"], llama["heads"]) == (wanted["num_hidden_layers"], wanted["num_attention_heads"])
    assert (llama["vocab_size"], llama["norm_eps"]) == (wanted["vocab_size"], wanted["rms_norm_eps"])


def test_mini_a_instruct_has_its_adapters_merged(golden):
    file = golden / "mini-a" / "instruct" / "Emu-instruct.pt"
    loaded = load_emu(file, vision_head_dim=12)
    config, params, source = loaded.config, loaded.params, loaded.source
    state = torch.load(file, weights_only=True)["module"]
    assert source["lora"] == {"ranks": [16], "targets": ["q", "k", "v", "o"], "alpha": 16.0, "merged": True}
    assert len(source["adapters"]) == 4 * config.llama.layers
    back = dict(convert.to_published(params, config))
    for key, array in back.items():
        name = key.replace("decoder.lm.", PEFT, 1)
        tensor = state[name].numpy()
        if key in source["adapters"]:
            stem = name.removesuffix(".weight")
            a, b = (state[f"{stem}.lora_{side}.default.weight"].double().numpy() for side in "AB")
            assert np.abs(b @ a).max() > 1e-3  # the check below is of something
            np.testing.assert_allclose(array, tensor + b @ a, rtol=1e-6, atol=1e-6)  # alpha / r = 16 / 16
        else:
            assert array.tobytes() == tensor.tobytes(), key


def test_the_folder_above_pretrain_is_the_pretrained_model(golden):
    assert convert.find_weights(golden / "mini-a") == convert.find_weights(golden / "mini-a" / "pretrain")


def test_a_folder_without_weights_points_at_the_file_in_it(golden, tmp_path):
    with pytest.raises(UserError, match=r"expected multimodal_encoder/pytorch_model\.bin") as error:
        load_emu(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"pass .*Emu-instruct\.pt"):
        load_emu(golden / "mini-a" / "instruct")


# -------------------------------------------------------------------------------------- both ways, any sizes


@settings(max_examples=15)
@given(st.data())
def test_sizes_are_read_off_the_shapes_of_any_model(data):
    def size(low=1, high=5):
        return data.draw(st.integers(low, high))

    patch, side = size(), size()
    vision_head, llama_head = size(), 2 * size()
    vision_heads, llama_heads = size(), size()
    kv_heads = data.draw(st.sampled_from([n for n in range(1, llama_heads + 1) if llama_heads % n == 0]))
    config = {
        "vision": {"image_size": patch * side, "patch_size": patch, "width": vision_head * vision_heads}
        | {"layers": size(), "heads": vision_heads, "mlp_dim": size(), "norm_eps": 1e-6, "drop_path": 0.0},
        "causal": {"queries": size(), "width": size(), "layers": size(), "heads": size(), "head_dim": size()}
        | {"mlp_dim": size(), "buckets": size(), "max_distance": 128, "norm_eps": 1e-6, "dropout": 0.1},
        "llama": {"vocab_size": size(), "width": llama_head * llama_heads, "layers": size(), "heads": llama_heads}
        | {"kv_heads": kv_heads, "mlp_dim": size(), "norm_eps": 1e-6, "rope_base": 10000.0, "context": 2048},
    }
    shapes = convert.published_shapes(config)
    frequencies = {"decoder.lm.model.layers.0.self_attn.rotary_emb.inv_freq": (llama_head // 2,)}
    found = convert.infer_config(shapes | frequencies, vision_head_dim=vision_head)
    assert {part: found[part] for part in config} == config
    without = convert.infer_config(shapes, vision_head_dim=vision_head, llama_head_dim=llama_head)
    assert without == found


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_our_parameters_survive_the_way_out_and_back(tmp_path, suffix):
    config, params = emu.EmuConfig.from_dict(SMALL), draw_params(SMALL)
    tensors = {key: torch.from_numpy(array.copy()) for key, array in convert.to_published(params, config)}
    path = tmp_path / f"w{suffix}"
    if suffix == ".bin":
        torch.save(tensors, path)
    else:
        from safetensors.torch import save_file

        save_file(tensors, path)
    loaded = load_emu(path, **HEADS)
    found, again = dataclasses.asdict(loaded.config), loaded.params
    assert {part: SMALL[part].items() <= found[part].items() for part in SMALL} == dict.fromkeys(SMALL, True)
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_bfloat16_weights_are_read_and_kept(tmp_path):
    tensors = {key: tensor.bfloat16() for key, tensor in draw(convert.published_shapes(SMALL)).items()}
    path = save(tensors, tmp_path / "w.bin")
    wide = load_emu(path, **HEADS).params
    loaded = load_emu(path, dtype="bfloat16", **HEADS)
    config, narrow = loaded.config, loaded.params
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {np.dtype(np.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {np.dtype(ml_dtypes.bfloat16)}
    for key, array in convert.to_published(wide, config):
        np.testing.assert_array_equal(array, tensors[key].float().numpy())
    for key, array in convert.to_published(narrow, config):
        assert array.view(np.uint16).tobytes() == tensors[key].view(torch.uint16).numpy().tobytes()
    with pytest.raises(UserError, match="dtype='int8'"):
        load_emu(path, dtype="int8", **HEADS)


def test_adapters_are_merged_in_float32_at_their_own_rank_and_alpha(tmp_path):
    plain = {key: tensor.bfloat16() for key, tensor in draw(convert.published_shapes(SMALL)).items()}
    state = as_emu_i(plain)
    path = save({"module": state, "step": 5}, tmp_path / "Emu-instruct.pt")
    loaded = load_emu(path, lora_alpha=8.0, **HEADS)
    config, params, source = loaded.config, loaded.params, loaded.source
    assert source["beside"] == ["step"] and source["lora"]["ranks"] == [2]
    assert len(source["adapters"]) == 16
    merged = dict(convert.to_published(params, config))
    key = "decoder.lm.model.layers.3.self_attn.k_proj.weight"
    stem = key.replace("decoder.lm.", PEFT, 1).removesuffix(".weight")
    a, b = (state[f"{stem}.lora_{side}.default.weight"].numpy() for side in "AB")
    np.testing.assert_allclose(merged[key], plain[key].float().numpy() + 4.0 * (b @ a), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "base"),
    [(".default", ""), ("", ""), (".emu", ""), (".default", ".base_layer"), ("", ".base_layer")],
)
def test_adapters_under_pefts_names_are_the_same(golden, name, base):
    """A model's state of today, a file of adapters, an adapter with a name, and weights below `base_layer`."""
    shapes = TensorFile(golden / "mini-a" / "instruct" / "Emu-instruct.pt").shapes
    expected = convert.match(shapes, vision_head_dim=12)
    adapted = {a.split(".lora_")[0] for a, _ in expected.adapters.values()}

    def renamed(key: str) -> str:
        weight = key.removesuffix(".weight")
        return f"{weight}{base}.weight" if weight in adapted else re.sub(r"(\.lora_[AB])\.default", rf"\1{name}", key)

    found = convert.match({renamed(key): shape for key, shape in shapes.items()}, vision_head_dim=12)
    assert found.adapters == {key: tuple(map(renamed, pair)) for key, pair in expected.adapters.items()}
    assert found.names == {key: renamed(name) for key, name in expected.names.items()}


def test_a_second_adapter_is_refused(golden):
    shapes = TensorFile(golden / "mini-a" / "instruct" / "Emu-instruct.pt").shapes
    key = next(key for key in shapes if ".lora_A.default." in key)
    other = key.replace(".default.", ".other.")
    message = r"1 unknown: .*lora_A\.other\.weight \(a second adapter, beside 'default'; keep one"
    with pytest.raises(UserError, match=message):
        convert.match(shapes | {other: shapes[key]}, vision_head_dim=12)


def test_a_flattened_module_prefix_is_the_same_file(tmp_path):
    tensors = draw(convert.published_shapes(SMALL))
    one = load_emu(save(tensors, tmp_path / "a.bin"), **HEADS).params
    flat = {f"module.{key}": tensor for key, tensor in tensors.items()}
    two = load_emu(save(flat, tmp_path / "b.bin"), **HEADS).params
    jax.tree.map(np.testing.assert_array_equal, one, two)


# ------------------------------------------------------------------------------------------------- strictness


def test_all_faults_are_reported_together(tmp_path):
    tensors = as_emu_i(draw(convert.published_shapes(SMALL)))
    query = f"{PEFT}model.layers.1.self_attn.q_proj"
    del tensors["visual.pos_embed"]  # the only tensor that tells the image's size
    del tensors["cformer.cformer.block.1.layer.2.DenseReluDense.wo.weight"]
    del tensors[f"{query}.lora_B.default.weight"]
    tensors["visual.blocks.0.attn.k_bias"] = torch.ones(12)
    tensors["visual.blocks.70.norm1.bias"] = torch.ones(12)
    tensors[f"{PEFT}model.embed_tokens.lora_A.default.weight"] = torch.ones(2, 11)
    tensors["ln_visual.bias"] = torch.ones(13)
    tensors["cformer.cformer.final_layer_norm.weight"] = torch.ones(11)
    tensors[f"{query.replace('.1.', '.2.')}.lora_A.default.weight"] = torch.ones(2, 23)
    tensors["decoder.lm.model.norm.weight"] = torch.ones(24)
    tensors["ln_visual.weight"] = torch.ones(12, dtype=torch.int64)
    tensors["epoch"] = 3
    path = save(tensors, tmp_path / "w.bin")
    with pytest.raises(UserError) as error:
        load_emu(path, **HEADS)
    summary, lines = faults(error)
    assert summary == (
        f"{path}: does not fit the published Emu's layout, nothing was loaded: "
        "4 unknown, 1 unreadable, 1 repeated, 3 missing, 1 unknown size, 3 misshapen"
    )
    assert lines == {
        "unknown: epoch (int, not a tensor)",
        "unreadable: ln_visual.weight (int64, expected a floating type of 16 to 64 bits)",
        f"repeated: decoder.lm.model.norm.weight (the same tensor as {PEFT}model.norm.weight)",
        "missing: visual.pos_embed (for vision/pos_embed)",
        "missing: cformer.cformer.block.1.layer.2.DenseReluDense.wo.weight (for causal/blocks/mlp/wo/kernel)",
        "missing: lora_B of decoder.lm.model.layers.1.self_attn.q_proj.weight "
        f"(the pair of {query}.lora_A.default.weight)",
        "unknown: visual.blocks.0.attn.k_bias",
        "unknown: visual.blocks.70.norm1.bias",
        f"unknown: {PEFT}model.embed_tokens.lora_A.default.weight "
        "(decoder.lm.model.embed_tokens.weight is not a matrix to adapt)",
        "unknown size: positions (read off the shape of visual.pos_embed)",
        "misshapen: ln_visual.bias ((13,), expected (12,) for ln_visual/bias)",
        "misshapen: cformer.cformer.final_layer_norm.weight ((11,), expected (10,) for causal/final_norm/scale)",
        f"misshapen: {query.replace('.1.', '.2.')}.lora_A.default.weight "
        f"((2, 23), with {query.replace('.1.', '.2.')}.lora_B.default.weight (24, 2); "
        "expected (r, in) and (out, r) of (24, 24))",
    }


@settings(max_examples=25)
@given(st.data())
def test_any_one_tensor_lost_or_misshapen_is_found(data):
    shapes = convert.published_shapes(SMALL)
    key = data.draw(st.sampled_from(sorted(shapes)))
    with pytest.raises(UserError, match="missing"):
        convert.match({k: s for k, s in shapes.items() if k != key}, **HEADS)
    wrong = (*shapes[key][:-1], shapes[key][-1] + 1)
    # A lost axis, or an odd width that no other tensor has.
    for shape in (wrong, shapes[key][:-1]):
        with pytest.raises(UserError) as error:
            convert.match(shapes | {key: shape}, **HEADS)
        assert f"{key} ({shape}, expected " in str(error.value)


def test_one_wrong_tensor_is_one_fault_in_one_line():
    shapes = convert.published_shapes(SMALL) | {"cformer.cformer.final_layer_norm.weight": (99,)}
    with pytest.raises(UserError) as error:
        convert.match(shapes, where="w.bin", **HEADS)
    assert str(error.value) == (
        "w.bin: does not fit the published Emu's layout, nothing was loaded: 1 misshapen: "
        "cformer.cformer.final_layer_norm.weight ((99,), expected (10,) for causal/final_norm/scale)"
    )


def test_a_lost_layer_is_missed_key_by_key():
    shapes = convert.published_shapes(SMALL)
    kept = {key: shape for key, shape in shapes.items() if ".layers.2." not in key}
    with pytest.raises(UserError) as error:
        convert.match(kept, **HEADS)
    summary, lines = faults(error)
    assert summary.endswith(": 9 missing") and len(lines) == 9
    assert all("decoder.lm.model.layers.2." in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"vision_head_dim": 5}, "vision_head_dim (5 does not divide the vision width 12"),
        ({"vision_head_dim": 0}, "vision_head_dim (0 does not divide the vision width 12"),
        ({"llama_head_dim": 7}, "llama_head_dim (7 does not divide the llama width 24"),
        ({"llama_head_dim": 3}, "even head width"),
    ],
)
def test_head_widths_that_do_not_fit_are_named(arguments, says):
    with pytest.raises(UserError) as error:
        convert.match(convert.published_shapes(SMALL), **HEADS | arguments)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_default_head_width_does_not_divide_mini_a(golden):
    with pytest.raises(UserError, match="vision_head_dim"):
        load_emu(golden / "mini-a" / "pretrain")


def test_another_model_is_refused_as_a_whole():
    with pytest.raises(UserError) as error:
        convert.match({"model.layers.0.self_attn.q_proj.weight": (8, 8)})
    summary, lines = faults(error)
    assert "1 unknown" in summary
    assert "unknown: model.layers.0.self_attn.q_proj.weight" in lines
    assert "missing: visual.cls_token (for vision/cls_token)" in lines


def test_parameters_of_another_config_are_refused_before_anything_is_written():
    params = draw_params(SMALL)
    params["ln_visual"] = {"scale": params["ln_visual"]["scale"][1:], "offset": params["ln_visual"]["bias"]}
    with pytest.raises(UserError) as error:
        convert.to_published(params, SMALL)
    _, lines = faults(error)
    assert lines == {
        "missing: ln_visual/bias",
        "unknown: ln_visual/offset",
        "misshapen: ln_visual/scale ((11,), expected (12,))",
    }
