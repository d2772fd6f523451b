"""InternVideo3 and Qwen3-VL as one network whose module tree spells the checkpoint's tensor names.

Notable:
- `model.visual`, `model.language_model`, `lm_head`: loading is assigning by name, nothing is renamed.
- The decoder is Qwen3: RMSNorm before, SwiGLU, and whichever attention the config names.
- DeepStack (arXiv 2406.04334): feature j of the vision tower is added at the visual positions after decoder layer j.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ivcore.config import ModelConfig, TextConfig
from ivtorch.attention import Step, build_attention
from ivtorch.cache import Cache
from ivtorch.vision import Observe, VisionTower, unobserved


@dataclass(frozen=True)
class Visual:
    """Visual tokens of a chunk: where they stand (V,), their embeddings (V, hidden), DeepStack features likewise."""

    index: torch.Tensor
    tokens: torch.Tensor
    deepstack: list[torch.Tensor]


class MLP(nn.Module):
    def __init__(self, text: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(text.hidden_size, text.intermediate_size, bias=False)
        self.up_proj = nn.Linear(text.hidden_size, text.intermediate_size, bias=False)
        self.down_proj = nn.Linear(text.intermediate_size, text.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, text: TextConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = build_attention(text.geometry, layer, text.rms_norm_eps)
        self.mlp = MLP(text)
        self.input_layernorm = nn.RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(text.hidden_size, eps=text.rms_norm_eps)

    def forward(self, x: torch.Tensor, step: Step, cache: Cache, layer: int) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), step, cache.layers[layer])
        return x + self.mlp(self.post_attention_layernorm(x))


Run = Callable[[nn.Module, torch.Tensor, Step, Cache, int], torch.Tensor]


def straight(layer: nn.Module, x: torch.Tensor, step: Step, cache: Cache, index: int) -> torch.Tensor:
    """Go through a layer as it is."""
    return layer(x, step, cache, index)


class LanguageModel(nn.Module):
    def __init__(self, text: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(text, layer) for layer in range(text.num_hidden_layers))
        self.norm = nn.RMSNorm(text.hidden_size, eps=text.rms_norm_eps)

    def forward(
        self,
        token_ids: torch.Tensor,
        step: Step,
        cache: Cache,
        visual: Visual | None = None,
        observe: Observe = unobserved,
        run: Run = straight,
    ) -> torch.Tensor:
        """token_ids: (B, S) -> the last layer's output (B, S, hidden), before `norm`.

        observe(name, array) sees `embeddings` and every layer's output before DeepStack adds to it, and gives what to
        go on with. run(layer, ...) goes through a layer: training may recompute it in the backward pass.
        """
        x = self.embed_tokens(token_ids)
        if visual is not None:
            x[:, visual.index] = visual.tokens.to(x.dtype)
        x = observe("embeddings", x)
        for index, layer in enumerate(self.layers):
            x = observe(f"layers.{index}", run(layer, x, step, cache, index))
            if visual is not None and index < len(visual.deepstack):
                x = x.index_add(1, visual.index, visual.deepstack[index].to(x.dtype)[None])
        return x


class VideoLanguageModel(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.visual = VisionTower(config.vision)
        self.language_model = LanguageModel(config.text)


class Network(nn.Module):
    """All parameters, by the checkpoint's names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = VideoLanguageModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Output of the last layer (..., hidden) -> float32 logits (..., vocab)."""
        return self.head(self.model.language_model.norm(hidden))

    def head(self, normed: torch.Tensor) -> torch.Tensor:
        """Output of the last norm (..., hidden) -> float32 logits (..., vocab)."""
        tied = self.model.language_model.embed_tokens.weight
        head = self.lm_head(normed) if "lm_head" in self._modules else F.linear(normed, tied)
        return head.float()
