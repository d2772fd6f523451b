"""The attention weights of one source layer, and the queries, keys and values that they make of its input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ivcore.config import TextConfig
from ivcore.errors import CheckpointError
from ivcore.floats import finite, widen
from ivcore.geometry import LAYER_PREFIX
from ivcore.shards import Checkpoint


@dataclass(frozen=True)
class Projections:
    """Of S tokens, float32: queries (S, H, d), keys and values (S, G, d), before RoPE; `raw`: before the norms."""

    raw_queries: np.ndarray
    raw_keys: np.ndarray
    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class LayerWeights:
    """float32: input norm (hidden,), q/k norms (d,), matrices (out, in), and biases by module where there are any."""

    input_norm: np.ndarray
    q_norm: np.ndarray
    k_norm: np.ndarray
    q_proj: np.ndarray
    k_proj: np.ndarray
    v_proj: np.ndarray
    o_proj: np.ndarray
    biases: dict[str, np.ndarray]
    head_dim: int
    eps: float

    @classmethod
    def read(cls, checkpoint: Checkpoint, text: TextConfig, layer: int) -> LayerWeights:
        """From a grouped-query checkpoint; CheckpointError for NaN or infinity."""
        prefix = LAYER_PREFIX.format(layer=layer)

        def tensor(name: str) -> np.ndarray:
            full = f"{prefix}{name}"
            stored, dtype = checkpoint.read(full), checkpoint.specs[full].dtype
            if not finite(stored, dtype):
                raise CheckpointError(f"{checkpoint.files[full]}: {full} holds NaN or infinity; download it again.")
            return np.array(widen(stored, dtype), np.float32)

        attention = ("q_norm", "k_norm", "q_proj", "k_proj", "v_proj", "o_proj")
        biased = [name for name in attention if f"{prefix}self_attn.{name}.bias" in checkpoint.specs]
        return cls(
            input_norm=tensor("input_layernorm.weight"),
            **{name: tensor(f"self_attn.{name}.weight") for name in attention},
            biases={name: tensor(f"self_attn.{name}.bias") for name in biased},
            head_dim=text.head_dim,
            eps=text.rms_norm_eps,
        )

    def project(self, hidden: np.ndarray) -> Projections:
        """hidden: the layer's input (S, hidden), float32."""
        x = rms_norm(hidden, self.input_norm, self.eps)
        raw_queries, raw_keys, values = (self._heads(x, module) for module in ("q_proj", "k_proj", "v_proj"))
        return Projections(
            raw_queries, raw_keys, rms_norm(raw_queries, self.q_norm, self.eps),
            rms_norm(raw_keys, self.k_norm, self.eps), values,
        )  # fmt: skip

    def _heads(self, x: np.ndarray, module: str) -> np.ndarray:
        made: np.ndarray = x @ getattr(self, module).T
        if module in self.biases:
            made += self.biases[module]
        return made.reshape(len(x), -1, self.head_dim)

    @property
    def value_gram(self) -> np.ndarray:
        """What an error of a head's output weighs after o_proj: W_h^T W_h, (H, d, d) float64."""
        by_head = self.o_proj.astype(np.float64).reshape(len(self.o_proj), -1, self.head_dim).transpose(1, 0, 2)
        gram: np.ndarray = by_head.transpose(0, 2, 1) @ by_head
        return gram


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x (..., width) divided by its root mean square, times weight (width,)."""
    scaled: np.ndarray = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight
    return scaled
