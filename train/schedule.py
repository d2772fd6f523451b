"""The learning rate of a step: a pure function, so that a resumed run needs nothing but the step's number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["cosine", "constant"]


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up to `peak`, then half a cosine down to `floor` (SGDR, arXiv 1608.03983, one cycle), or no change.

    warmup_steps: the first of them already learns, at peak / warmup_steps; the last is at the peak. The last of
    total_steps is at the floor.
    """

    peak: float
    floor: float
    warmup_steps: int
    total_steps: int
    shape: Shape = "cosine"

    def __call__(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        done = step + 1  # the schedule is read at the end of the step, else the first one would learn nothing
        if done < self.warmup_steps:
            return self.peak * done / self.warmup_steps
        if self.shape == "constant":
            return self.peak
        progress = (done - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.floor + (self.peak - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
