"""MLX's matrix products on a CPU: what float64 gives of the same numbers, rounded once, packed or not, in any dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")
products = pytest.importorskip("ivmlx.products")

SPACING = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}
"""Relative, of numbers of a dtype: what one rounding may cost."""

SMALLEST = {"float32": 0.0, "float16": 2**-24, "bfloat16": 0.0}
"""The spacing that numbers near 0 keep; where it is 0, there is none that matters here."""

SUM = 5e-7
"""What the order of a sum may cost in float32, relative to the magnitudes of its terms: they may cancel."""

DTYPES = st.sampled_from(list(SPACING))
ROWS = st.one_of(st.integers(1, 3), st.integers(1, 40))


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu() -> Iterator[None]:
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


def random(seed: int, *shape: int) -> Any:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def wide(array: Any) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def check(got: Any, a: np.ndarray, b: np.ndarray, dtype: str, bias: Any = 0.0, sums: int = 1) -> None:
    """Whether it is a @ b + bias, summed in float32 and rounded once; sums: of which one's error goes into the next."""
    assert str(got.dtype).endswith(dtype)
    expected, magnitudes = a @ b + bias, np.abs(a) @ np.abs(b) + np.abs(bias)
    allowed = np.maximum(SPACING[dtype] * np.abs(expected), SMALLEST[dtype]) + sums * SUM * magnitudes
    assert (np.abs(wide(got) - expected) <= allowed).all()


@given(rows=ROWS, inner=st.integers(1, 70), columns=st.integers(1, 40), dtype=DTYPES, seed=st.integers(0, 99))
def test_a_product_is_rounded_once(rows: int, inner: int, columns: int, dtype: str, seed: int) -> None:
    a, b = (random(seed, *shape).astype(getattr(mx, dtype)) for shape in ((2, rows, inner), (inner, columns)))
    check(products.product(a, b), wide(a), wide(b), dtype)
    check(products.wide_product(a, b), wide(a), wide(b), "float32")


@given(rows=ROWS, columns=st.integers(1, 40), bias=st.booleans(), dtype=DTYPES, seed=st.integers(0, 99))
def test_a_linear_layer_is_rounded_once(rows: int, columns: int, bias: bool, dtype: str, seed: int) -> None:
    mx.random.seed(seed)
    layer = products.Linear(48, columns, bias=bias)
    layer.set_dtype(getattr(mx, dtype))
    x = random(seed, rows, 48).astype(getattr(mx, dtype))
    check(layer(x), wide(x), wide(layer.weight).T, dtype, wide(layer.bias) if bias else 0.0)


@given(
    rows=ROWS, groups=st.integers(1, 3), size=st.sampled_from([32, 64]), bits=st.sampled_from([4, 8]),
    bias=st.booleans(), dtype=DTYPES, seed=st.integers(0, 99),
)  # fmt: skip
def test_a_packed_layer_is_the_matrix_that_it_stands_for(
    rows: int, groups: int, size: int, bits: int, bias: bool, dtype: str, seed: int
) -> None:
    """What is packed is w = scale * q + bias of the dtype's scales; whatever the number of rows."""
    mx.random.seed(seed)
    dense = products.Linear(groups * size, 24, bias=bias)
    layer = dense.to_quantized(size, bits)
    layer.set_dtype(getattr(mx, dtype))
    assert isinstance(layer, products.PackedLinear)
    numbers = np.array(layer.weight).view(np.uint8)
    if bits == 4:
        numbers = np.stack([numbers & 15, numbers >> 4], axis=-1)
    q = numbers.reshape(24, groups, size).astype(np.float64)
    matrix = (wide(layer.scales)[..., None] * q + wide(layer.biases)[..., None]).reshape(24, -1)
    x = random(seed, rows, groups * size).astype(getattr(mx, dtype))
    check(layer(x), wide(x), matrix.T, dtype, wide(layer.bias) if bias else 0.0)
    np.testing.assert_allclose(wide(products.unpacked(layer, mx.float32)), matrix, rtol=1e-5, atol=1e-6)


@given(rows=ROWS, packed=st.booleans(), dtype=DTYPES, seed=st.integers(0, 99))
def test_an_embedding_as_a_head_is_rounded_once(rows: int, packed: bool, dtype: str, seed: int) -> None:
    mx.random.seed(seed)
    layer = products.Embedding(20, 64)
    layer = layer.to_quantized(32, 8) if packed else layer
    layer.set_dtype(getattr(mx, dtype))
    matrix = wide(products.unpacked(layer, mx.float32) if packed else layer.weight)
    x = random(seed, 1, rows, 64).astype(getattr(mx, dtype))
    check(layer.as_linear(x), wide(x), matrix.T, dtype)


@given(asking=st.integers(1, 9), before=st.integers(0, 9), dtype=DTYPES, seed=st.integers(0, 99))
def test_attention_is_rounded_once(asking: int, before: int, dtype: str, seed: int) -> None:
    seen = asking + before
    shapes = (1, 4, asking, 16), (1, 2, seen, 16), (1, 2, seen, 16)
    q, k, v = (random(seed + index, *shape).astype(getattr(mx, dtype)) for index, shape in enumerate(shapes))
    keys, values = (wide(each).repeat(2, axis=1) for each in (k, v))
    scores = np.where(np.tri(seen, dtype=bool)[-asking:], 0.3 * wide(q) @ keys.swapaxes(2, 3), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    check(products.softmax_attention(q, k, v, 0.3, "causal"), weights, values, dtype, sums=2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_long_sum_of_half_numbers_loses_nothing(dtype: str) -> None:
    """Where a sum is kept in its own dtype, 4,096 ones in bfloat16 stop at 256."""
    ones = mx.ones((8, 4096)).astype(getattr(mx, dtype))
    assert products.product(ones, ones.T)[0, 0].item() == 4096
