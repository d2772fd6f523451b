"""Attention in the rows of a packed batch: on both backends what float64 gives row by row, whatever their lengths.

A row that goes on from another sees it, as if it stood before its own tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivcore.row_groups import row_groups

Rows = tuple[list[int], list[int]]


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    """Lengths of rows, and the row that each goes on from, or -1."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    parents: list[int] = []
    for row in range(len(lengths)):
        free = [earlier for earlier in range(row) if parents[earlier] < 0]
        parents.append(draw(st.sampled_from([-1, *free])))
    return lengths, parents


WIDTHS = st.sampled_from([(8, 8), (24, 8), (8, 16)])


def given_numbers(lengths: list[int], heads: int, groups: int, widths: tuple[int, int]) -> list[np.ndarray]:
    """Queries, keys and values of a packed batch."""
    total, (width, value_width) = sum(lengths), widths
    random = np.random.default_rng([total, heads, groups, width])
    shapes = ((1, heads, total, width), (1, groups, total, width), (1, groups, total, value_width))
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


def by_row(numbers: list[np.ndarray], given: Rows, scale: float) -> np.ndarray:
    """(1, H, S, Dv): the softmax written out, a row after the other."""
    lengths, parents = given
    queries, keys, values = (each.astype(np.float64)[0] for each in numbers)
    shared = queries.shape[0] // keys.shape[0]
    keys, values = keys.repeat(shared, axis=0), values.repeat(shared, axis=0)
    ends, parts = np.cumsum(lengths), []
    places = [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    for own, parent in zip(places, parents, strict=True):
        seen = own if parent < 0 else np.concatenate([places[parent], own])
        visible = np.tri(len(seen), dtype=bool)[-len(own) :]
        scores = np.where(visible, scale * queries[:, own] @ keys[:, seen].swapaxes(1, 2), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        parts.append(weights / weights.sum(axis=-1, keepdims=True) @ values[:, seen])
    return np.concatenate(parts, axis=1)[None]


@given(rows=rows(), groups=st.sampled_from([1, 2, 4]), widths=WIDTHS, block=st.integers(1, 50), fused=st.booleans())
def test_torch_gives_every_row_what_it_gets_alone_by_either_way(
    rows: Rows, groups: int, widths: tuple[int, int], block: int, fused: bool
) -> None:
    attention, numbers = pytest.importorskip("ivtorch.attention"), given_numbers(rows[0], 4, groups, widths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SCORED", 0 if fused else 1000)
        patch.setattr(attention, "QUERIES", block)
        got = attended(attention, numbers, rows).numpy()
    np.testing.assert_allclose(got, by_row(numbers, rows, 0.3), atol=2e-6, rtol=2e-5)


@given(rows=rows(), groups=st.sampled_from([1, 2, 4]), widths=WIDTHS, budget=st.sampled_from([2_000, 1 << 20]))
def test_mlx_gives_every_row_what_it_gets_alone(rows: Rows, groups: int, widths: tuple[int, int], budget: int) -> None:
    mx, attention = pytest.importorskip("mlx.core"), pytest.importorskip("ivmlx.attention")
    numbers = given_numbers(rows[0], 4, groups, widths)
    made, back = row_groups(*map(np.array, rows))
    packing = attention.Packing([(mx.array(group.index), group.first) for group in made], mx.array(back))
    got = attention.attend_rows(*map(mx.array, numbers), packing, 0.3, budget)
    np.testing.assert_allclose(np.array(got), by_row(numbers, rows, 0.3), atol=2e-6, rtol=2e-5)


@given(rows=rows(), groups=st.sampled_from([1, 2, 4]), block=st.integers(1, 50))
def test_both_ways_of_torch_have_the_same_gradients(rows: Rows, groups: int, block: int) -> None:
    torch, attention = pytest.importorskip("torch"), pytest.importorskip("ivtorch.attention")
    gradients = []
    for scored in (0, 1000):
        given = [torch.tensor(each, requires_grad=True) for each in given_numbers(rows[0], 4, groups, (24, 8))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "SCORED", scored)
            patch.setattr(attention, "QUERIES", block)
            (attended(attention, given, rows) ** 2).sum().backward()
        gradients.append([each.grad for each in given])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-4)


def attended(attention: Any, numbers: list[Any], rows: Rows) -> Any:
    """`attend_rows` of ivtorch, of arrays or tensors."""
    torch = pytest.importorskip("torch")
    made, back = row_groups(*map(np.array, rows))
    packing = attention.Packing([(torch.tensor(group.index), group.first) for group in made], torch.tensor(back))
    return attention.attend_rows(*map(torch.as_tensor, numbers), packing, 0.3)
