"""Whether a span supports a claim: asked in a context that has seen neither the run nor its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import numpy as np
from pydantic import Field

from agent import prompts
from agent.entries import Verdict
from agent.spans import Span
from agent.tools.tool import Shown, ToolArguments, checked_span
from agent.tools.transcribe import lines_in
from agent.workspace import Workspace

FPS, MOST_FRAMES = 4.0, 64
MARGIN = 1.0
"""Seconds around the span that are looked at, too: what begins or ends there is not taken for lasting."""


@dataclass(frozen=True)
class Check:
    """verdict: the likeliest; support: the probability of support."""

    verdict: Verdict
    support: float
    spans: tuple[Span, ...]


class Verify:
    """The model's judgement of one claim, from frames and lines alone."""

    name: ClassVar[str] = "verify"
    description: ClassVar[str] = "Checks with fresh eyes whether a span (seconds) supports a claim."

    class Arguments(ToolArguments):
        claim: str = Field(min_length=1)
        start: float
        end: float

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def __call__(self, arguments: Verify.Arguments) -> Shown:
        span = checked_span(arguments.start, arguments.end, self._workspace.duration)
        check = self.check(arguments.claim, [span])
        return Shown(f"{span[0]:.1f} to {span[1]:.1f}: {check.verdict} ({check.support:.2f}).")

    def check(self, claim: str, spans: Sequence[Span]) -> Check:
        """The verdict over several spans: one that decides is enough, and support outweighs what is unclear."""
        verdicts: tuple[Verdict, ...] = get_args(Verdict)
        found = [self._one(claim, span) for span in spans]
        best = max(found, key=lambda chances: max(chances[0], chances[1])) if found else np.array([0.0, 0.0, 1.0])
        return Check(verdicts[int(best.argmax())], float(best[0]), tuple(spans))

    def _one(self, claim: str, span: Span) -> np.ndarray:
        known = (self.name, claim, span)
        if known not in self._workspace.memo:
            self._workspace.memo[known] = self._look(claim, span)
        chances: np.ndarray = self._workspace.memo[known]
        return chances

    def _look(self, claim: str, span: Span) -> np.ndarray:
        duration = self._workspace.duration
        near = max(span[0] - MARGIN, 0.0), min(span[1] + MARGIN, duration)
        clip = self._workspace.look(near, fps=FPS, most=MOST_FRAMES)
        session = self._workspace.asked(clip, prompts.claim(claim), quoted=lines_in(self._workspace, near))
        scores = session.log_likelihoods(prompts.VERDICTS)
        chances = np.exp(scores - scores.max())
        return chances / chances.sum()
