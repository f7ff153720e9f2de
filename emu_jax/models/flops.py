"""FLOPs of the models' forward passes, counted from their configs."""

from __future__ import annotations

from emu_jax.models.emu import EmuConfig
from emu_jax.models.unet import LONG_ATTENTION, UNetConfig


def forward_flops(config: EmuConfig, images: int, rows: int, row_tokens: int) -> dict[str, float]:
    """Analytic matrix-multiplication FLOPs of Emu's forward pass, by part; two per multiply-add.

    `attention` counts the products of queries with keys and of weights with values in the language model, for half of
    S x S because it is causal. `llama` excludes LoRA adapters, which `adapters` counts. A training step takes three
    times as many; recomputation by remat is not useful work and is not counted.
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
    projections = m.projection_sizes()
    llama = row_tokens * m.layers * sum(inputs * outputs for inputs, outputs in projections.values())
    adapters = row_tokens * m.layers * m.lora_rank * sum(sum(projections[name]) for name in m.lora_targets)
    heads = row_tokens * m.width * m.vocab_size
    if config.regression_loss_weight:
        heads += row_tokens * config.visual_head.multiply_adds(m.width)
    heads += row_tokens * config.visual_head.input_multiply_adds(m.width)
    return {
        "vision": 2.0 * images * vision,
        "causal": 2.0 * images * causal,
        "llama": 2.0 * rows * llama,
        "adapters": 2.0 * rows * adapters,
        "attention": 2.0 * rows * m.layers * row_tokens**2 * m.width,
        "heads": 2.0 * rows * heads,
    }


def unet_forward_flops(config: UNetConfig, rows: int, side: int, queries: int) -> dict[str, float]:
    """Analytic FLOPs of one forward pass over latents [rows, side, side, C] and conditions [rows, queries, D].

    Two per multiply-add of convolutions and matrix products. `attention` counts the products of queries with keys and
    of weights with values where attention is fused; `unet` counts everything else.
    """
    c, time = config, 4 * config.block_channels[0]
    work = {"unet": c.block_channels[0] * time + time * time, "attention": 0}  # the time embedding first

    def layer(inputs: int, width: int, side: int, transformer: bool) -> None:
        area = side * side
        work["unet"] += area * 9 * width * (inputs + width) + (area * inputs * width if inputs != width else 0)
        work["unet"] += time * width
        if not transformer:
            return
        projections = 2 + 4 + 2 + 12  # in and out, self-attention, queries and output of cross-attention, gated MLP
        work["unet"] += projections * area * width**2
        work["unet"] += 2 * queries * c.condition_dim * width + 2 * area * queries * width
        work["attention" if area >= LONG_ATTENTION else "unet"] += 2 * area * area * width

    last, width = len(c.block_channels) - 1, c.block_channels[0]
    work["unet"] += 2 * side * side * 9 * c.latent_channels * width  # the first convolution and the last
    skips = [width]
    for i, outputs in enumerate(c.block_channels):
        for _ in range(c.layers_per_block):
            layer(width, outputs, side, c.attention_blocks[i])
            width = outputs
            skips.append(outputs)
        if i < last:
            side = -(-side // 2)
            work["unet"] += side * side * 9 * width * width
            skips.append(width)
    layer(width, width, side, transformer=True)
    layer(width, width, side, transformer=False)
    for i, outputs in reversed([*enumerate(c.block_channels)]):
        for _ in range(c.layers_per_block + 1):
            layer(width + skips.pop(), outputs, side, c.attention_blocks[i])
            width = outputs
        if i:
            side *= 2
            work["unet"] += side * side * 9 * width * width
    return {part: 2.0 * rows * count for part, count in work.items()}
