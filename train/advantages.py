"""Rewards of groups of rollouts -> advantages, and what each of their tokens counts.

- An advantage is a reward less the mean of its group, of rollouts from one prompt (GRPO, arXiv 2402.03300, section
  4.1.2). Dividing by the group's standard deviation is GRPO's; without it, prompts on which nearly all rollouts agree
  do not count more than others (Dr. GRPO, arXiv 2503.20783, section 3.1).
- A group whose rewards are all alike says nothing and is skipped (DAPO, arXiv 2503.14476, section 3.2).
- All tokens of a step count the same, whatever the length of their rollout (DAPO, section 3.3).
- A rollout that was cut off can be left out, or its reward lowered before it comes to that (DAPO, section 3.4).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MIN_SPREAD = 1e-6
"""Rewards of a group that differ by no more than this are alike; dividing by their deviation would blow up rounding."""


@dataclass(frozen=True)
class Advantages:
    """values: float32 (groups, size), 0 in skipped groups. kept: bool (groups,)."""

    values: np.ndarray
    kept: np.ndarray

    @property
    def skipped(self) -> int:
        """How many groups have no spread."""
        return int((~self.kept).sum())


def group_advantages(rewards: np.ndarray, *, scale_by_std: bool) -> Advantages:
    """The advantages of rewards (groups, size), each row the rollouts of one prompt.

    scale_by_std: divide by the standard deviation of the group (that of a population).
    """
    rewards = np.asarray(rewards, np.float64)
    kept = np.ptp(rewards, axis=1) > MIN_SPREAD
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if scale_by_std:
        centred = centred / np.where(kept, rewards.std(axis=1), 1.0)[:, None]
    return Advantages((centred * kept[:, None]).astype(np.float32), kept)


def overlong_penalty(length: int, max_tokens: int, buffer: int) -> float:
    """What is added to the reward of a rollout of so many tokens (DAPO, equation 13).

    0 up to `buffer` tokens below the most, -1 at the most; in between it falls linearly.
    """
    over = length - (max_tokens - buffer)
    return -min(1.0, over / buffer) if buffer and over > 0 else 0.0


def counted_rollouts(advantages: Advantages, cut_off: np.ndarray, *, mask_cut_off: bool) -> np.ndarray:
    """bool (groups, size): the rollouts to train on, those of kept groups; without the ones cut off if they are masked.

    cut_off: bool (groups, size), rollouts that reached the most tokens without an end.
    """
    counted = np.broadcast_to(advantages.kept[:, None], advantages.values.shape)
    return counted & ~cut_off if mask_cut_off else counted.copy()
