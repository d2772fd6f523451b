"""Spans of a video: how they overlap, and reading one out of what a model wrote."""

from __future__ import annotations

import re

from agent.entries import Span

_NUMBER = r"(?<![0-9.])([0-9]{1,6}(?:\.[0-9]+)?)(?![0-9])"
_SPAN = re.compile(rf"{_NUMBER}\s*(?:s|seconds)?\s*(?:to|-|–|and)\s*{_NUMBER}")


def overlap(one: Span, other: Span) -> float:
    """Seconds that two spans share."""
    return max(0.0, min(one[1], other[1]) - max(one[0], other[0]))


def iou(one: Span, other: Span) -> float:
    """Intersection over union, 0 to 1."""
    shared = overlap(one, other)
    return shared / ((one[1] - one[0]) + (other[1] - other[0]) - shared) if shared else 0.0


def first_span(text: str, within: Span) -> Span | None:
    """The first span that a text states, cut off at the borders of `within`; None without one that has a part there."""
    for match in _SPAN.finditer(text):
        start, end = max(float(match[1]), within[0]), min(float(match[2]), within[1])
        if start < end:
            return start, end
    return None
