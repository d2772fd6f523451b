"""Self-attention of the decoder: GQA, and M2LA in both layouts, expanded and absorbed.

Notable:
- Scores never exist for the whole context: keys are walked in blocks with a running softmax (Milakov and Gimelshein,
  arXiv 1805.02867; FlashAttention, arXiv 2205.14135), the block sized by the memory budget.
- Expanded rebuilds a block's keys and values from its latents; absorbed folds `kv_b_proj` into query and output
  (DeepSeek-V2, arXiv 2405.04434, section 2.1), so every head reads the same row. They give the same numbers.
- Both layouts share everything after `c | k_r`.
- GQA on CUDA takes PyTorch's fused kernels; M2LA, whose keys and values differ in width, walks blocks there too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right

from ivcore.geometry import AttentionGeometry
from ivcore.schedule import key_block
from ivtorch.cache import KeyValueCache, LatentCache

Form = Literal["auto", "expanded", "absorbed"]


@dataclass(frozen=True)
class Step:
    """What every layer needs to know of the tokens that are going through.

    cos, sin: float32 (S, rope_dim / 2). offset: tokens in the cache before these. room: tokens to make place for.
    budget: bytes of working memory. form: how M2LA attends; "auto" takes the cheaper one.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    offset: int
    room: int
    budget: int
    form: Form = "auto"


def build_attention(geometry: AttentionGeometry, layer: int, eps: float) -> nn.Module:
    """The attention module of a layer."""
    if geometry.kind == "gqa":
        return GroupedQueryAttention(geometry, eps)
    layout = ReleaseLatentAttention if geometry.layout == "release" else NormLatentAttention
    return layout(geometry, layer, eps)


