"""Portions of work: they cover everything once, and what they need stays under the budget or is the least possible."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ivcore.config import ModelConfig
from ivcore.schedule import MAX_CHUNK, chunk_size, frame_groups, key_block, vision_query_block

CONFIG = ModelConfig.from_dir(Path(__file__).resolve().parents[1] / "data" / "reference" / "iv3-micro")
BUDGETS = st.integers(0, 2**31)
ITEMSIZES = st.sampled_from([2, 4])
GRIDS = st.lists(st.tuples(st.integers(1, 9), st.sampled_from([2, 4, 34]), st.sampled_from([2, 6, 50])), max_size=4)


@given(GRIDS, BUDGETS, ITEMSIZES)
def test_frame_groups_cover_every_patch_once_and_in_order(grids: list, budget: int, itemsize: int) -> None:
    groups = list(frame_groups(CONFIG, np.array(grids, np.int32).reshape(-1, 3), budget, itemsize))
    row = 0
    for group in groups:
        assert group.start == row and group.frames >= 1
        row = group.stop
    assert row == sum(t * h * w for t, h, w in grids)
    frames = [(group.height, group.width) for group in groups for _ in range(group.frames)]
    assert frames == [(h, w) for t, h, w in grids for _ in range(t)]


@given(st.integers(1, 10_000), BUDGETS, ITEMSIZES)
def test_a_group_does_not_grow_with_the_length_of_the_video(frames: int, budget: int, itemsize: int) -> None:
    grid = np.array([[frames, 28, 16]])
    largest = max(group.frames for group in frame_groups(CONFIG, grid, budget, itemsize))
    in_a_long_one = max(group.frames for group in frame_groups(CONFIG, grid * [[9, 1, 1]], budget, itemsize))
    assert largest == min(frames, in_a_long_one)
    # Its pixels in float32 and the two tensors of an MLP are the least that a patch needs at once.
    patch_bytes = 4 * 1536 + itemsize * 2 * 128
    assert largest == 1 or largest * 28 * 16 * patch_bytes <= budget


@given(st.integers(1, 64), st.integers(1, 32), st.integers(1, 20_000), BUDGETS)
def test_vision_scores_stay_under_the_budget_or_one_query_is_left(
    frames: int, heads: int, patches: int, budget: int
) -> None:
    block = vision_query_block(frames, heads, patches, budget)
    assert 1 <= block <= patches
    assert block == 1 or frames * heads * block * patches * 4 <= budget
    assert vision_query_block(frames, heads, patches, 2**60) == patches


@given(BUDGETS, ITEMSIZES)
def test_a_chunk_is_a_power_of_two_that_fits(budget: int, itemsize: int) -> None:
    chunk = chunk_size(CONFIG.text, budget, itemsize)
    assert 16 <= chunk <= MAX_CHUNK and chunk & (chunk - 1) == 0
    # Residual and the three tensors of the MLP are in memory together.
    assert chunk == 16 or chunk * itemsize * (128 + 3 * 256) <= budget
    assert chunk_size(CONFIG.text, 2 * budget + 1, itemsize) >= chunk
    assert chunk_size(CONFIG.text, 2**50, itemsize) == MAX_CHUNK


@given(st.integers(1, 10**6), st.integers(0, 10**5), BUDGETS, ITEMSIZES)
def test_a_key_block_keeps_scores_and_rebuilt_keys_under_the_budget(
    rows: int, numbers: int, budget: int, itemsize: int
) -> None:
    block = key_block(rows, numbers, budget, itemsize)
    assert block >= 16
    assert block == 16 or block * (4 * rows + numbers * itemsize) <= budget
    assert key_block(rows, numbers, 2 * budget, itemsize) >= block
