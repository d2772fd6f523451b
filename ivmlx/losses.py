"""The losses of training, on logits; docs/training.md has their formulas and sources."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ivcore.training import Distill, Loss, NextToken, Policy

Statistics = dict[str, mx.array]


def weighted_loss(
    loss: Loss, logits: mx.array, targets: mx.array, weights: mx.array, rows: Statistics
) -> tuple[mx.array, Statistics]:
    """The sum over K places of weight times loss, and of weight times each statistic.

    logits: float32 (K, vocab). targets, weights: (K,). rows: what `loss.rows` gave for these places.
    """
    logprobs = nn.log_softmax(logits, axis=-1)
    chosen = mx.take_along_axis(logprobs, targets[:, None], axis=-1)[:, 0]  # (K,)
    statistics: Statistics = {}
    match loss:
        case NextToken():
            each = -chosen
        case Policy():
            each, statistics = _policy(loss, chosen, rows)
            statistics["entropy"] = _entropy(logprobs)
        case Distill():
            each, statistics = _distill(loss, logprobs, chosen, rows["teacher"])
            statistics["entropy"] = _entropy(logprobs)
    return (weights * each).sum(), {name: (weights * value).sum() for name, value in statistics.items()}


def _policy(loss: Policy, chosen: mx.array, rows: Statistics) -> tuple[mx.array, Statistics]:
    advantages = rows["advantages"]
    ratio = mx.exp(chosen - rows["old"])
    free = ratio * advantages
    bounded = mx.clip(ratio, 1 - loss.clip_low, 1 + loss.clip_high) * advantages
    each, statistics = -mx.minimum(free, bounded), {"clipped": (bounded < free).astype(mx.float32)}
    if "reference" in rows:
        ahead = rows["reference"] - chosen
        statistics["kl"] = mx.exp(ahead) - ahead - 1
        each = each + loss.kl_weight * statistics["kl"]
    return each, statistics


def _distill(loss: Distill, logprobs: mx.array, chosen: mx.array, teacher: mx.array) -> tuple[mx.array, Statistics]:
    if not loss.full:
        behind = mx.stop_gradient(chosen - teacher)
        return behind * mx.exp(chosen - mx.stop_gradient(chosen)), {"kl": behind}
    reverse = (mx.exp(logprobs) * (logprobs - teacher)).sum(axis=-1)
    forward = (mx.exp(teacher) * (teacher - logprobs)).sum(axis=-1)
    each = (1 - loss.forward_share) * reverse + loss.forward_share * forward
    return each, {"kl": reverse, "forward_kl": forward}


def _entropy(logprobs: mx.array) -> mx.array:
    return -(mx.exp(logprobs) * logprobs).sum(axis=-1)
