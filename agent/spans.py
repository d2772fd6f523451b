"""Spans of a video: how they overlap, and reading one out of what a model wrote."""

from __future__ import annotations

import re

Span = tuple[float, float]
"""Seconds, start before end."""

# Seconds, or a player's clock such as 12:03 or 1:02:03.5; never the end of a longer number or clock.
_WHOLE = "[0-9]{1,3}:[0-5][0-9]:[0-5][0-9]|[0-9]{1,3}:[0-5][0-9]|[0-9]{1,6}"
_TIME = rf"(?<![0-9.])(?<![0-9]:)((?:{_WHOLE})(?:\.[0-9]+)?)(?!:?[0-9])"
_SPAN = re.compile(rf"{_TIME}\s*(?:s|seconds)?\s*(?:to|-|–|and)\s*{_TIME}")


MARGIN = 1.0
"""Seconds around a span that a close look at it sees, too: what begins or ends there is not taken for lasting."""


def around(span: Span, duration: float) -> Span:
    """What a close look at a span sees of a video of so many seconds."""
    return max(span[0] - MARGIN, 0.0), min(span[1] + MARGIN, duration)


def overlap(one: Span, other: Span) -> float:
    """Seconds that two spans share."""
    return max(0.0, min(one[1], other[1]) - max(one[0], other[0]))


def first_span(text: str, within: Span) -> Span | None:
    """The first span that a text states, cut off at the borders of `within`; None without one that has a part there."""
    for match in _SPAN.finditer(text):
        start, end = max(_seconds(match[1]), within[0]), min(_seconds(match[2]), within[1])
        if start < end:
            return start, end
    return None


def _seconds(time: str) -> float:
    """The seconds of a number or a clock, `1:02:03.5`."""
    whole, *rest = time.split(":")
    seconds = float(whole)
    for part in rest:
        seconds = seconds * 60 + float(part)
    return seconds
