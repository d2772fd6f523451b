"""Whether an answer is right: exact words for choices, temporal IoU for spans.

A span is written `1.5 to 3.0`: seconds from the start of the clip, `start` before `end`.
"""

from __future__ import annotations

import re

from train.toyworld.script import Span

_SPAN = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?) to ([0-9]{1,6}(?:\.[0-9]{1,6})?)")


def span_text(span: Span) -> str:
    """A span as answers and transcripts write it, to a tenth of a second."""
    return f"{span[0]:.1f} to {span[1]:.1f}"


def parse_span(text: str) -> Span | None:
    """The span that an answer states; None where it is not of the form `1.5 to 3.0` or does not end after its start."""
    match = _SPAN.fullmatch(_plain(text))
    if match is None:
        return None
    start, end = float(match[1]), float(match[2])
    return (start, end) if start < end else None


def temporal_iou(one: Span, other: Span) -> float:
    """Intersection over union of two spans, 0 to 1."""
    shared = min(one[1], other[1]) - max(one[0], other[0])
    if shared <= 0:
        return 0.0
    return shared / (max(one[1], other[1]) - min(one[0], other[0]))


def is_right(given: str, answer: str) -> bool:
    """Whether the words are the answer's; case, white space and a full stop at the end do not count."""
    return _plain(given) == _plain(answer)


def score(given: str, answer: str, span: Span | None = None) -> float:
    """What an answer earns, 0 to 1: the IoU with `span` where a span was asked for, else 1 for the right words."""
    if span is None:
        return float(is_right(given, answer))
    stated = parse_span(given)
    return 0.0 if stated is None else temporal_iou(stated, span)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()
