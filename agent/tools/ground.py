"""The span that a description matches, found by asking the model window by window, coarse first and then fine.

The windows overlap by more than a short event lasts, so that one of them has all of it; what is compared between
windows is the probability that the model gives to the event being there at all, not the words of its answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field

from agent import prompts
from agent.spans import Span, first_span, overlap
from agent.tools.tool import Shown, ToolArguments, checked_span
from agent.workspace import Workspace

WINDOW, OVERLAP = 16.0, 4.0
COARSE_FPS, FINE_FPS = 1.0, 4.0
CANDIDATES = 3
MARGIN = 3.0
"""Seconds before and after a candidate that the fine look has in view."""

PRESENT = 0.5
ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Found:
    """A span, and how sure the model is that the event is there."""

    span: Span
    probability: float


class Ground:
    """Where something described in words is to be seen."""

    name: ClassVar[str] = "ground"
    description: ClassVar[str] = "Finds when something described in words is to be seen; start and end narrow it down."

    class Arguments(ToolArguments):
        description: str = Field(min_length=1)
        start: float | None = None
        end: float | None = None

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def __call__(self, arguments: Ground.Arguments) -> Shown:
        span = checked_span(arguments.start, arguments.end, self._workspace.duration)
        found = self.find(arguments.description, span)
        sure = [each for each in found if each.probability >= PRESENT]
        if not sure:
            best = f" The likeliest place is {_said(found[0])}." if found else ""
            return Shown(f"Nothing from {span[0]:.1f} to {span[1]:.1f} matches.{best}")
        return Shown("Matches: " + ", ".join(map(_said, sure)) + ".")

    def find(self, description: str, span: Span) -> list[Found]:
        """The likeliest matches in a span, best first; of those that overlap, the better one."""
        coarse = [self._ask(description, window, COARSE_FPS) for window in windows(span)]
        coarse.sort(key=lambda each: -each.probability)
        fine: list[Found] = []
        for each in coarse[:CANDIDATES]:
            near = max(each.span[0] - MARGIN, span[0]), min(each.span[1] + MARGIN, span[1])
            fine.append(self._ask(description, near, FINE_FPS) if each.probability >= PRESENT else each)
        best: list[Found] = []
        for each in sorted(fine, key=lambda each: -each.probability):
            if not any(overlap(each.span, other.span) for other in best):
                best.append(each)
        return best

    def _ask(self, description: str, window: Span, fps: float) -> Found:
        known = (self.name, description, window, fps)
        if known not in self._workspace.memo:
            self._workspace.memo[known] = self._look(description, window, fps)
        found: Found = self._workspace.memo[known]
        return found

    def _look(self, description: str, window: Span, fps: float) -> Found:
        clip = self._workspace.look(window, fps=fps, most=int(WINDOW * FINE_FPS))
        session = self._workspace.asked(clip, prompts.when(description))
        (absent,) = session.log_likelihoods([prompts.NOT_THERE])
        answer = "".join(session.answer(ANSWER_TOKENS))
        span = first_span(answer, window) or window
        return Found(span, float(1.0 - np.exp(absent)))


def windows(span: Span) -> list[Span]:
    """Windows of at most WINDOW seconds that cover a span, each OVERLAP into the last one."""
    start, end = span
    count = max(1, int(np.ceil((end - start - OVERLAP) / (WINDOW - OVERLAP))))
    length = (end - start + (count - 1) * OVERLAP) / count
    return [(start + i * (length - OVERLAP), min(start + i * (length - OVERLAP) + length, end)) for i in range(count)]


def _said(found: Found) -> str:
    return f"{found.span[0]:.1f} to {found.span[1]:.1f} ({found.probability:.2f})"
