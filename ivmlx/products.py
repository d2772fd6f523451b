"""Matrix products: MLX's own, but for those that its CPU backend has no BLAS for.

- There a product of half types is a plain loop, and one with packed weights, of any type, a loop for each row. Products
  are made in float32 instead and rounded once, as a GPU rounds them; for more than FEW rows, packed weights are
  unpacked first.
- Measured on one core, 115 rows and a matrix of 768 x 256 (8 bits, groups of 32): float32 packed 19 ms, unpacked first
  0.8; float16 packed 966 ms, not packed 10, in float32 0.6.
"""

from __future__ import annotations

from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

FEW = 1
"""Rows up to which MLX's loop over a packed matrix takes no longer than to unpack it."""


def product(a: mx.array, b: mx.array) -> mx.array:
    """a @ b, in a's dtype."""
    if not _in_float32(a):
        return a @ b
    return (a.astype(mx.float32) @ b.astype(mx.float32)).astype(a.dtype)


def wide_product(a: mx.array, b: mx.array) -> mx.array:
    """a @ b in float32; on a GPU it is made in b's dtype and widened."""
    if _on_cpu():
        return a.astype(mx.float32) @ b.astype(mx.float32)
    return (a.astype(b.dtype) @ b).astype(mx.float32)


def softmax_attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Literal["causal"] | None = None
) -> mx.array:
    """softmax(scale * queries @ keys.T) @ values, in queries' dtype.

    queries: (B, H, S, D), keys: (B, G, T, D), values: (B, G, T, Dv), G a divisor of H. Returns (B, H, S, Dv).
    """
    dtype = queries.dtype
    if _in_float32(queries):
        queries, keys, values = (each.astype(mx.float32) for each in (queries, keys, values))
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask).astype(dtype)


def unpacked(packed: nn.QuantizedLinear | nn.QuantizedEmbedding, dtype: mx.Dtype) -> mx.array:
    """The matrix of packed weights."""
    wide = mx.float32 if _on_cpu() else dtype
    scales, biases = _factors(packed, wide)
    return mx.dequantize(packed.weight, scales, biases, packed.group_size, packed.bits).astype(dtype)


class Linear(nn.Linear):
    """x (..., in) -> (..., out)."""

    def __call__(self, x: mx.array) -> mx.array:
        if not _in_float32(x):
            return super().__call__(x)
        y = x.astype(mx.float32) @ self.weight.astype(mx.float32).T
        return (y + self.bias.astype(mx.float32) if "bias" in self else y).astype(x.dtype)

    def to_quantized(self, group_size: int, bits: int, **how: Any) -> nn.Module:  # type: ignore[override]
        return PackedLinear.from_linear(self, group_size, bits, **how)


class PackedLinear(nn.QuantizedLinear):
    """The same of packed weights."""

    def __call__(self, x: mx.array) -> mx.array:
        if not _on_cpu():
            return super().__call__(x)
        y = _packed_product(x, self)
        return (y + self.bias.astype(mx.float32) if "bias" in self else y).astype(x.dtype)


class Embedding(nn.Embedding):
    """Ids (...) -> (..., hidden), and as a head (..., hidden) -> (..., vocab)."""

    def as_linear(self, x: mx.array) -> mx.array:
        return product(x, self.weight.T)

    def to_quantized(self, group_size: int, bits: int, **how: Any) -> nn.Module:  # type: ignore[override]
        return PackedEmbedding.from_embedding(self, group_size, bits, **how)


class PackedEmbedding(nn.QuantizedEmbedding):
    """The same of packed weights."""

    def as_linear(self, x: mx.array) -> mx.array:
        return _packed_product(x, self).astype(x.dtype) if _on_cpu() else super().as_linear(x)


def _packed_product(x: mx.array, packed: nn.QuantizedLinear | nn.QuantizedEmbedding) -> mx.array:
    """x @ weight.T in float32, on a CPU."""
    wide = x.astype(mx.float32)
    if x.size > FEW * x.shape[-1]:
        return wide @ unpacked(packed, mx.float32).T
    scales, biases = _factors(packed, mx.float32)
    return mx.quantized_matmul(wide, packed.weight, scales, biases, True, packed.group_size, packed.bits)


def _factors(packed: nn.QuantizedLinear | nn.QuantizedEmbedding, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Scales and biases of the affine form, the only one that checkpoints here have."""
    assert packed.biases is not None
    return packed.scales.astype(dtype), packed.biases.astype(dtype)


def _in_float32(x: mx.array) -> bool:
    """Whether products of this array are to be made in float32 though it is none."""
    return x.dtype != mx.float32 and _on_cpu()


def _on_cpu() -> bool:
    return bool(mx.default_device() == mx.cpu)
