"""The parity report's measures against torch and algebra, and its activations on disk."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.parity import measures
from convert.parity.measures import Distance, TokenDistance, token_distance
from convert.parity.record import Recording

few = settings(max_examples=40)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**31))


def pair(rows: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    reference = random.standard_normal((rows, width), dtype=np.float32) * np.float32(10.0 ** random.integers(-3, 4))
    return reference, reference + random.standard_normal((rows, width), dtype=np.float32)


@few
@given(size=sizes, cut=st.integers(0, 9), block=st.integers(1, 100))
def test_distances_are_torch_s_however_the_rows_are_cut(size: tuple[int, int, int], cut: int, block: int) -> None:
    torch = pytest.importorskip("torch")
    reference, other = pair(*size)
    distance = Distance()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "BLOCK_NUMBERS", block)
        distance.add(reference[:cut], other[:cut])
        distance.add(reference[cut:], other[cut:])
    a, b = (torch.from_numpy(each).double().flatten() for each in (reference, other))
    assert distance.rows == len(reference)
    assert distance.relative_l2 == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-9)
    assert distance.max_abs == pytest.approx(float((b - a).abs().max()), rel=1e-9)
    assert distance.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(a, b, dim=0)), abs=1e-9)
    assert distance.reference_norm == pytest.approx(float(a.norm()), rel=1e-9)


@few
@given(size=sizes, factor=st.sampled_from([0.5, 1.01, 3.0]))
def test_scaling_by_one_factor_is_its_distance_from_one_and_keeps_the_direction(
    size: tuple[int, int, int], factor: float
) -> None:
    reference, _ = pair(*size)
    distance = Distance()
    distance.add(reference, (reference.astype(np.float64) * factor).astype(np.float64))
    assert distance.relative_l2 == pytest.approx(abs(factor - 1), rel=1e-9)
    assert distance.cosine == pytest.approx(1.0, abs=1e-12)


def test_equal_rows_are_exactly_equal_even_when_all_are_zero() -> None:
    for rows in (np.zeros((3, 4), np.float32), pair(3, 4, 0)[0]):
        distance = Distance()
        distance.add(rows, rows.copy())
        assert (distance.relative_l2, distance.max_abs, distance.cosine) == (0.0, 0.0, 1.0)


def test_against_a_reference_of_zeros_any_difference_is_infinite() -> None:
    distance = Distance()
    distance.add(np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32))
    assert (distance.relative_l2, distance.max_abs, distance.cosine) == (math.inf, 1.0, 0.0)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("in_reference", [True, False])
def test_what_is_not_finite_is_no_number_in_any_measure(wrong: float, in_reference: bool) -> None:
    reference, other = pair(4, 5, 1)
    (reference if in_reference else other)[2, 2] = wrong
    distance = Distance()
    distance.add(reference[:3], other[:3])
    distance.add(reference[3:], other[3:])
    assert not math.isfinite(distance.relative_l2) and not math.isfinite(distance.max_abs)


@few
@given(size=sizes, block=st.integers(1, 100))
def test_kl_agreement_and_likelihoods_are_torch_s(size: tuple[int, int, int], block: int) -> None:
    torch = pytest.importorskip("torch")
    reference, other = pair(*size)
    random = np.random.default_rng(size[2])
    following = random.integers(-1, size[1], size[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "BLOCK_NUMBERS", block)
        found = token_distance(reference, other, following)
    a, b = (torch.from_numpy(each).double().log_softmax(-1) for each in (reference, other))
    kl = torch.nn.functional.kl_div(b, a, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(found.kl, kl.numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(found.agrees, (a.argmax(-1) == b.argmax(-1)).numpy())
    targets = torch.from_numpy(following)
    for nll, logs in ((found.reference_nll, a), (found.other_nll, b)):
        expected = torch.nn.functional.nll_loss(logs, targets, reduction="none", ignore_index=-1).numpy()
        np.testing.assert_allclose(nll[following >= 0], expected[following >= 0], rtol=1e-9, atol=1e-12)
        assert np.isnan(nll[following < 0]).all()


def test_kl_is_the_reference_s_expectation_not_the_other_s() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): KL(p || q) = ln(4/3) / 2, KL(q || p) = ln(27/16) / 4
    p, q = np.log([[0.5, 0.5]]).astype(np.float32), np.log([[0.25, 0.75]]).astype(np.float32)
    unused = np.array([-1])
    assert token_distance(p, q, unused).kl[0] == pytest.approx(math.log(4 / 3) / 2, rel=1e-6)
    assert token_distance(q, p, unused).kl[0] == pytest.approx(math.log(27 / 16) / 4, rel=1e-6)


def test_logits_far_beyond_float32_s_exponentials_are_compared() -> None:
    reference = np.array([[3e4, 0.0, -3e4], [1e30, 0.0, 0.0]], np.float32)
    found = token_distance(reference, reference.copy(), np.array([0, 0]))
    np.testing.assert_array_equal(found.kl, 0.0)
    np.testing.assert_array_equal(found.reference_nll, 0.0)


def test_logits_that_are_not_finite_agree_with_nothing() -> None:
    reference, other = pair(3, 6, 2)
    other[:] = reference
    other[1, 0] = np.nan
    found = token_distance(reference, other, np.array([1, 1, 1]))
    assert np.isnan(found.kl).tolist() == [False, True, False]
    assert found.agrees.tolist() == [True, False, True]


def test_joined_positions_keep_their_order() -> None:
    reference, other = pair(5, 7, 3)
    following = np.array([0, 1, 2, -1, 4])
    whole = token_distance(reference, other, following)
    parts = [token_distance(reference[s], other[s], following[s]) for s in (slice(0, 2), slice(2, 5))]
    for name in ("kl", "agrees", "reference_nll", "other_nll"):
        np.testing.assert_array_equal(getattr(TokenDistance.joined(parts), name), getattr(whole, name))


@few
@given(
    cuts=st.lists(st.integers(0, 20), max_size=4),
    spans=st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)), min_size=1, max_size=4),
    width=st.integers(1, 5),
)
def test_a_recording_gives_back_any_rows_however_they_were_appended(
    cuts: list[int], spans: list[tuple[int, int]], width: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recording = Recording(tmp_path_factory.mktemp("recording"))
    rows = np.random.default_rng(width).standard_normal((20, width), dtype=np.float32)
    other = -rows
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 20], strict=True):
        recording.append("layers.0", rows[start:stop])
        recording.append("layers.1", other[start:stop].astype(np.float64))
    for start, length in spans:
        np.testing.assert_array_equal(recording.rows("layers.0", start, start + length), rows[start : start + length])
        np.testing.assert_array_equal(recording.rows("layers.1", start, start + length), other[start : start + length])


def test_a_recording_lies_in_its_folder_as_float32(tmp_path: Path) -> None:
    Recording(tmp_path).append("visual.blocks.0", np.ones((2, 3), np.float32))
    (file,) = tmp_path.iterdir()
    assert file.read_bytes() == np.ones(6, "<f4").tobytes()
