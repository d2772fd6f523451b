"""Learning rates against transformers' schedulers; weights by their algebra, however a step is divided."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_constant_schedule_with_warmup, get_cosine_with_min_lr_schedule_with_warmup

from ivcore.errors import TrainingError
from train.packing import to_batch
from train.samples import Sample
from train.schedule import Schedule
from train.weighting import Weighting, normalised, place_weights, total_weight

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def reference(schedule: Schedule) -> list[float]:
    """The rates of transformers' scheduler at 0, 1, ..., total_steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=schedule.peak)
    if schedule.shape == "constant":
        scheduler = get_constant_schedule_with_warmup(optimizer, schedule.warmup_steps)
    else:
        scheduler = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, schedule.warmup_steps, schedule.total_steps, min_lr=schedule.floor
        )
    rates = []
    for _ in range(schedule.total_steps + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("shape", ["cosine", "constant"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (1, 10), (3, 100), (10, 10), (48, 1609)])
def test_a_step_learns_at_the_rate_that_transformers_reaches_with_it(shape: str, warmup: int, total: int) -> None:
    schedule = Schedule(2e-5, 1e-6, warmup, total, shape)  # type: ignore[arg-type]
    ours = [schedule(step) for step in range(total)]
    # transformers asks before the step, so its first one learns nothing, and its last rate is never used.
    np.testing.assert_allclose(ours, reference(schedule)[1:], rtol=1e-9)


def test_every_step_learns_and_the_last_is_at_the_floor() -> None:
    schedule = Schedule(1e-3, 1e-5, 5, 50)
    assert min(schedule(step) for step in range(50)) == pytest.approx(1e-5)
    assert schedule(0) == pytest.approx(2e-4) and schedule(4) == 1e-3
    assert schedule(49) == pytest.approx(1e-5) == schedule(500)


def sample(trained: np.ndarray) -> Sample:
    ids = np.arange(1, len(trained) + 1, dtype=np.int32)
    return Sample("row", ids, trained, np.broadcast_to(ids, (3, len(ids))), None, None)


def samples(answers: list[int]) -> list[Sample]:
    """A sample of each number of trained tokens, after a prompt of two."""
    return [sample(np.arange(length + 2) >= 2) for length in answers]


@given(LENGTHS, st.sampled_from([("token", 1.0), ("sample", 0.0), ("square", 0.5)]))
def test_a_sample_counts_by_a_power_of_its_length(answers: list[int], how: tuple[Weighting, float]) -> None:
    weighting, power = how
    sums = [place_weights(each.trained, weighting).sum() for each in samples(answers)]
    np.testing.assert_allclose(sums, np.array(answers, float) ** power, rtol=1e-6)


@given(LENGTHS, st.integers(1, 4), st.sampled_from(["token", "sample", "square"]))
def test_however_a_step_is_divided_each_token_counts_the_same(
    answers: list[int], parts: int, weighting: Weighting
) -> None:
    each = samples(answers)
    weights = [place_weights(one.trained, weighting) for one in each]
    whole = to_batch(each, weights)
    (expected,) = normalised([whole], total_weight([whole]))
    assert expected.weights.sum() == pytest.approx(1.0, rel=1e-5)
    divided = [to_batch(each[part::parts], weights[part::parts]) for part in range(parts) if each[part::parts]]
    total = sum(total_weight([batch]) for batch in divided)  # as processes add theirs up
    got = np.concatenate([batch.weights for batch in normalised(divided, total)])
    np.testing.assert_allclose(np.sort(got), np.sort(expected.weights), rtol=1e-5)


def test_internvl_s_example_of_two_answers() -> None:
    # Of 1 and 4 tokens: by tokens 1 : 4, by samples 1 : 1, by square roots 1 : 2 (arXiv 2412.05271, section 3.3).
    for weighting, share in (("token", 1 / 5), ("sample", 1 / 2), ("square", 1 / 3)):
        each = samples([1, 4])
        batch = to_batch(each, [place_weights(one.trained, weighting) for one in each])  # type: ignore[arg-type]
        (batch,) = normalised([batch], total_weight([batch]))
        assert batch.weights[:3].sum() == pytest.approx(share)


def test_a_place_has_the_weight_of_the_token_that_it_predicts() -> None:
    trained = np.array([False, False, True, True, False, True])
    np.testing.assert_array_equal(place_weights(trained, "token"), [0, 1, 1, 0, 1, 0])
    np.testing.assert_allclose(place_weights(trained, "square"), np.array([0, 1, 1, 0, 1, 0]) / np.sqrt(3), rtol=1e-6)
    # No place predicts the first token.
    np.testing.assert_array_equal(place_weights(np.array([True, True]), "sample"), [1, 0])


def test_a_step_with_nothing_to_learn_is_an_error() -> None:
    batch = to_batch([sample(np.zeros(3, bool))], [np.zeros(3)])
    with pytest.raises(TrainingError, match="no token to train on"):
        normalised([batch], total_weight([batch]))
