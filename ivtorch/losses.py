"""The losses of training, on logits; docs/training.md has their formulas and sources."""

from __future__ import annotations

import torch

from ivcore.training import Distill, Loss, NextToken, Policy

Statistics = dict[str, torch.Tensor]


def weighted_loss(
    loss: Loss, logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, rows: Statistics
) -> tuple[torch.Tensor, Statistics]:
    """The sum over K places of weight times loss, and of weight times each statistic.

    logits: float32 (K, vocab). targets, weights: (K,). rows: what `loss.rows` gave for these places.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(-1, targets[:, None])[:, 0]  # (K,)
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
    return (weights * each).sum(), {name: (weights * value.detach()).sum() for name, value in statistics.items()}


def _policy(loss: Policy, chosen: torch.Tensor, rows: Statistics) -> tuple[torch.Tensor, Statistics]:
    advantages = rows["advantages"]
    ratio = torch.exp(chosen - rows["old"])
    free = ratio * advantages
    bounded = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high) * advantages
    each, statistics = -torch.minimum(free, bounded), {"clipped": (bounded < free).float()}
    if "reference" in rows:
        ahead = rows["reference"] - chosen
        statistics["kl"] = torch.exp(ahead) - ahead - 1
        each = each + loss.kl_weight * statistics["kl"]
    return each, statistics


def _distill(
    loss: Distill, logprobs: torch.Tensor, chosen: torch.Tensor, teacher: torch.Tensor
) -> tuple[torch.Tensor, Statistics]:
    if not loss.full:
        behind = (chosen - teacher).detach()
        return behind * torch.exp(chosen - chosen.detach()), {"kl": behind}
    reverse = (logprobs.exp() * (logprobs - teacher)).sum(dim=-1)
    forward = (teacher.exp() * (teacher - logprobs)).sum(dim=-1)
    each = (1 - loss.forward_share) * reverse + loss.forward_share * forward
    return each, {"kl": reverse, "forward_kl": forward}


def _entropy(logprobs: torch.Tensor) -> torch.Tensor:
    frozen = logprobs.detach()
    return -(frozen.exp() * frozen).sum(dim=-1)
