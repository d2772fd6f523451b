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
from ivtorch.lora import LoraLinear

Form = Literal["auto", "expanded", "absorbed"]

SCORED, QUERIES = 1024, 256
"""On a CPU, packed rows of up to so many tokens have their scores written, for so many queries at once, where keys are
wider than values: the fused kernel wants one width and takes 1.4 to 1.7 times as long there (H 8, D 160, Dv 32)."""


@dataclass(frozen=True)
class Packing:
    """Rows of a training batch, each sees itself and the row that it goes on from, in groups of `ivcore.row_groups`.

    groups: of each the indices (rows, longest) into the S tokens that are seen, and how many columns do not ask. back:
    (S,), where each token's result stands in all groups; None where all rows are of one length, and the tokens stand as
    they came.
    """

    groups: list[tuple[torch.Tensor, int]]
    back: torch.Tensor | None


@dataclass(frozen=True)
class Step:
    """What every layer needs to know of the tokens that are going through.

    cos, sin: float32 (S, rope_dim / 2). offset: tokens in the cache before these. room: tokens to make place for.
    budget: bytes of working memory. form: how M2LA attends; "auto" takes the cheaper one. packing: the rows of a
    training batch, which leave nothing in the cache.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    offset: int
    room: int
    budget: int
    form: Form = "auto"
    packing: Packing | None = None


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
        """x: (B, S, hidden) -> (B, S, hidden); appends keys and values to the cache, but for training."""
        batch, length, _ = x.shape
        split = (batch, length, -1, self.geometry.head_dim)
        queries = rotate(self.q_norm(self.q_proj(x).reshape(split)), step, self.geometry.rope_interleave)
        keys = rotate(self.k_norm(self.k_proj(x).reshape(split)), step, self.geometry.rope_interleave)
        queries, keys, values = (t.transpose(1, 2) for t in (queries, keys, self.v_proj(x).reshape(split)))
        if step.packing is None:
            attended = self._over_cache(queries, keys, values, step, cache)
        else:
            attended = attend_rows(queries, keys, values, step.packing, self.geometry.softmax_scale)
        return self.o_proj(attended.transpose(1, 2).reshape(batch, length, -1))

    def _over_cache(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: Step, cache: KeyValueCache
    ) -> torch.Tensor:
        """queries: (B, H, S, d), keys, values: (B, G, S, d) -> (B, H, S, d)."""
        batch, heads, length, _ = queries.shape
        cache.append(keys, values, step.offset, step.room)
        total = step.offset + length
        if fused(queries.device):
            return F.scaled_dot_product_attention(
                queries,
                cache.keys.view(0, total),
                cache.values.view(0, total),
                scale=self.geometry.softmax_scale,
                attn_mask=causal_lower_right(length, total) if length > 1 else None,
                enable_gqa=True,
            )

        def fetch(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            return cache.keys.view(start, stop), cache.values.view(start, stop)

        block = key_block(batch * heads * length, 0, step.budget, queries.itemsize)
        return attend(queries, fetch, total, self.geometry.softmax_scale, block)


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
        """x: (B, S, hidden) -> (B, S, hidden); appends one row a token to the cache, but for training."""
        batch, length, _ = x.shape
        q_nope, q_rope, rows = self.project(x, step)
        q_nope, q_rope = q_nope.transpose(1, 2), q_rope.transpose(1, 2)
        if step.packing is None:
            cache.append(rows, step.offset, step.room)
            absorb = step.form == "absorbed" or (step.form == "auto" and length < self.absorbed_below)
            form = self._absorbed if absorb else self._expanded
            attended = form(q_nope, q_rope, cache, step)  # (B, H, S, dv)
        else:
            queries, scale = torch.cat([q_nope, q_rope], dim=-1), self.geometry.softmax_scale
            attended = attend_rows(queries, *self._rebuild(rows), step.packing, scale)
        return self.o_proj(attended.transpose(1, 2).reshape(batch, length, -1))

    def _expanded(self, q_nope: torch.Tensor, q_rope: torch.Tensor, cache: LatentCache, step: Step) -> torch.Tensor:
        geometry = self.geometry
        batch, heads, length, _ = q_nope.shape

        def fetch(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            return self._rebuild(cache.rows.view(start, stop))

        queries = torch.cat([q_nope, q_rope], dim=-1)
        key_numbers = batch * heads * (queries.shape[-1] + geometry.v_dim)
        block = key_block(batch * heads * length, key_numbers, step.budget, queries.itemsize)
        return attend(queries, fetch, step.offset + length, geometry.softmax_scale, block)

    def _rebuild(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """c | k_r (B, n, r + R * dr) -> keys (B, H, n, dn + R * dr), values (B, H, n, dv)."""
        batch, length, _ = rows.shape
        heads, nope_dim = self.geometry.num_heads, self.geometry.nope_dim
        rebuilt = self.kv_b_proj(rows[..., : self.rank]).reshape(batch, length, heads, -1)
        rebuilt = rebuilt.transpose(1, 2)  # (B, H, n, dn + dv)
        shared = rows[:, None, :, self.rank :].expand(batch, heads, -1, -1)
        return torch.cat([rebuilt[..., :nope_dim], shared], dim=-1), rebuilt[..., nope_dim:]

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
    if interleaved:
        wide = torch.cat([wide[..., 0::2], wide[..., 1::2]], dim=-1)
    turned = torch.cat([-wide[..., half:], wide[..., :half]], dim=-1)
    cos, sin = (torch.cat([each, each], dim=-1)[:, None] for each in (step.cos, step.sin))
    return (wide * cos + turned * sin).to(x.dtype)


def attend(
    queries: torch.Tensor,
    fetch: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]],
    total: int,
    scale: float,
    block: int,
) -> torch.Tensor:
    """Causal attention of the last S of `total` tokens, the keys walked in blocks.

    queries: (B, H, S, D). fetch(start, stop) -> keys (B, G, stop - start, D), values (B, G, stop - start, Dv), G a
    divisor of H. Returns (B, H, S, Dv). The softmax runs in float32. On a CPU, a prompt whose keys are one block takes
    PyTorch's kernel, which is 2 to 6 times as fast from some hundred tokens on (H 8, D 32 to 160).
    """
    batch, heads, length, width = queries.shape
    offset = total - length
    if queries.device.type == "cpu" and not offset and block >= total:
        return _fused(queries, *fetch(0, total), scale)
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


def attend_rows(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, packing: Packing, scale: float
) -> torch.Tensor:
    """Causal attention within every row of a packed batch, and over the row that it goes on from.

    queries: (1, H, S, D), keys: (1, G, S, D), values: (1, G, S, Dv), G a divisor of H. Returns (1, H, S, Dv).
    """
    seen, asking = [index for index, _ in packing.groups], [index[:, first:] for index, first in packing.groups]
    taken = []
    for each, places in ((queries, asking), (keys, seen), (values, seen)):
        if packing.back is not None:
            each = each.index_select(2, torch.cat([index.flatten() for index in places]))
        by_group = each[0].split([index.numel() for index in places], dim=1)
        shaped = zip(by_group, places, strict=True)
        taken.append([part.unflatten(1, index.shape).transpose(0, 1) for part, index in shaped])
    on_cpu, widened = queries.device.type == "cpu", keys.shape[-1] > values.shape[-1]
    parts = []
    for q, k, v in zip(*taken, strict=True):  # (rows, H or G, longest, ...), of q its own tokens
        attend_to = _scored if on_cpu and widened and k.shape[2] <= SCORED else _fused
        parts.append(attend_to(q, k, v, scale).transpose(0, 1).flatten(1, 2))  # (H, rows * longest, Dv)
    whole = parts[0] if packing.back is None else torch.cat(parts, dim=1).index_select(1, packing.back)
    return whole[None]


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the last tokens of rows, (rows, H, S, D), through PyTorch's kernels that write no scores."""
    width, (asking, seen) = v.shape[-1], (q.shape[2], k.shape[2])
    widest = max(width, q.shape[-1])
    # The kernels want one width; columns of zeros change nothing.
    q, k, v = (F.pad(each, (0, widest - each.shape[-1])) if each.shape[-1] < widest else each for each in (q, k, v))
    mask = causal_lower_right(asking, seen) if asking < seen else None
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, is_causal=mask is None, enable_gqa=True)
    return out[..., :width]


