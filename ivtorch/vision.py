"""The vision tower of Qwen3-VL with DeepStack: attention inside one temporal patch, frames of one size as a batch.

Parameter names are the checkpoint's below `model.visual.`. The patch embedding is a Conv3d whose kernel is the whole
patch, so it is one matrix product on flattened patches and keeps its five-dimensional weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ivcore.config import VisionConfig
from ivcore.rotary import position_taps, vision_rope
from ivcore.schedule import vision_query_block
from ivtorch.attention import fused

NORM_EPS = 1e-6
Observe = Callable[[str, torch.Tensor], torch.Tensor]


def unobserved(name: str, activation: torch.Tensor) -> torch.Tensor:
    """The observer that sees nothing and changes nothing."""
    return activation


class PatchProjection(nn.Module):
    """The Conv3d weight, (hidden, channel, time, height, width), applied to flattened patches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        patch = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.weight = nn.Parameter(torch.zeros(config.hidden_size, config.in_channels, *patch))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return F.linear(patches, self.weight.reshape(self.weight.shape[0], -1), self.bias)


class PatchEmbed(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = PatchProjection(config)


class VisionAttention(nn.Module):
    """Full attention among the patches of one frame."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, budget: int) -> torch.Tensor:
        """x: (frames, P, hidden); cos, sin: (P, head_dim / 2)."""
        frames, patches, hidden = x.shape
        qkv = self.qkv(x).reshape(frames, patches, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        queries, keys, values = _rotate(qkv[0], cos, sin), _rotate(qkv[1], cos, sin), qkv[2]
        scale = queries.shape[-1] ** -0.5
        whole = fused(x.device)
        block = patches if whole else vision_query_block(frames, self.num_heads, patches, budget)
        attended = [
            F.scaled_dot_product_attention(queries[:, :, start : start + block], keys, values, scale=scale)
            for start in range(0, patches, block)
        ]
        out = torch.cat(attended, dim=2)
        return self.proj(out.transpose(1, 2).reshape(frames, patches, hidden))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, budget: int) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, budget)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """merge x merge neighbouring patches, which stand next to each other, become one token of the decoder's width."""

    def __init__(self, config: VisionConfig, norm_after_merge: bool) -> None:
        super().__init__()
        self.merged_size = config.hidden_size * config.spatial_merge_size**2
        self.norm_after_merge = norm_after_merge
        self.norm = nn.LayerNorm(self.merged_size if norm_after_merge else config.hidden_size, eps=NORM_EPS)
        self.linear_fc1 = nn.Linear(self.merged_size, self.merged_size)
        self.linear_fc2 = nn.Linear(self.merged_size, config.out_hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (frames, P, hidden) -> (frames * P / merge^2, out_hidden)."""
        if self.norm_after_merge:
            x = self.norm(x.reshape(-1, self.merged_size))
        else:
            x = self.norm(x).reshape(-1, self.merged_size)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config, norm_after_merge=False)
        self.deepstack_merger_list = nn.ModuleList(
            PatchMerger(config, norm_after_merge=True) for _ in config.deepstack_visual_indexes
        )

    def forward(
        self, patches: torch.Tensor, height: int, width: int, budget: int, observe: Observe = unobserved
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Encode frames of height x width patches.

        patches: (frames, height * width, patch_dim), merge-block order. Returns the tokens (T, out_hidden) with
        T = frames * height * width / merge^2, and a DeepStack feature of that shape for each block the config lists.
        observe(name, array) sees the embedded patches and every block's and merger's output, and gives what to go on
        with.
        """
        config = self.config
        taps, tap_weights = position_taps(height, width, config.position_grid_side, config.spatial_merge_size)
        device = patches.device
        rope = vision_rope(height, width, config.head_dim, config.spatial_merge_size)
        cos, sin = (torch.from_numpy(t).to(device) for t in rope)
        x = self.patch_embed.proj(patches.to(self.patch_embed.proj.weight.dtype))
        weights = torch.from_numpy(tap_weights).to(device, x.dtype)[..., None]
        x = x + (self.pos_embed(torch.from_numpy(taps).to(device)) * weights).sum(dim=0)
        x = observe("visual.patch_embed", x)
        deepstack: dict[int, torch.Tensor] = {}
        for index, block in enumerate(self.blocks):
            x = observe(f"visual.blocks.{index}", block(x, cos, sin, budget))
            if index in config.deepstack_visual_indexes:
                place = config.deepstack_visual_indexes.index(index)
                feature = self.deepstack_merger_list[place](x)
                deepstack[place] = observe(f"visual.deepstack_merger_list.{place}", feature)
        tokens = observe("visual.merger", self.merger(x))
        return tokens, [deepstack[place] for place in sorted(deepstack)]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in float32 of x (frames, H, P, d), pairs (i, i + d/2)."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)
