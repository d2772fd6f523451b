"""The span that a description matches, found by asking the model window by window, coarse first and then fine.

- Windows overlap by more than a short event lasts, so that one of them has all of it. What is compared between windows
  is the probability that the model gives to the event being there at all; when it is there is only asked of a close
  look that has seen it.
- A match is looked at once more, as closely as `verify` does. How likely it is follows by Bayes' rule from both looks,
  each of them taken at even odds, and from the number of windows, one of which has the event: among fifty windows
  without it one is easily taken for it, but seldom twice and for sure.
- A window is shown as a clip of its own that begins at 0: where in a short clip something is, small models tell as well
  late in a film as at its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from pydantic import Field

from agent import prompts
from agent.spans import Span, around, first_span, overlap
from agent.tools.tool import Shown, ToolArguments, checked_span
from agent.workspace import Workspace

WINDOW, OVERLAP = 16.0, 4.0
FPS = 1.0
"""Enough to see whether something is there, at half of what Qwen3-VL samples a video at."""

CANDIDATES = 3
FINE_WINDOW, FINE_OVERLAP, FINE_FPS = 4.0, 2.0, 2.0
"""Of the windows into which a candidate is cut, like the clips that a model has learned from."""

EDGE = 0.6
"""Seconds from its window's edge from which on a match may go on behind it: more than the time between two frames."""

CLOSEST_FPS, MOST_CLOSEST = 4.0, 64
"""Of the last look at a match."""

PRESENT = 0.5
DOUBT = 1e-6
"""The least probability that a look leaves: what rounds to none would outweigh any other look."""

YES_TOKENS, ANSWER_TOKENS = 4, 16
MOST_FRAMES = int(WINDOW * FPS)


@dataclass(frozen=True)
class Found:
    """A span, how sure the model is that the event is there, and the window that it was asked about."""

    span: Span
    probability: float
    window: Span

    @property
    def is_whole(self) -> bool:
        """Whether no edge of the window cuts it."""
        return self.span[0] - self.window[0] > EDGE and self.window[1] - self.span[1] > EDGE


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
        if found[0].probability < PRESENT:
            return Shown(
                f"Nothing from {span[0]:.1f} to {span[1]:.1f} matches. The likeliest place is {_said(found[0])}."
            )
        return Shown("Matches: " + ", ".join(map(_said, found)) + ".")

    def find(self, description: str, span: Span) -> list[Found]:
        """The matches in a span, the best CANDIDATES of them, best first; where there is none, the likeliest place."""
        coarse = [self._ask(description, window) for window in windows(span)]
        coarse.sort(key=lambda each: -each.probability)
        candidates = [each.window for each in coarse[:CANDIDATES] if each.probability >= PRESENT]
        fine = [self._ask(description, part, FINE_FPS) for window in candidates for part in parts_of(window)]
        seen = together([each for each in fine if each.probability >= PRESENT])[:CANDIDATES]
        matches = [self._confirmed(description, each, len(coarse)) for each in seen]
        matches.sort(key=lambda each: -each.probability)
        likeliest = (matches or sorted(fine or coarse, key=lambda each: -each.probability))[:1]
        return [each for each in matches if each.probability >= PRESENT] or likeliest

    def _confirmed(self, description: str, match: Found, count: int) -> Found:
        """The match after one more look at its span: one of `count` windows has what is described."""
        near = around(match.span, self._workspace.duration)
        again = self._ask(description, near, CLOSEST_FPS).probability
        odds = _odds(match.probability) * _odds(again) / count
        return replace(match, probability=odds / (1 + odds))

    def _ask(self, description: str, window: Span, fps: float = FPS) -> Found:
        known = (self.name, description, window, fps)
        if known not in self._workspace.memo:
            self._workspace.memo[known] = self._look(description, window, fps)
        found: Found = self._workspace.memo[known]
        return found

    def _look(self, description: str, window: Span, fps: float) -> Found:
        """At FINE_FPS it matters where in the window it is, and not only whether it is there."""
        clip = self._workspace.look(window, fps=fps, most=MOST_CLOSEST if fps == CLOSEST_FPS else MOST_FRAMES)
        session = self._workspace.asked(clip, prompts.is_visible(description), origin=window[0])
        yes, no = session.log_likelihoods(prompts.YES_NO, whole=False)
        probability = float(1 / (1 + np.exp(no - yes)))
        if fps != FINE_FPS or probability < PRESENT:
            return Found(window, probability, window)
        "".join(session.answer(YES_TOKENS))
        session.read([{"role": "user", "content": prompts.when(description)}])
        said = first_span("".join(session.answer(ANSWER_TOKENS)), (0.0, window[1] - window[0]))
        return Found((window[0] + said[0], window[0] + said[1]) if said else window, probability, window)


def together(found: Sequence[Found]) -> list[Found]:
    """What windows that overlap have found, each match once, best first.

    Of whole ones that overlap the likelier stays. Those that an edge cuts are parts of one that goes on in the next
    window; where windows that overlap have seen parts that do not touch, one was misread, and the likelier stays.
    """
    whole: list[Found] = []
    for each in sorted((each for each in found if each.is_whole), key=lambda each: -each.probability):
        if not any(overlap(each.span, other.span) for other in whole):
            whole.append(each)
    cut = [each for each in found if not each.is_whole and not any(overlap(each.span, one.span) for one in whole)]
    joined = [_hull(group) for group in _groups(cut, lambda each: each.span)]
    parts = [max(group, key=lambda each: each.probability) for group in _groups(joined, lambda each: each.window)]
    return sorted([*whole, *parts], key=lambda each: -each.probability)


def _odds(probability: float) -> float:
    kept = min(max(probability, DOUBT), 1 - DOUBT)
    return kept / (1 - kept)


def _hull(found: Sequence[Found]) -> Found:
    """From the first second to the last, as likely as the likeliest."""
    spans = (min(each.span[0] for each in found), max(each.span[1] for each in found))
    seen = (min(each.window[0] for each in found), max(each.window[1] for each in found))
    return Found(spans, max(each.probability for each in found), seen)


def _groups(found: Sequence[Found], what: Callable[[Found], Span]) -> list[list[Found]]:
    """Those whose spans or windows touch, one after the other."""
    groups: list[list[Found]] = []
    latest = 0.0
    for each in sorted(found, key=what):
        if groups and what(each)[0] <= latest:
            groups[-1].append(each)
            latest = max(latest, what(each)[1])
        else:
            groups.append([each])
            latest = what(each)[1]
    return groups


def windows(span: Span, most: float = WINDOW, shared: float = OVERLAP) -> list[Span]:
    """Windows of at most so many seconds that cover a span, each so many seconds into the last one."""
    start, end = span
    count = max(1, int(np.ceil((end - start - shared) / (most - shared))))
    length = (end - start + (count - 1) * shared) / count
    return [(start + i * (length - shared), min(start + i * (length - shared) + length, end)) for i in range(count)]


def parts_of(window: Span) -> list[Span]:
    """The windows of a closer look at one."""
    return windows(window, FINE_WINDOW, FINE_OVERLAP)


def _said(found: Found) -> str:
    return f"{found.span[0]:.1f} to {found.span[1]:.1f} ({found.probability:.2f})"