def _scored(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The same with its scores written."""
    rows, heads, length, width = q.shape
    groups, before, parts = k.shape[1], k.shape[2] - length, []
    for start in range(0, length, QUERIES):
        block = (q[:, :, start : start + QUERIES] * scale).reshape(rows, groups, -1, width)  # a group shares its keys
        asking = min(QUERIES, length - start)
        stop = before + start + asking
        scores = (block @ k[:, :, :stop].transpose(-1, -2)).view(rows, heads, asking, stop)
        unseen = torch.full((asking, stop), -torch.inf, dtype=q.dtype, device=q.device).triu(before + start + 1)
        weights = torch.softmax(scores + unseen, dim=-1).view(rows, groups, -1, stop)
        parts.append((weights @ v[:, :, :stop]).view(rows, heads, asking, -1))
    return torch.cat(parts, dim=2)


def dense_weight(linear: nn.Linear | LoraLinear) -> torch.Tensor:
    """The (out, in) matrix of a linear layer, its LoRA included."""
    if isinstance(linear, LoraLinear):
        return dense_weight(linear.base) + linear.delta()
    return linear.weight


def fused(device: torch.device) -> bool:
    """Whether PyTorch has kernels that write no scores to memory."""
    return device.type == "cuda"


def _add_linears(module: nn.Module, geometry: AttentionGeometry, layer: int) -> None:
    for name, shape in geometry.tensor_shapes(layer).items():
        if name.endswith(".weight") and len(shape) == 2:
            linear = name.removesuffix(".weight")
            module.add_module(linear, nn.Linear(shape[1], shape[0], bias=linear in geometry.biases))
