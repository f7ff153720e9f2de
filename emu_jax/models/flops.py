"""What a model costs, counted from its config."""

from __future__ import annotations

from emu_jax.models.emu import EmuConfig


def forward_flops(config: EmuConfig, images: int, rows: int, row_tokens: int) -> dict[str, float]:
    """Analytic matrix-multiplication FLOPs of one forward pass, by part (2 per multiply-add).

    `attention` is the language model's scores and mixtures. Being causal, it counts half of S x S. `adapters` are those
    beside the language model's kernels, which `llama` counts without them. A training step is three times as much;
    recomputation by remat is not useful work and is not counted.
    """
    v, c, m = config.vision, config.causal, config.llama
    tokens, inner = v.patches + 1, c.heads * c.head_dim
    vision_layer = tokens * (4 * v.width**2 + 2 * v.width * v.mlp_dim) + 2 * tokens**2 * v.width
    vision = v.layers * vision_layer + v.patches * 3 * v.patch_size**2 * v.width
    self_attention = c.queries * 4 * c.width * inner + c.queries**2 * inner
    cross_attention = 2 * c.queries * c.width * inner + 2 * tokens * v.width * inner + 2 * c.queries * tokens * inner
    causal = c.layers * (self_attention + cross_attention + 2 * c.queries * c.width * c.mlp_dim)
    causal += c.queries * c.width * m.width
    if c.kind == "pooled":
        causal = c.queries * v.patches * v.width + c.queries * v.width * m.width
    llama = row_tokens * m.layers * (4 * m.width**2 + 3 * m.width * m.mlp_dim)
    adapters = row_tokens * m.layers * m.lora_rank * sum(sum(m.projection_sizes()[name]) for name in m.lora_targets)
    heads = row_tokens * m.width * (m.vocab_size + (m.width if config.regression_loss_weight else 0))
    return {
        "vision": 2.0 * images * vision,
        "causal": 2.0 * images * causal,
        "llama": 2.0 * rows * llama,
        "adapters": 2.0 * rows * adapters,
        "attention": 2.0 * rows * m.layers * row_tokens**2 * m.width,
        "heads": 2.0 * rows * heads,
    }
