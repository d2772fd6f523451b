"""Whether a span supports a claim: asked in a context that has seen neither the run nor its answer.

Where it is known what the claim answers, the model first answers that itself, before it sees the claim: to read
something off frames is easier than to hold frames against a sentence. Whether the words of that answer are in the claim
then changes the odds of its support by as much as this has been found to tell (Bayes' rule, in odds).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, get_args

import numpy as np
from pydantic import Field

from agent import prompts
from agent.entries import Verdict
from agent.spans import Span, around
from agent.tools.tool import Shown, ToolArguments, checked_span
from agent.tools.transcribe import lines_in
from agent.workspace import Workspace

FPS, MOST_FRAMES = 4.0, 64
SEEN_TOKENS = 32

TELLING = 20.0
"""How much more often the fresh answer is in a claim that holds than in another, and how much less often it is not:
0.95 and 0.03 of held-out claims (docs/training.md, Acting)."""

SHORT = 4
"""Words of an answer that a claim would repeat; a longer one may say the same in others."""

YES_OR_NO = frozenset({"yes", "no"})
"""What a claim says in a sentence."""


@dataclass(frozen=True)
class Check:
    """verdict: the likeliest; support: the probability of support; seen: the fresh answer, "" without a question."""

    verdict: Verdict
    support: float
    spans: tuple[Span, ...]
    seen: str = ""


class Verify:
    """The model's judgement of one claim, from frames and lines alone."""

    name: ClassVar[str] = "verify"
    description: ClassVar[str] = (
        "Checks with fresh eyes whether a span (seconds) supports a claim that answers a question."
    )

    class Arguments(ToolArguments):
        claim: str = Field(min_length=1)
        start: float
        end: float
        question: str = ""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def __call__(self, arguments: Verify.Arguments) -> Shown:
        span = checked_span(arguments.start, arguments.end, self._workspace.duration)
        check = self.check(arguments.claim, [span], arguments.question)
        text = f"{span[0]:.1f} to {span[1]:.1f}: {check.verdict} ({check.support:.2f})."
        return Shown(text, quoted=tuple(check.seen.splitlines()))

    def check(self, claim: str, spans: Sequence[Span], question: str = "") -> Check:
        """The verdict over several spans: one that decides is enough, and support outweighs what is unclear.

        question: that the claim answers, "" where there is none.
        """
        if not spans:
            return Check("unclear", 0.0, ())
        found = [self._one(claim, span, question) for span in spans]
        return replace(max(found, key=lambda each: each.decided).check, spans=tuple(spans))

    def _one(self, claim: str, span: Span, question: str) -> _Judged:
        known = (self.name, claim, span, question)
        if known not in self._workspace.memo:
            self._workspace.memo[known] = self._look(claim, span, question)
        judged: _Judged = self._workspace.memo[known]
        return judged

    def _look(self, claim: str, span: Span, question: str) -> _Judged:
        near = around(span, self._workspace.duration)
        clip = self._workspace.look(near, fps=FPS, most=MOST_FRAMES)
        first = question or prompts.claim(claim)
        session, seen = self._workspace.asked(clip, first, quoted=lines_in(self._workspace, near)), ""
        if question:
            seen = "".join(session.answer(SEEN_TOKENS)).strip()
            session.read([{"role": "user", "content": prompts.claim(claim)}])
        scores = session.log_likelihoods(prompts.VERDICTS)
        chances = np.exp(scores - scores.max()) * np.array([_telling(seen, claim), 1.0, 1.0])
        chances /= chances.sum()
        verdicts: tuple[Verdict, ...] = get_args(Verdict)
        check = Check(verdicts[int(chances.argmax())], float(chances[0]), (span,), seen)
        return _Judged(check, float(max(chances[0], chances[1])))


def _telling(answer: str, claim: str) -> float:
    """The factor by which a fresh answer, "" for none, changes the odds that a claim holds."""
    own = _words(answer) - YES_OR_NO
    if not own:
        return 1.0
    if own <= _words(claim):
        return TELLING
    return 1 / TELLING if len(own) <= SHORT else 1.0


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


@dataclass(frozen=True)
class _Judged:
    """decided: the probability of support or of contradict, whichever is larger."""

    check: Check
    decided: float
