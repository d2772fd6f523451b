"""Attention in the rows of a packed batch: on both backends what float64 gives row by row, whatever their lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivcore.training import row_groups

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=6)
WIDTHS = st.sampled_from([(8, 8), (24, 8), (8, 16)])


def given_numbers(lengths: list[int], heads: int, groups: int, widths: tuple[int, int]) -> list[np.ndarray]:
    """Queries, keys and values of a packed batch."""
    total, (width, value_width) = sum(lengths), widths
    random = np.random.default_rng([total, heads, groups, width])
    shapes = ((1, heads, total, width), (1, groups, total, width), (1, groups, total, value_width))
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


def by_row(numbers: list[np.ndarray], lengths: list[int], scale: float) -> np.ndarray:
    """(1, H, S, Dv): the softmax written out, a row after the other."""
    queries, keys, values = (each.astype(np.float64)[0] for each in numbers)
    shared = queries.shape[0] // keys.shape[0]
    keys, values = keys.repeat(shared, axis=0), values.repeat(shared, axis=0)
    ends, parts = np.cumsum(lengths), []
    for end, length in zip(ends, lengths, strict=True):
        q, k, v = (each[:, end - length : end] for each in (queries, keys, values))
        scores = np.where(np.tri(length, dtype=bool), scale * q @ k.swapaxes(1, 2), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        parts.append(weights / weights.sum(axis=-1, keepdims=True) @ v)
    return np.concatenate(parts, axis=1)[None]


@settings(deadline=None)
@given(lengths=LENGTHS, groups=st.sampled_from([1, 2, 4]), widths=WIDTHS, block=st.integers(1, 50), fused=st.booleans())
def test_torch_gives_every_row_what_it_gets_alone_by_either_way(
    lengths: list[int], groups: int, widths: tuple[int, int], block: int, fused: bool
) -> None:
    attention, numbers = pytest.importorskip("ivtorch.attention"), given_numbers(lengths, 4, groups, widths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SCORED", 0 if fused else 1000)
        patch.setattr(attention, "QUERIES", block)
        got = attended(attention, numbers, lengths).numpy()
    np.testing.assert_allclose(got, by_row(numbers, lengths, 0.3), atol=2e-6, rtol=2e-5)


@settings(deadline=None)
@given(lengths=LENGTHS, groups=st.sampled_from([1, 2, 4]), widths=WIDTHS, budget=st.sampled_from([2_000, 1 << 20]))
def test_mlx_gives_every_row_what_it_gets_alone(
    lengths: list[int], groups: int, widths: tuple[int, int], budget: int
) -> None:
    mx, attention = pytest.importorskip("mlx.core"), pytest.importorskip("ivmlx.attention")
    numbers = given_numbers(lengths, 4, groups, widths)
    indices, back = row_groups(np.array(lengths))
    packing = attention.Packing([mx.array(index) for index in indices], mx.array(back))
    got = attention.attend_rows(*map(mx.array, numbers), packing, 0.3, budget)
    np.testing.assert_allclose(np.array(got), by_row(numbers, lengths, 0.3), atol=2e-6, rtol=2e-5)


@settings(deadline=None)
@given(lengths=LENGTHS, groups=st.sampled_from([1, 2, 4]), block=st.integers(1, 50))
def test_both_ways_of_torch_have_the_same_gradients(lengths: list[int], groups: int, block: int) -> None:
    torch, attention = pytest.importorskip("torch"), pytest.importorskip("ivtorch.attention")
    gradients = []
    for scored in (0, 1000):
        given = [torch.tensor(each, requires_grad=True) for each in given_numbers(lengths, 4, groups, (24, 8))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "SCORED", scored)
            patch.setattr(attention, "QUERIES", block)
            (attended(attention, given, lengths) ** 2).sum().backward()
        gradients.append([each.grad for each in given])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-4)


def attended(attention: Any, numbers: list[Any], lengths: list[int]) -> Any:
    """`attend_rows` of ivtorch, of arrays or tensors."""
    torch = pytest.importorskip("torch")
    indices, back = row_groups(np.array(lengths))
    packing = attention.Packing([torch.tensor(index) for index in indices], torch.tensor(back))
    return attention.attend_rows(*map(torch.as_tensor, numbers), packing, 0.3)
