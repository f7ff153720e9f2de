"""The same Emu in plain PyTorch: the baseline that `benchmark_speed.py` times and `test_torch_parity.py` checks.

In: an `EmuConfig` and our parameter tree (`torch_state`). Out: an `nn.Module` whose `loss` takes the six fields of a
`Batch` as tensors. Written as one would write it for speed: fused projections, `scaled_dot_product_attention`,
fused norms; it works with `torch.compile`. Generation does as the reference does: Hugging Face's beam search with a
growing cache, and visual embeddings that recompute the whole prefix for every query.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emu_jax.models.causal import CausalConfig, relative_buckets
from emu_jax.models.emu import EmuConfig, SpecialIds
from emu_jax.models.llama import LlamaConfig
from emu_jax.models.statistics import EPS as STATISTICS_EPS
from emu_jax.models.vision import VisionConfig

FUSED = {  # our projections and where they stand in a fused one
    "q": ("qkv", 0),
    "k": ("qkv", 1),
    "v": ("qkv", 2),
    "self_q": ("self_qkv", 0),
    "self_k": ("self_qkv", 1),
    "self_v": ("self_qkv", 2),
    "cross_k": ("cross_kv", 0),
    "cross_v": ("cross_kv", 1),
    "gate": ("gate_up", 0),
    "up": ("gate_up", 1),
}
Cache = list[tuple[Tensor, Tensor]]  # of each layer k, v [B, N, T, H]


def heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, S, N*H] -> [B, N, S, H]."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    """[B, N, S, H] -> [B, S, N*H]."""
    return x.transpose(1, 2).flatten(2)


class VisionBlock(nn.Module):
    """x [N, P+1, D] -> [N, P+1, D]."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.width, c.norm_eps)
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(c.width)) for _ in range(2))
        self.proj = nn.Linear(c.width, c.width)
        self.norm2 = nn.LayerNorm(c.width, c.norm_eps)
        self.fc1 = nn.Linear(c.width, c.mlp_dim)
        self.fc2 = nn.Linear(c.mlp_dim, c.width)
        self.head_dim = c.head_dim

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(self.norm1(x), self.qkv.weight, bias)
        q, k, v = (heads(y, self.head_dim) for y in qkv.chunk(3, -1))
        x = x + self.proj(merge(F.scaled_dot_product_attention(q, k, v)))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Vision(nn.Module):
    """Normalised pixels [N, H, W, 3] -> [N, P+1, D]."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, c.width))
        self.pos_embed = nn.Parameter(torch.zeros(c.patches + 1, c.width))
        self.patch_embed = nn.Linear(c.patch_size**2 * 3, c.width)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.layers))
        self.patch = c.patch_size

    def forward(self, pixels: Tensor) -> Tensor:
        p, (n, height, width, _) = self.patch, pixels.shape
        x = pixels.reshape(n, height // p, p, width // p, p, 3).transpose(2, 3).reshape(n, -1, p * p * 3)
        x = torch.cat([self.cls_token.expand(n, 1, -1), self.patch_embed(x)], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x


class CausalBlock(nn.Module):
    """x [N, Q, W] with features [N, P+1, Dv] -> [N, Q, W]."""

    def __init__(self, c: CausalConfig, features: int):
        super().__init__()
        inner = c.heads * c.head_dim
        self.self_norm = nn.RMSNorm(c.width, c.norm_eps)
        self.self_qkv = nn.Linear(c.width, 3 * inner, bias=False)
        self.self_o = nn.Linear(inner, c.width, bias=False)
        self.cross_norm = nn.RMSNorm(c.width, c.norm_eps)
        self.cross_q = nn.Linear(c.width, inner, bias=False)
        self.cross_kv = nn.Linear(features, 2 * inner, bias=False)
        self.cross_o = nn.Linear(inner, c.width, bias=False)
        self.mlp_norm = nn.RMSNorm(c.width, c.norm_eps)
        self.wi = nn.Linear(c.width, c.mlp_dim, bias=False)
        self.wo = nn.Linear(c.mlp_dim, c.width, bias=False)
        self.head_dim = c.head_dim

    def forward(self, x: Tensor, features: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (heads(y, self.head_dim) for y in self.self_qkv(self.self_norm(x)).chunk(3, -1))
        x = x + self.self_o(merge(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)))
        q = heads(self.cross_q(self.cross_norm(x)), self.head_dim)
        k, v = (heads(y, self.head_dim) for y in self.cross_kv(features).chunk(2, -1))
        x = x + self.cross_o(merge(F.scaled_dot_product_attention(q, k, v, scale=1.0)))
        return x + self.wo(F.relu(self.wi(self.mlp_norm(x))))


class Causal(nn.Module):
    """Features [N, P+1, Dv] -> embeddings [N, Q, D]."""

    def __init__(self, c: CausalConfig, features: int, outputs: int):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(c.queries, c.width))
        self.relative_bias = nn.Parameter(torch.zeros(c.buckets, c.heads))
        self.blocks = nn.ModuleList(CausalBlock(c, features) for _ in range(c.layers))
        self.final_norm = nn.RMSNorm(c.width, c.norm_eps)
        self.projection = nn.Linear(c.width, outputs)
        buckets = relative_buckets(c.queries, c.buckets, c.max_distance)
        self.register_buffer("buckets", torch.tensor(buckets).long(), persistent=False)
        future = torch.full((c.queries, c.queries), float("-inf")).triu(1)
        self.register_buffer("future", future, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        bias = (self.relative_bias[self.buckets].permute(2, 0, 1) + self.future)[None]
        x = self.queries.expand(features.shape[0], -1, -1)
        for block in self.blocks:
            x = block(x, features, bias)
        return self.projection(self.final_norm(x))


class LlamaBlock(nn.Module):
    """x [B, S, D] -> [B, S, D]; with a cache, S new positions after the cache's."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.attn_norm = nn.RMSNorm(c.width, c.norm_eps)
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=False)
        self.o = nn.Linear(c.width, c.width, bias=False)
        self.mlp_norm = nn.RMSNorm(c.width, c.norm_eps)
        self.gate_up = nn.Linear(c.width, 2 * c.mlp_dim, bias=False)
        self.down = nn.Linear(c.mlp_dim, c.width, bias=False)
        self.head_dim = c.head_dim

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        is_causal: bool = False,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = (heads(y, self.head_dim) for y in self.qkv(self.attn_norm(x)).chunk(3, -1))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        x = x + self.o(merge(mixed))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up), (k, v)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, rotate-half: x [B, N, S, H], cos and sin [B, 1, S, H]."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Llama(nn.Module):
    """Inputs [B, S, D] -> post-norm hidden states [B, S, D]."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.embed = nn.Embedding(c.vocab_size, c.width)
        self.blocks = nn.ModuleList(LlamaBlock(c) for _ in range(c.layers))
        self.final_norm = nn.RMSNorm(c.width, c.norm_eps)
        self.lm_head = nn.Linear(c.width, c.vocab_size, bias=False)
        self.regress_head = nn.Linear(c.width, c.width, bias=False)
        frequencies = c.rope_base ** (-torch.arange(0, c.head_dim, 2).float() / c.head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin [B, 1, S, H] for positions [B, S]."""
        angles = positions[..., None] * self.frequencies
        angles = torch.cat([angles, angles], -1)[:, None]
        return angles.cos(), angles.sin()

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        cos, sin = self.tables(positions)
        for block in self.blocks:
            x, _ = block(x, cos, sin, mask)
        return self.final_norm(x)

    def extend(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Hidden states [B, S, D] of S positions after the cache's, without padding, and the longer cache."""
        start = cache[0][0].shape[2] if cache else 0
        cos, sin = self.tables(torch.arange(start, start + x.shape[1])[None])
        grown = []
        for number, block in enumerate(self.blocks):
            x, past = block(x, cos, sin, None, cache is None, cache[number] if cache else None)
            grown.append(past)
        return self.final_norm(x), grown


class TorchEmu(nn.Module):
    """Emu with the interleaved-sequence loss, training mode (standardised by the batch where configured)."""

    def __init__(self, c: EmuConfig, ids: SpecialIds):
        super().__init__()
        self.vision = Vision(c.vision)
        self.ln_visual = nn.LayerNorm(c.vision.width, c.vision.norm_eps)
        self.causal = Causal(c.causal, c.vision.width, c.llama.width)
        self.llama = Llama(c.llama)
        self.config, self.ids = c, ids
        self.register_buffer("pixel_mean", torch.tensor(c.pixel_mean), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(c.pixel_std), persistent=False)

    def encode(self, images: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> [N, Q, D], before standardising."""
        return self.causal(self.ln_visual(self.vision((images.float() / 255 - self.pixel_mean) / self.pixel_std)))

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        segments: Tensor,
        slots: Tensor,
        text_weights: Tensor,
        visual_weights: Tensor,
    ) -> Tensor:
        """The six fields of a `Batch` -> total loss []."""
        c = self.config
        (rows, length), count, queries = tokens.shape, images.shape[1], c.causal.queries
        embeds = self.encode(images.flatten(0, 1))  # [B*I, Q, D]
        if c.standardise:
            used = (slots[:, :, None] == torch.arange(count)).any(1).reshape(-1, 1, 1).float()
            total = used.sum().clamp(min=1)
            mean = (embeds * used).sum(0) / total
            variance = ((embeds - mean).square() * used).sum(0) / total
            embeds = (embeds - mean) * torch.rsqrt(variance + STATISTICS_EPS)
        index = torch.arange(length)
        visual = slots >= 0
        query = index - torch.where(tokens == self.ids.img, index, 0).cummax(1).values - 1
        source = torch.where(visual, slots * queries + query, 0) + torch.arange(rows)[:, None] * count * queries
        visuals = embeds.flatten(0, 1)[source]  # [B, S, D]
        if c.stop_target_inputs:
            visuals = torch.where(visual_weights[..., None] > 0, visuals.detach(), visuals)
        inputs = torch.where(visual[..., None], visuals, self.llama.embed(tokens))
        starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
        positions = index - torch.where(starts, index, 0).cummax(1).values
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        mask = (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]
        hidden = self.llama(inputs, positions, mask)[:, :-1]
        logits = self.llama.lm_head(hidden).flatten(0, 1)
        text = F.cross_entropy(logits, tokens[:, 1:].flatten().long(), reduction="none")
        text = (text * text_weights[:, 1:].flatten()).sum() / text_weights.sum().clamp(min=1e-6)
        distance = (self.llama.regress_head(hidden) - inputs[:, 1:].detach()).square().mean(-1)
        regression = (distance * visual_weights[:, 1:]).sum() / visual_weights.sum().clamp(min=1e-6)
        return c.text_loss_weight * text + c.regression_loss_weight * regression

    @torch.inference_mode()
    def generate_embeddings(self, prefix: Tensor) -> Tensor:
        """Q visual embeddings [B, Q, D] after inputs [B, T, D] that end in [IMG]; the whole prefix each time."""
        for _ in range(self.config.causal.queries):
            hidden, _ = self.llama.extend(prefix)
            prefix = torch.cat([prefix, self.llama.regress_head(hidden[:, -1:])], 1)
        return prefix[:, -self.config.causal.queries :]

    @torch.inference_mode()
    def beam_search(self, prefix: Tensor, beams: int, new_tokens: int, eos: int) -> list[int]:
        """The best continuation (token ids) of inputs [1, T, D]; scores are sums of log p (no length penalty)."""
        hidden, cache = self.llama.extend(prefix.expand(beams, -1, -1))
        scores = torch.full((beams,), -1e9)
        scores[0] = 0.0
        rows: list[list[int]] = [[] for _ in range(beams)]
        finished: list[tuple[float, list[int]]] = []
        for step in range(new_tokens):
            logp = F.log_softmax(self.llama.lm_head(hidden[:, -1]), -1) + scores[:, None]
            best, at = logp.flatten().topk(2 * beams)
            kept: list[tuple[float, int, int]] = []
            for score, flat in zip(best.tolist(), at.tolist(), strict=True):
                row, token = divmod(flat, logp.shape[1])
                if token == eos:
                    finished.append((score, rows[row]))
                elif len(kept) < beams:
                    kept.append((score, row, token))
            finished = sorted(finished, key=lambda pair: -pair[0])[:beams]
            if len(finished) == beams and finished[-1][0] >= kept[0][0]:
                break
            scores = torch.tensor([score for score, _, _ in kept])
            rows = [[*rows[row], token] for _, row, token in kept]
            if step + 1 == new_tokens:
                break
            order = torch.tensor([row for _, row, _ in kept])
            cache = [(k.index_select(0, order), v.index_select(0, order)) for k, v in cache]
            tokens = torch.tensor([[token] for _, _, token in kept])
            hidden, cache = self.llama.extend(self.llama.embed(tokens), cache)
        finished += [(float(score), row) for score, row in zip(scores, rows, strict=True)]
        return max(finished, key=lambda pair: pair[0])[1]


def torch_state(params: dict[str, Any], config: EmuConfig) -> dict[str, Tensor]:
    """Our parameter tree as `TorchEmu`'s state dict. Linear in every leaf, so it maps gradients as well."""
    layers = {"vision": config.vision.layers, "causal": config.causal.layers, "llama": config.llama.layers}
    flat: dict[str, np.ndarray] = {}

    def visit(node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, dict):
            for name, child in node.items():
                visit(child, (*path, name))
            return
        array = np.asarray(node, np.float32)
        if "blocks" in path:
            part, _, *rest = path
            for number in range(layers[part]):
                flat[".".join((part, "blocks", str(number), *rest))] = array[number]
        else:
            flat[".".join(path)] = array

    visit(params, ())
    prefixes = {"attn": "", "mlp": "", "self_attn": "self_", "cross_attn": "cross_"}
    kinds = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for name, array in flat.items():
        *modules, kind = name.split(".")
        if kind == "kernel":
            array = array.T
        if modules and modules[-1] in prefixes:  # q_bias and v_bias of vision's attention
            modules.pop()
        if len(modules) > 1 and modules[-2] in prefixes:
            modules[-2:] = [prefixes[modules[-2]] + modules[-1]]
        place = 0
        if modules and modules[-1] in FUSED:
            modules[-1], place = FUSED[modules[-1]]
        target = ".".join([*modules, kinds.get(kind, kind)])
        pieces.setdefault(target, []).append((place, torch.from_numpy(np.array(array))))
    return {name: torch.cat([x for _, x in sorted(parts, key=lambda part: part[0])]) for name, parts in pieces.items()}
