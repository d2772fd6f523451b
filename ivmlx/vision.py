"""The vision tower of Qwen3-VL with DeepStack: attention inside one temporal patch, frames of one size as a batch.

Parameter names are the checkpoint's below `model.visual.`. The patch embedding is a Conv3d whose kernel is the whole
patch, so it is one matrix product on flattened patches and keeps its five-dimensional weight.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ivcore.config import VisionConfig
from ivcore.rotary import position_taps, vision_rope
from ivcore.schedule import vision_query_block
from ivmlx.attention import fused
from ivmlx.products import Linear, softmax_attention, wide_product

NORM_EPS = 1e-6
Observe = Callable[[str, mx.array], mx.array]


def unobserved(name: str, activation: mx.array) -> mx.array:
    """The observer that sees nothing and changes nothing."""
    return activation


class PatchProjection(nn.Module):
    """The Conv3d weight, (hidden, channel, time, height, width), applied to flattened patches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        patch = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.weight = mx.zeros((config.hidden_size, config.in_channels, *patch))
        self.bias = mx.zeros((config.hidden_size,))

    def __call__(self, patches: mx.array) -> mx.array:
        matrix = self.weight.reshape(self.weight.shape[0], -1)
        return (wide_product(patches, matrix.T) + self.bias).astype(patches.dtype)


class PatchEmbed(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = PatchProjection(config)


class VisionAttention(nn.Module):
    """Full attention among the patches of one frame."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array, budget: int) -> mx.array:
        """x: (frames, P, hidden); cos, sin: (P, head_dim / 2)."""
        frames, patches, hidden = x.shape
        qkv = self.qkv(x).reshape(frames, patches, 3, self.num_heads, -1).transpose(2, 0, 3, 1, 4)
        queries, keys, values = _rotate(qkv[0], cos, sin), _rotate(qkv[1], cos, sin), qkv[2]
        scale = queries.shape[-1] ** -0.5
        whole = fused(patches, queries.shape[-1])
        block = patches if whole else vision_query_block(frames, self.num_heads, patches, budget)
        attended = [
            softmax_attention(queries[:, :, start : start + block], keys, values, scale)
            for start in range(0, patches, block)
        ]
        out = mx.concatenate(attended, axis=2)
        return self.proj(out.transpose(0, 2, 1, 3).reshape(frames, patches, hidden))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_fc2(nn.gelu_approx(self.linear_fc1(x)))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array, budget: int) -> mx.array:
        x = x + self.attn(self.norm1(x), cos, sin, budget)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """merge x merge neighbouring patches, which stand next to each other, become one token of the decoder's width."""

    def __init__(self, config: VisionConfig, norm_after_merge: bool) -> None:
        super().__init__()
        self.merged_size = config.hidden_size * config.spatial_merge_size**2
        self.norm_after_merge = norm_after_merge
        self.norm = nn.LayerNorm(self.merged_size if norm_after_merge else config.hidden_size, eps=NORM_EPS)
        self.linear_fc1 = Linear(self.merged_size, self.merged_size)
        self.linear_fc2 = Linear(self.merged_size, config.out_hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        """x: (frames, P, hidden) -> (frames * P / merge^2, out_hidden)."""
        if self.norm_after_merge:
            x = self.norm(x.reshape(-1, self.merged_size))
        else:
            x = self.norm(x).reshape(-1, self.merged_size)
        return self.linear_fc2(nn.gelu(self.linear_fc1(x)))


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = [VisionBlock(config) for _ in range(config.depth)]
        self.merger = PatchMerger(config, norm_after_merge=False)
        self.deepstack_merger_list = [
            PatchMerger(config, norm_after_merge=True) for _ in config.deepstack_visual_indexes
        ]

    def __call__(
        self, patches: mx.array, height: int, width: int, budget: int, observe: Observe = unobserved
    ) -> tuple[mx.array, list[mx.array]]:
        """Encode frames of height x width patches.

        patches: (frames, height * width, patch_dim), merge-block order. Returns the tokens (T, out_hidden) with
        T = frames * height * width / merge^2, and a DeepStack feature of that shape for each block the config lists.
        observe(name, array) sees the embedded patches and every block's and merger's output, and gives what to go on
        with.
        """
        config = self.config
        taps, tap_weights = position_taps(height, width, config.position_grid_side, config.spatial_merge_size)
        rope = vision_rope(height, width, config.head_dim, config.spatial_merge_size)
        cos, sin = (mx.array(t) for t in rope)
        x = self.patch_embed.proj(patches.astype(self.patch_embed.proj.weight.dtype))
        weights = mx.array(tap_weights).astype(x.dtype)[..., None]
        x = x + (self.pos_embed(mx.array(taps)) * weights).sum(axis=0)
        x = observe("visual.patch_embed", x)
        deepstack: dict[int, mx.array] = {}
        for index, block in enumerate(self.blocks):
            x = observe(f"visual.blocks.{index}", block(x, cos, sin, budget))
            if index in config.deepstack_visual_indexes:
                place = config.deepstack_visual_indexes.index(index)
                feature = self.deepstack_merger_list[place](x)
                deepstack[place] = observe(f"visual.deepstack_merger_list.{place}", feature)
        tokens = observe("visual.merger", self.merger(x))
        return tokens, [deepstack[place] for place in sorted(deepstack)]


def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotary embedding in float32 of x (frames, H, P, d), pairs (i, i + d/2)."""
    first, second = mx.split(x.astype(mx.float32), 2, axis=-1)
    rotated = mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
