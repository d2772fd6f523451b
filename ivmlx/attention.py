"""Self-attention of the decoder: GQA, and M2LA in both layouts, expanded and absorbed.

Notable:
- Scores never exist for the whole context: keys are walked in blocks with a running softmax (Milakov and Gimelshein,
  arXiv 1805.02867; FlashAttention, arXiv 2205.14135), the block sized by the memory budget.
- Expanded rebuilds a block's keys and values from its latents; absorbed folds `kv_b_proj` into query and output
  (DeepSeek-V2, arXiv 2405.04434, section 2.1), so every head reads the same row. They give the same numbers.
- Both layouts share everything after `c | k_r`.
- GQA on Metal takes the fused kernel where there is one for its head dim; a 256-wide M2LA score has none in prefill.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from ivcore.geometry import AttentionGeometry
from ivcore.schedule import key_block, vision_query_block
from ivmlx.cache import KeyValueCache, LatentCache
from ivmlx.lora import LoraLinear
from ivmlx.products import Linear, product, softmax_attention, unpacked, wide_product

Form = Literal["auto", "expanded", "absorbed"]
FUSED_PREFILL_DIMS, FUSED_DECODE_DIMS = (64, 72, 80, 128), (64, 96, 128, 256)


@dataclass(frozen=True)
class Packing:
    """Rows of a training batch, each sees itself and the row that it goes on from, in groups of `ivcore.row_groups`.

    groups: of each the indices (rows, longest) into the S tokens that are seen, and how many columns do not ask. back:
    (S,), where each token's result stands in all groups; None where all rows are of one length, and the tokens stand as
    they came.
    """

    groups: list[tuple[mx.array, int]]
    back: mx.array | None


@dataclass(frozen=True)
class Step:
    """What every layer needs to know of the tokens that are going through.

    cos, sin: float32 (S, rope_dim / 2). offset: tokens in the cache before these. room: tokens to make place for.
    budget: bytes of working memory. form: how M2LA attends; "auto" takes the cheaper one. packing: the rows of a
    training batch, which leave nothing in the cache.
    """

    cos: mx.array
    sin: mx.array
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

    def __call__(self, x: mx.array, step: Step, cache: KeyValueCache) -> mx.array:
        """x: (B, S, hidden) -> (B, S, hidden); appends keys and values to the cache, but for training."""
        batch, length, _ = x.shape
        split = (batch, length, -1, self.geometry.head_dim)
        queries = rotate(self.q_norm(self.q_proj(x).reshape(split)), step, self.geometry.rope_interleave)
        keys = rotate(self.k_norm(self.k_proj(x).reshape(split)), step, self.geometry.rope_interleave)
        queries, keys, values = (t.transpose(0, 2, 1, 3) for t in (queries, keys, self.v_proj(x).reshape(split)))
        if step.packing is None:
            attended = self._over_cache(queries, keys, values, step, cache)
        else:
            attended = attend_rows(queries, keys, values, step.packing, self.geometry.softmax_scale, step.budget)
        return self.o_proj(attended.transpose(0, 2, 1, 3).reshape(batch, length, -1))

    def _over_cache(
        self, queries: mx.array, keys: mx.array, values: mx.array, step: Step, cache: KeyValueCache
    ) -> mx.array:
        """queries: (B, H, S, d), keys, values: (B, G, S, d) -> (B, H, S, d)."""
        batch, heads, length, _ = queries.shape
        cache.append(keys, values, step.offset, step.room)
        total = step.offset + length
        if fused(length, self.geometry.head_dim):
            return mx.fast.scaled_dot_product_attention(
                queries,
                cache.keys.view(0, total),
                cache.values.view(0, total),
                scale=self.geometry.softmax_scale,
                mask="causal" if length > 1 else None,
            )

        def fetch(start: int, stop: int) -> tuple[mx.array, mx.array]:
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
    def project(self, x: mx.array, step: Step) -> tuple[mx.array, mx.array, mx.array]:
        """x: (B, S, hidden) -> q_nope (B, S, H, dn), q_rope (B, S, H, R * dr), c | k_r (B, S, r + R * dr)."""

    def __call__(self, x: mx.array, step: Step, cache: LatentCache) -> mx.array:
        """x: (B, S, hidden) -> (B, S, hidden); appends one row a token to the cache, but for training."""
        batch, length, _ = x.shape
        q_nope, q_rope, rows = self.project(x, step)
        q_nope, q_rope = q_nope.transpose(0, 2, 1, 3), q_rope.transpose(0, 2, 1, 3)
        if step.packing is None:
            cache.append(rows, step.offset, step.room)
            absorb = step.form == "absorbed" or (step.form == "auto" and length < self.absorbed_below)
            form = self._absorbed if absorb else self._expanded
            attended = form(q_nope, q_rope, cache, step)  # (B, H, S, dv)
        else:
            queries, scale = mx.concatenate([q_nope, q_rope], axis=-1), self.geometry.softmax_scale
            attended = attend_rows(queries, *self._rebuild(rows), step.packing, scale, step.budget)
        return self.o_proj(attended.transpose(0, 2, 1, 3).reshape(batch, length, -1))

    def _expanded(self, q_nope: mx.array, q_rope: mx.array, cache: LatentCache, step: Step) -> mx.array:
        geometry = self.geometry
        batch, heads, length, _ = q_nope.shape

        def fetch(start: int, stop: int) -> tuple[mx.array, mx.array]:
            return self._rebuild(cache.rows.view(start, stop))

        queries = mx.concatenate([q_nope, q_rope], axis=-1)
        key_numbers = batch * heads * (queries.shape[-1] + geometry.v_dim)
        block = key_block(batch * heads * length, key_numbers, step.budget, queries.itemsize)
        return attend(queries, fetch, step.offset + length, geometry.softmax_scale, block)

    def _rebuild(self, rows: mx.array) -> tuple[mx.array, mx.array]:
        """c | k_r (B, n, r + R * dr) -> keys (B, H, n, dn + R * dr), values (B, H, n, dv)."""
        batch, length, _ = rows.shape
        heads, nope_dim = self.geometry.num_heads, self.geometry.nope_dim
        rebuilt = self.kv_b_proj(rows[..., : self.rank]).reshape(batch, length, heads, -1)
        rebuilt = rebuilt.transpose(0, 2, 1, 3)  # (B, H, n, dn + dv)
        shared = rows[:, None, :, self.rank :]
        shared = mx.broadcast_to(shared, (batch, heads, length, shared.shape[-1]))
        return mx.concatenate([rebuilt[..., :nope_dim], shared], axis=-1), rebuilt[..., nope_dim:]

    def _absorbed(self, q_nope: mx.array, q_rope: mx.array, cache: LatentCache, step: Step) -> mx.array:
        geometry = self.geometry
        batch, heads, length, _ = q_nope.shape
        up = dense_weight(self.kv_b_proj).reshape(heads, -1, self.rank)  # (H, dn + dv, r)
        queries = mx.concatenate(
            [product(q_nope, up[:, : geometry.nope_dim]), q_rope], axis=-1
        )  # (B, H, S, r + R * dr)

        def fetch(start: int, stop: int) -> tuple[mx.array, mx.array]:
            # The whole row stands in for the value: slicing the latent out of it would copy the cache at every step.
            rows = cache.rows.view(start, stop)[:, None]
            return rows, rows

        block = key_block(batch * heads * length, 0, step.budget, queries.itemsize)
        latent = attend(queries, fetch, step.offset + length, geometry.softmax_scale, block)[..., : self.rank]
        values = product(latent, up[:, geometry.nope_dim :].swapaxes(-1, -2))
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

    def project(self, x: mx.array, step: Step) -> tuple[mx.array, mx.array, mx.array]:
        geometry = self.geometry
        q = self.q_proj(x) if geometry.q_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.reshape(*x.shape[:2], geometry.num_heads, -1)
        down = self.kv_a_proj_with_mqa(x)
        latent, k_rope = down[..., : self.rank], down[..., self.rank :]
        if geometry.latent_norm:
            latent = self.kv_a_layernorm(latent)
        k_rope = rotate(k_rope[:, :, None], step, geometry.rope_interleave)[:, :, 0]
        q_rope = rotate(q[..., geometry.nope_dim :], step, geometry.rope_interleave)
        return q[..., : geometry.nope_dim], q_rope, mx.concatenate([latent, k_rope], axis=-1)


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
        self.q_rope_scale = mx.ones((geometry.num_heads, self.rope_heads, geometry.head_dim))

    def project(self, x: mx.array, step: Step) -> tuple[mx.array, mx.array, mx.array]:
        geometry = self.geometry
        split = (*x.shape[:2], -1, geometry.head_dim)
        q = self.q_norm(self.q_proj(x).reshape(split))  # (B, S, H, d)
        k = self.k_norm(self.k_proj(x).reshape(split)).reshape(*x.shape[:2], -1)
        down = self.kv_a_proj(mx.concatenate([k, self.v_proj(x)], axis=-1))
        latent, k_rope = down[..., : self.rank], down[..., self.rank :]
        if geometry.latent_norm:
            latent = self.kv_a_layernorm(latent)
        k_rope = rotate(k_rope.reshape(split), step, geometry.rope_interleave).reshape(k_rope.shape)
        q_rope = (q[..., None, :] * self.q_rope_scale).reshape(*x.shape[:2], -1, geometry.head_dim)
        q_rope = rotate(q_rope, step, geometry.rope_interleave).reshape(*q.shape[:3], -1)
        return q, q_rope, mx.concatenate([latent, k_rope], axis=-1)


def rotate(x: mx.array, step: Step, interleaved: bool) -> mx.array:
    """Rotary embedding of x (B, S, heads, dr): pairs are (i, i + dr/2), or (2i, 2i + 1) and de-interleaved first."""
    half = x.shape[-1] // 2
    wide = x.astype(mx.float32)
    if interleaved:
        wide = mx.concatenate([wide[..., 0::2], wide[..., 1::2]], axis=-1)
    turned = mx.concatenate([-wide[..., half:], wide[..., :half]], axis=-1)
    cos, sin = (mx.concatenate([each, each], axis=-1)[:, None] for each in (step.cos, step.sin))
    return (wide * cos + turned * sin).astype(x.dtype)


def attend(
    queries: mx.array,
    fetch: Callable[[int, int], tuple[mx.array, mx.array]],
    total: int,
    scale: float,
    block: int,
) -> mx.array:
    """Causal attention of the last S of `total` tokens, the keys walked in blocks.

    queries: (B, H, S, D). fetch(start, stop) -> keys (B, G, stop - start, D), values (B, G, stop - start, Dv), G a
    divisor of H. Returns (B, H, S, Dv). The softmax runs in float32.
    """
    batch, heads, length, width = queries.shape
    offset = total - length
    largest, norm, out = mx.array(-mx.inf), mx.array(0.0), mx.array(0.0)
    rows = queries * scale
    for start in range(0, total, block):
        stop = min(start + block, total)
        keys, values = fetch(start, stop)
        groups = keys.shape[1]
        scores = wide_product(rows.reshape(batch, groups, -1, width), keys.swapaxes(-1, -2))  # (B, G, H/G * S, block)
        if stop - 1 > offset:
            seen = mx.arange(start, stop)[None] <= mx.arange(offset, total)[:, None]  # (S, block)
            by_token = scores.reshape(batch, heads, length, stop - start)
            scores = mx.where(seen, by_token, -mx.inf).reshape(scores.shape)
        new_largest = mx.maximum(largest, scores.max(axis=-1, keepdims=True))
        weights, decay = mx.exp(scores - new_largest), mx.exp(largest - new_largest)
        norm = norm * decay + weights.sum(axis=-1, keepdims=True)
        out = out * decay + wide_product(weights, values)
        largest = new_largest
    return (out / norm).astype(queries.dtype).reshape(batch, heads, length, -1)


def attend_rows(
    queries: mx.array, keys: mx.array, values: mx.array, packing: Packing, scale: float, budget: int
) -> mx.array:
    """Causal attention within every row of a packed batch, and over the row that it goes on from.

    queries: (1, H, S, D), keys: (1, G, S, D), values: (1, G, S, Dv), G a divisor of H. Returns (1, H, S, Dv).
    MLX's gradient writes the scores: blocks of queries whose scores fit in `budget` are gone through one after the
    other, and once more in the backward pass.
    """
    parts = []
    for seen, first in packing.groups:
        taken = []
        for each, index in ((queries, seen[:, first:]), (keys, seen), (values, seen)):
            one = each[0] if packing.back is None else mx.take(each[0], index, axis=1)
            taken.append(one.reshape(one.shape[0], *index.shape, -1).swapaxes(0, 1))
        q, k, v = taken  # (rows, H or G, longest, ...), of q its own tokens
        rows, heads, asking, _ = q.shape
        block = vision_query_block(rows, heads, k.shape[2], budget)
        whole = partial(softmax_attention, scale=scale, mask="causal")
        attend_to = whole if block >= asking else mx.checkpoint(whole)
        attended = [
            attend_to(q[:, :, stop - block : stop], k[:, :, : first + stop], v[:, :, : first + stop])
            for stop in range(block, asking + block, block)
        ]
        joined = mx.concatenate(attended, axis=2)
        parts.append(joined.swapaxes(0, 1).reshape(heads, rows * asking, -1))
    everything = parts[0] if packing.back is None else mx.take(mx.concatenate(parts, axis=1), packing.back, axis=1)
    return everything[None]


def dense_weight(linear: nn.Module) -> mx.array:
    """The (out, in) matrix of a linear layer, dequantised where it is packed, its LoRA included."""
    if isinstance(linear, LoraLinear):
        return dense_weight(linear.base) + linear.delta()
    if isinstance(linear, nn.QuantizedLinear):
        return unpacked(linear, linear.scales.dtype)
    return linear.weight


def fused(length: int, head_dim: int) -> bool:
    """Whether MLX has a kernel for `length` queries that writes no scores to memory."""
    return mx.metal.is_available() and head_dim in (FUSED_DECODE_DIMS if length == 1 else FUSED_PREFILL_DIMS)


def _add_linears(module: nn.Module, geometry: AttentionGeometry, layer: int) -> None:
    for name, shape in geometry.tensor_shapes(layer).items():
        if name.endswith(".weight") and len(shape) == 2:
            linear = name.removesuffix(".weight")
            module[linear] = Linear(shape[1], shape[0], bias=linear in geometry.biases)
