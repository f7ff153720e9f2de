"""Foreign files that several tests read: a LLaMA made by transformers itself, an EVA-CLIP's visual tower."""

import json

import numpy as np
import pytest


@pytest.fixture(scope="session")
def hugging_llama(tmp_path_factory):
    """A random LLaMA of 3 layers with grouped heads, in 4 shards with an index, and the model that wrote it."""
    torch = pytest.importorskip("torch", reason="install .[convert]")
    transformers = pytest.importorskip("transformers", reason="install .[compare]")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=3e-6,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for value in model.parameters():  # norms of one would hide whether they are used
            value.add_(0.1 * torch.randn_like(value))
    folder = tmp_path_factory.mktemp("llama") / "hf"
    total = sum(value.numel() * 4 for value in model.parameters())
    model.save_pretrained(folder, max_shard_size=total // 3)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 4 and (folder / "model.safetensors.index.json").is_file(), files
    return folder, model


@pytest.fixture(scope="session")
def meta_llama(hugging_llama, tmp_path_factory):
    """The same LLaMA as Meta keeps it, cut for two model-parallel processes."""
    import torch

    _, model = hugging_llama
    heads, kv_heads, head = 6, 2, 8
    state = {key: value.detach() for key, value in model.state_dict().items()}

    def pairs(kernel, heads):  # the inverse of what transformers' own conversion of Meta's files does
        return kernel.view(heads, 2, head // 2, -1).transpose(1, 2).reshape(heads * head, -1)

    whole = {
        "tok_embeddings.weight": (state["model.embed_tokens.weight"], 1),
        "norm.weight": (state["model.norm.weight"], None),
        "output.weight": (state["lm_head.weight"], 0),
        "rope.freqs": (torch.ones(head // 2), None),
    }
    # An odd vocabulary cannot be cut in two: Meta's is even.
    whole["output.weight"] = (torch.cat([state["lm_head.weight"], torch.zeros(1, 48)]), 0)
    whole["tok_embeddings.weight"] = (torch.cat([state["model.embed_tokens.weight"], torch.zeros(1, 48)]), 1)
    for i in range(3):
        layer, attn = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
        whole |= {
            f"layers.{i}.attention.wq.weight": (pairs(state[attn + "q_proj.weight"], heads), 0),
            f"layers.{i}.attention.wk.weight": (pairs(state[attn + "k_proj.weight"], kv_heads), 0),
            f"layers.{i}.attention.wv.weight": (state[attn + "v_proj.weight"], 0),
            f"layers.{i}.attention.wo.weight": (state[attn + "o_proj.weight"], 1),
            f"layers.{i}.feed_forward.w1.weight": (state[layer + "mlp.gate_proj.weight"], 0),
            f"layers.{i}.feed_forward.w2.weight": (state[layer + "mlp.down_proj.weight"], 1),
            f"layers.{i}.feed_forward.w3.weight": (state[layer + "mlp.up_proj.weight"], 0),
            f"layers.{i}.attention_norm.weight": (state[layer + "input_layernorm.weight"], None),
            f"layers.{i}.ffn_norm.weight": (state[layer + "post_attention_layernorm.weight"], None),
        }
    folder = tmp_path_factory.mktemp("llama") / "meta"
    folder.mkdir()
    for part in range(2):
        shard = {key: v if axis is None else v.chunk(2, axis)[part].clone() for key, (v, axis) in whole.items()}
        torch.save(shard, folder / f"consolidated.0{part}.pth")
    params = {"dim": 48, "n_heads": 6, "n_kv_heads": 2, "n_layers": 3, "norm_eps": 3e-6}
    params |= {"vocab_size": -1, "multiple_of": 16}
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.fixture(scope="session")
def eva_clip(golden, tmp_path_factory):
    """A CLIP whose visual tower is `mini-a`'s, in the published file's layout; and that tower's tensors."""
    torch = pytest.importorskip("torch", reason="install .[convert]")
    file = golden / "mini-a" / "pretrain" / "multimodal_encoder" / "pytorch_model.bin"
    tower = {k: v for k, v in torch.load(file, weights_only=True).items() if k.startswith("visual.")}
    text = {
        "text.token_embedding.weight": torch.ones(5, 4),
        "text.attn_mask": torch.ones(2, 2, dtype=torch.bool),
        "text.transformer.resblocks.0.ln_1.weight": torch.ones(4),
        "logit_scale": torch.tensor(np.log(100.0)),
    }
    path = tmp_path_factory.mktemp("eva") / "EVA01_CLIP_g_14_plus_psz14_s11B.pt"
    torch.save(tower | text, path)
    return path, tower
