"""InternVideo3 and Qwen3-VL as one network whose module tree spells the checkpoint's tensor names.

Notable:
- `model.visual`, `model.language_model`, `lm_head`: loading is assigning by name, nothing is renamed.
- The decoder is Qwen3: RMSNorm before, SwiGLU, and whichever attention the config names.
- DeepStack (arXiv 2406.04334): feature j of the vision tower is added at the visual positions after decoder layer j.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ivcore.config import ModelConfig, TextConfig
from ivmlx.attention import Step, build_attention
from ivmlx.cache import Cache
from ivmlx.products import Embedding, Linear
from ivmlx.vision import Observe, VisionTower, unobserved


@dataclass(frozen=True)
class Visual:
    """Visual tokens of a chunk: where they stand (V,), their embeddings (V, hidden), DeepStack features likewise."""

    index: mx.array
    tokens: mx.array
    deepstack: list[mx.array]


class MLP(nn.Module):
    def __init__(self, text: TextConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(text.hidden_size, text.intermediate_size, bias=False)
        self.up_proj = Linear(text.hidden_size, text.intermediate_size, bias=False)
        self.down_proj = Linear(text.intermediate_size, text.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, text: TextConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = build_attention(text.geometry, layer, text.rms_norm_eps)
        self.mlp = MLP(text)
        self.input_layernorm = nn.RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(text.hidden_size, eps=text.rms_norm_eps)

    def __call__(self, x: mx.array, step: Step, cache: Cache, layer: int) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), step, cache.layers[layer])
        return x + self.mlp(self.post_attention_layernorm(x))


Run = Callable[[nn.Module, mx.array, Step, Cache, int], mx.array]


def straight(layer: nn.Module, x: mx.array, step: Step, cache: Cache, index: int) -> mx.array:
    """Go through a layer as it is."""
    return layer(x, step, cache, index)


class LanguageModel(nn.Module):
    def __init__(self, text: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(text.vocab_size, text.hidden_size)
        self.layers = [DecoderLayer(text, layer) for layer in range(text.num_hidden_layers)]
        self.norm = nn.RMSNorm(text.hidden_size, eps=text.rms_norm_eps)

    def __call__(
        self,
        token_ids: mx.array,
        step: Step,
        cache: Cache,
        visual: Visual | None = None,
        observe: Observe = unobserved,
        run: Run = straight,
    ) -> mx.array:
        """token_ids: (B, S) -> the last layer's output (B, S, hidden), before `norm`.

        observe(name, array) sees `embeddings` and every layer's output before DeepStack adds to it, and gives what to
        go on with. run(layer, ...) goes through a layer: training may recompute it in the backward pass.
        """
        x = self.embed_tokens(token_ids)
        if visual is not None:
            x[:, visual.index] = visual.tokens.astype(x.dtype)
        x = observe("embeddings", x)
        for index, layer in enumerate(self.layers):
            x = observe(f"layers.{index}", run(layer, x, step, cache, index))
            if visual is not None and index < len(visual.deepstack):
                x = x.at[:, visual.index].add(visual.deepstack[index].astype(x.dtype))
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
            self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    def logits(self, hidden: mx.array) -> mx.array:
        """Output of the last layer (..., hidden) -> float32 logits (..., vocab)."""
        return self.head(self.model.language_model.norm(hidden))

    def head(self, normed: mx.array) -> mx.array:
        """Output of the last norm (..., hidden) -> float32 logits (..., vocab)."""
        head = self.lm_head(normed) if "lm_head" in self else self.model.language_model.embed_tokens.as_linear(normed)
        return head.astype(mx.float32)
