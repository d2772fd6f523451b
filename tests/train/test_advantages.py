"""Advantages by their algebra and the papers' examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from train.advantages import counted_rollouts, group_advantages, overlong_penalty

REWARDS = st.tuples(st.integers(1, 5), st.integers(2, 8)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]))
)


@given(REWARDS, st.booleans())
def test_a_group_s_advantages_have_mean_zero_and_with_std_unit_variance(rewards: np.ndarray, scale: bool) -> None:
    got = group_advantages(rewards, scale_by_std=scale)
    np.testing.assert_allclose(got.values.mean(axis=1), 0, atol=1e-6)
    alike = (rewards == rewards[:, :1]).all(axis=1)
    np.testing.assert_array_equal(got.kept, ~alike)
    assert got.skipped == alike.sum() and not got.values[alike].any()
    kept = torch.from_numpy(rewards[~alike])
    expected = kept - kept.mean(dim=1, keepdim=True)
    if scale and len(kept):
        expected /= kept.std(dim=1, correction=0, keepdim=True)
        np.testing.assert_allclose(got.values[~alike].std(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(got.values[~alike], expected.numpy(), rtol=1e-5, atol=1e-6)


def test_the_std_makes_a_rare_failure_count_more_and_without_it_does_not() -> None:
    rewards = np.array([[1, 0, 1, 0], [1, 1, 1, 0]], float)
    plain = group_advantages(rewards, scale_by_std=False).values
    np.testing.assert_allclose(plain, [[0.5, -0.5, 0.5, -0.5], [0.25, 0.25, 0.25, -0.75]])
    scaled = group_advantages(rewards, scale_by_std=True).values
    np.testing.assert_allclose(scaled, [[1, -1, 1, -1], [3**-0.5] * 3 + [-(3**0.5)]], rtol=1e-6)


def test_rewards_that_differ_by_rounding_alone_are_alike() -> None:
    tenths = np.array([[0.1 + 0.2, 0.3, 0.3]])
    assert tenths.std() > 0
    got = group_advantages(tenths, scale_by_std=True)
    assert got.skipped == 1 and not got.values.any()


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1), (120, -1)]
)
def test_the_overlong_penalty_falls_within_the_buffer(length: int, penalty: float) -> None:
    assert overlong_penalty(length, 100, 20) == pytest.approx(penalty)
    assert overlong_penalty(length, 100, 0) == 0


def test_rollouts_of_skipped_groups_and_masked_ones_do_not_count() -> None:
    advantages = group_advantages(np.array([[0, 1], [1, 1]], float), scale_by_std=False)
    cut_off = np.array([[True, False], [True, False]])
    np.testing.assert_array_equal(
        counted_rollouts(advantages, cut_off, mask_cut_off=False), [[True, True], [False, False]]
    )
    np.testing.assert_array_equal(
        counted_rollouts(advantages, cut_off, mask_cut_off=True), [[False, True], [False, False]]
    )
