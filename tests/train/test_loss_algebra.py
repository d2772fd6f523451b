"""What must hold of the losses whatever the model is: expectations, what is at rest, what the clip stops."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from ivcore.training import Distill, Loss, NextToken, Policy

VOCAB = 11


def run(backend: str, loss: Loss, logits: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[Any, ...]:
    """The loss, its statistics, and its gradient with respect to the logits (K, vocab)."""
    weighted_loss = importlib.import_module(f"iv{backend}.losses").weighted_loss
    rows = loss.rows(np.arange(len(targets)))
    if backend == "torch":
        torch = importlib.import_module("torch")
        leaf = torch.tensor(logits, requires_grad=True)
        given = {name: torch.tensor(array) for name, array in rows.items()}
        value, statistics = weighted_loss(loss, leaf, torch.tensor(targets).long(), torch.tensor(weights), given)
        value.backward()
        return value.item(), {name: each.item() for name, each in statistics.items()}, leaf.grad.numpy()
    mx = importlib.import_module("mlx.core")
    given = {name: mx.array(array) for name, array in rows.items()}

    def value_of(scores: Any) -> Any:
        return weighted_loss(loss, scores, mx.array(targets), mx.array(weights), given)

    (value, statistics), gradient = mx.value_and_grad(value_of)(mx.array(logits))
    return value.item(), {name: each.item() for name, each in statistics.items()}, np.array(gradient)


def log_softmax(scores: np.ndarray) -> np.ndarray:
    return (scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))).astype(np.float32)


@pytest.fixture
def student() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(VOCAB).astype(np.float32)


@pytest.fixture
def other() -> np.ndarray:
    """Log-probabilities of a teacher, or a reference."""
    return log_softmax(np.random.default_rng(1).standard_normal(VOCAB))


def every_token(backend: str, loss: Loss, student: np.ndarray) -> tuple[Any, ...]:
    """The expectation over the student's own tokens: each token of the vocabulary once, weighing its probability."""
    chances = np.exp(log_softmax(student))
    value, statistics, gradient = run(backend, loss, np.tile(student, (VOCAB, 1)), np.arange(VOCAB), chances)
    return value, statistics, gradient.sum(axis=0)


def test_distillation_on_samples_is_in_expectation_reverse_kl(
    backend: str, student: np.ndarray, other: np.ndarray
) -> None:
    value, statistics, gradient = every_token(backend, Distill(other), student)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.int32)
    full = run(backend, Distill(other[None]), student[None], zero, one)
    assert value == pytest.approx(full[0], rel=1e-5)
    assert statistics["kl"] == pytest.approx(full[1]["kl"], rel=1e-5)
    assert statistics["entropy"] == pytest.approx(full[1]["entropy"], rel=1e-5)
    np.testing.assert_allclose(gradient, full[2][0], rtol=0, atol=1e-6)


def test_the_penalty_estimates_reverse_kl_and_pulls_as_forward_kl(
    backend: str, student: np.ndarray, other: np.ndarray
) -> None:
    nothing = np.zeros(VOCAB, np.float32)
    loss = Policy(log_softmax(student), nothing, 0.2, 0.2, reference_logprobs=other, kl_weight=1.0)
    value, statistics, gradient = every_token(backend, loss, student)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.int32)
    forward = run(backend, Distill(other[None], forward_share=1.0), student[None], zero, one)
    assert value == pytest.approx(forward[1]["kl"], rel=1e-4)
    assert statistics["kl"] == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(gradient, forward[2][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("forward_share", [0.0, 0.4, 1.0])
def test_a_student_like_its_teacher_is_at_rest(backend: str, student: np.ndarray, forward_share: float) -> None:
    one, zero = np.ones(1, np.float32), np.zeros(1, np.int32)
    loss = Distill(log_softmax(student)[None], forward_share)
    value, statistics, gradient = run(backend, loss, student[None], zero, one)
    assert value == pytest.approx(0, abs=1e-6)
    assert statistics["forward_kl"] == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_before_the_policy_has_moved_the_gradient_is_that_of_weighted_likelihood(backend: str) -> None:
    random = np.random.default_rng(3)
    logits = random.standard_normal((6, VOCAB)).astype(np.float32)
    targets, weights = random.integers(0, VOCAB, 6).astype(np.int32), random.random(6).astype(np.float32)
    advantages = random.random(6).astype(np.float32)
    old = log_softmax(logits)[np.arange(6), targets]
    found = run(backend, Policy(old, advantages, 0.2, 0.28), logits, targets, weights)
    expected = run(backend, NextToken(), logits, targets, weights * advantages)
    np.testing.assert_allclose(found[2], expected[2], rtol=0, atol=1e-6)
    assert found[1]["clipped"] == 0


# The ratio of probabilities, the advantage, and whether the policy is still pushed.
@pytest.mark.parametrize(
    ("ratio", "advantage", "pushed"),
    [(1.25, 1, True), (1.3, 1, False), (0.5, 1, True), (1.3, -1, True), (0.85, -1, True), (0.75, -1, False)],
)
def test_the_clip_stops_what_has_gone_far_enough(
    backend: str, student: np.ndarray, ratio: float, advantage: float, pushed: bool
) -> None:
    old = log_softmax(student)[2:3] - np.float32(np.log(ratio))
    loss = Policy(old, np.full(1, advantage, np.float32), clip_low=0.2, clip_high=0.28)
    value, statistics, gradient = run(backend, loss, student[None], np.array([2], np.int32), np.ones(1, np.float32))
    assert (np.abs(gradient).max() > 1e-3) == pushed
    assert statistics["clipped"] == (not pushed)
    bound = {1: 1.28, -1: 0.8}[int(advantage)]
    assert value == pytest.approx(-advantage * (ratio if pushed else bound), rel=1e-5)