class GroupedQueryAttention(nn.Module):
    """Qwen3's attention: q/k norm on every head, rotary embedding on the whole head."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    def __init__(self, geometry: AttentionGeometry, eps: float) -> None:
        super().__init__()
        self.geometry = geometry
        _add_linears(self, geometry, layer=0)
        self.q_norm = nn.RMSNorm(geometry.head_dim, eps=eps)
        self.k_norm = nn.RMSNorm(geometry.head_dim, eps=eps)

    def forward(self, x: torch.Tensor, step: Step, cache: KeyValueCache) -> torch.Tensor:
        """x: (B, S, hidden) -> (B, S, hidden); appends the keys and values to the cache."""
        batch, length, _ = x.shape
        split = (batch, length, -1, self.geometry.head_dim)
        queries = rotate(self.q_norm(self.q_proj(x).reshape(split)), step, self.geometry.rope_interleave)
        keys = rotate(self.k_norm(self.k_proj(x).reshape(split)), step, self.geometry.rope_interleave)
        queries, keys, values = (t.transpose(1, 2) for t in (queries, keys, self.v_proj(x).reshape(split)))
        cache.append(keys, values, step.offset, step.room)
        total = step.offset + length
        if fused(x.device):
            attended = F.scaled_dot_product_attention(
                queries,
                cache.keys.view(0, total),
                cache.values.view(0, total),
                scale=self.geometry.softmax_scale,
                attn_mask=causal_lower_right(length, total) if length > 1 else None,
                enable_gqa=True,
            )
        else:

            def fetch(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
                return cache.keys.view(start, stop), cache.values.view(start, stop)

            block = key_block(batch * queries.shape[1] * length, 0, step.budget, x.itemsize)
            attended = attend(queries, fetch, total, self.geometry.softmax_scale, block)
        return self.o_proj(attended.transpose(1, 2).reshape(batch, length, -1))


class LatentAttention(nn.Module):
    """M2LA from `c | k_r` on; a layout says how queries and rows come from x."""

    kv_b_proj: nn.Linear
    o_proj: nn.Linear

    def __init__(self, geometry: AttentionGeometry, layer: int, eps: float) -> None:
        super().__init__()
        self.geometry = geometry
        self.rank = geometry.latent_ranks[layer]
        self.rope_heads = geometry.rope_heads[layer]
        self.absorbed_below = geometry.absorbed_below(layer)
        _add_linears(self, geometry, layer)
        if geometry.latent_norm:
            self.kv_a_layernorm = nn.RMSNorm(self.rank, eps=eps)

    @abstractmethod
    def project(self, x: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x: (B, S, hidden) -> q_nope (B, S, H, dn), q_rope (B, S, H, R * dr), c | k_r (B, S, r + R * dr)."""

    def forward(self, x: torch.Tensor, step: Step, cache: LatentCache) -> torch.Tensor:
        """x: (B, S, hidden) -> (B, S, hidden); appends one row a token to the cache."""
        batch, length, _ = x.shape
        q_nope, q_rope, rows = self.project(x, step)
        cache.append(rows, step.offset, step.room)
        q_nope, q_rope = q_nope.transpose(1, 2), q_rope.transpose(1, 2)
        absorb = step.form == "absorbed" or (step.form == "auto" and length < self.absorbed_below)
        form = self._absorbed if absorb else self._expanded
        attended = form(q_nope, q_rope, cache, step)  # (B, H, S, dv)
        return self.o_proj(attended.transpose(1, 2).reshape(batch, length, -1))

    def _expanded(self, q_nope: torch.Tensor, q_rope: torch.Tensor, cache: LatentCache, step: Step) -> torch.Tensor:
        geometry = self.geometry
        batch, heads, length, _ = q_nope.shape

        def fetch(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            rows = cache.rows.view(start, stop)
            rebuilt = self.kv_b_proj(rows[..., : self.rank]).reshape(batch, stop - start, heads, -1)
            rebuilt = rebuilt.transpose(1, 2)  # (B, H, block, dn + dv)
            shared = rows[:, None, :, self.rank :].expand(batch, heads, -1, -1)
            return torch.cat([rebuilt[..., : geometry.nope_dim], shared], dim=-1), rebuilt[..., geometry.nope_dim :]

        queries = torch.cat([q_nope, q_rope], dim=-1)
        key_numbers = batch * heads * (queries.shape[-1] + geometry.v_dim)
        block = key_block(batch * heads * length, key_numbers, step.budget, queries.itemsize)
        return attend(queries, fetch, step.offset + length, geometry.softmax_scale, block)

    def _absorbed(self, q_nope: torch.Tensor, q_rope: torch.Tensor, cache: LatentCache, step: Step) -> torch.Tensor:
        geometry = self.geometry
        batch, heads, length, _ = q_nope.shape
        up = dense_weight(self.kv_b_proj).reshape(heads, -1, self.rank)  # (H, dn + dv, r)
        queries = torch.cat([q_nope @ up[:, : geometry.nope_dim], q_rope], dim=-1)  # (B, H, S, r + R * dr)

        def fetch(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            # The whole row stands in for the value: slicing the latent out of it would copy the cache at every step.
            rows = cache.rows.view(start, stop)[:, None]
            return rows, rows

        block = key_block(batch * heads * length, 0, step.budget, queries.itemsize)
        latent = attend(queries, fetch, step.offset + length, geometry.softmax_scale, block)[..., : self.rank]
        values = latent @ up[:, geometry.nope_dim :].transpose(-1, -2)
        if "kv_b_proj" in geometry.biases:
            # Its part for the keys shifts all scores of a query alike, which the softmax does not see.
            values = values + self.kv_b_proj.bias.reshape(heads, 1, -1)[..., geometry.nope_dim :]
        return values


class ReleaseLatentAttention(LatentAttention):
    """Layout `release`: latent and rotary key straight from x, optional query compression and latent norm."""

    q_proj: nn.Linear
    q_a_proj: nn.Linear
    q_b_proj: nn.Linear
    kv_a_proj_with_mqa: nn.Linear

    def __init__(self, geometry: AttentionGeometry, layer: int, eps: float) -> None:
        super().__init__(geometry, layer, eps)
        if geometry.q_rank is not None:
            self.q_a_layernorm = nn.RMSNorm(geometry.q_rank, eps=eps)

    def project(self, x: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        geometry = self.geometry
        q = self.q_proj(x) if geometry.q_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.reshape(*x.shape[:2], geometry.num_heads, -1)
        down = self.kv_a_proj_with_mqa(x)
        latent, k_rope = down[..., : self.rank], down[..., self.rank :]
        if geometry.latent_norm:
            latent = self.kv_a_layernorm(latent)
        k_rope = rotate(k_rope[:, :, None], step, geometry.rope_interleave)[:, :, 0]
        q_rope = rotate(q[..., geometry.nope_dim :], step, geometry.rope_interleave)
        return q[..., : geometry.nope_dim], q_rope, torch.cat([latent, k_rope], dim=-1)


class NormLatentAttention(LatentAttention):
    """Layout `norm`: the original's q/k norm and projections stay, keys are normalised before they are compressed."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    kv_a_proj: nn.Linear

    def __init__(self, geometry: AttentionGeometry, layer: int, eps: float) -> None:
        super().__init__(geometry, layer, eps)
        self.q_norm = nn.RMSNorm(geometry.head_dim, eps=eps)
        self.k_norm = nn.RMSNorm(geometry.head_dim, eps=eps)
        self.q_rope_scale = nn.Parameter(torch.ones(geometry.num_heads, self.rope_heads, geometry.head_dim))

    def project(self, x: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        geometry = self.geometry
        split = (*x.shape[:2], -1, geometry.head_dim)
        q = self.q_norm(self.q_proj(x).reshape(split))  # (B, S, H, d)
        k = self.k_norm(self.k_proj(x).reshape(split)).reshape(*x.shape[:2], -1)
        down = self.kv_a_proj(torch.cat([k, self.v_proj(x)], dim=-1))
        latent, k_rope = down[..., : self.rank], down[..., self.rank :]
        if geometry.latent_norm:
            latent = self.kv_a_layernorm(latent)
        k_rope = rotate(k_rope.reshape(split), step, geometry.rope_interleave).reshape(k_rope.shape)
        q_rope = (q[..., None, :] * self.q_rope_scale).reshape(*x.shape[:2], -1, geometry.head_dim)
        q_rope = rotate(q_rope, step, geometry.rope_interleave).reshape(*q.shape[:3], -1)
        return q, q_rope, torch.cat([latent, k_rope], dim=-1)


def rotate(x: torch.Tensor, step: Step, interleaved: bool) -> torch.Tensor:
    """Rotary embedding of x (B, S, heads, dr): pairs are (i, i + dr/2), or (2i, 2i + 1) and de-interleaved first."""
    half = x.shape[-1] // 2
    wide = x.float()
    first, second = (wide[..., 0::2], wide[..., 1::2]) if interleaved else (wide[..., :half], wide[..., half:])
    cos, sin = step.cos[:, None], step.sin[:, None]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)


def attend(
    queries: torch.Tensor,
    fetch: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]],
    total: int,
    scale: float,
    block: int,
) -> torch.Tensor:
    """Causal attention of the last S of `total` tokens, the keys walked in blocks.

    queries: (B, H, S, D). fetch(start, stop) -> keys (B, G, stop - start, D), values (B, G, stop - start, Dv), G a
    divisor of H. Returns (B, H, S, Dv). The softmax runs in float32.
    """
    batch, heads, length, width = queries.shape
    offset = total - length
    largest, norm, out = (torch.tensor(start, device=queries.device) for start in (-torch.inf, 0.0, 0.0))
    rows = queries * scale
    for start in range(0, total, block):
        stop = min(start + block, total)
        keys, values = fetch(start, stop)
        groups = keys.shape[1]
        scores = rows.reshape(batch, groups, -1, width) @ keys.transpose(-1, -2)  # (B, G, H/G * S, block)
        scores = scores.float()
        if stop - 1 > offset:
            at = torch.arange(total, device=queries.device)
            seen = at[None, start:stop] <= at[offset:, None]  # (S, block)
            by_token = scores.reshape(batch, heads, length, stop - start)
            scores = by_token.masked_fill(~seen, -torch.inf).reshape(scores.shape)
        new_largest = torch.maximum(largest, scores.amax(dim=-1, keepdim=True))
        weights, decay = torch.exp(scores - new_largest), torch.exp(largest - new_largest)
        norm = norm * decay + weights.sum(dim=-1, keepdim=True)
        out = out * decay + (weights.to(values.dtype) @ values).float()
        largest = new_largest
    return (out / norm).to(queries.dtype).reshape(batch, heads, length, -1)


def dense_weight(linear: nn.Linear) -> torch.Tensor:
    """The (out, in) matrix of a linear layer."""
    return linear.weight


def fused(device: torch.device) -> bool:
    """Whether PyTorch has kernels that write no scores to memory."""
    return device.type == "cuda"


def _add_linears(module: nn.Module, geometry: AttentionGeometry, layer: int) -> None:
    for name, shape in geometry.tensor_shapes(layer).items():
        if name.endswith(".weight") and len(shape) == 2:
            linear = name.removesuffix(".weight")
            module.add_module(linear, nn.Linear(shape[1], shape[0], bias=linear in geometry.biases))
