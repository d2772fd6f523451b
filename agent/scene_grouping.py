"""Shots -> scenes: shots that look alike soon after each other, with what is shown between them, are one scene.

- Overlapping links: a shot is linked to every later one that looks like it, and a scene ends where no link reaches
  across, so the two sides of a conversation stay together (Hanjalic, Lagendijk and Biemond, "Automated high-level movie
  segmentation for advanced video-retrieval systems", IEEE Transactions on Circuits and Systems for Video Technology
  9(4), 1999).
- Only within a window of time, since places come again in other scenes (Yeung and Yeo, "Time-constrained clustering for
  segmentation of video into story units", ICPR 1996).
- Two shots look as alike as their colour histograms intersect (Swain and Ballard, "Color indexing", International
  Journal of Computer Vision 7(1), 1991); of hue before all, which tells dark places apart, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from PIL import Image

from agent.spans import Span
from ivcore.demux import ROUNDING

ALIKE = 0.7
"""Intersection of two shots' histograms, 0 to 1, from which on they are linked; chosen by eye on a few films."""

WINDOW = 10.0
"""Seconds that may lie between two shots that are linked: a few shots of a conversation."""

BINS = (16, 4, 4)  # of hue, saturation and value
SAMPLE_SECONDS = 0.5  # between the pictures of which colours are counted; less than the shortest shot


class Colours:
    """Colour histograms of a video's pictures, two a second; 2 kB of memory a second."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._histograms: list[np.ndarray] = []

    def add(self, time: float, picture: np.ndarray) -> None:
        """Take in a picture, BGR uint8 (h, w, 3), at a time in seconds, later than the last one."""
        if not self._times or time - self._times[-1] >= SAMPLE_SECONDS:
            self._times.append(time)
            self._histograms.append(_histogram(picture))

    def of(self, span: Span) -> np.ndarray:
        """float32 (bins,): the mean histogram of a span, which sums to 1; zeros where it has no picture."""
        first, last = np.searchsorted(self._times, np.subtract(span, ROUNDING))
        if first == last:
            return np.zeros(math.prod(BINS), np.float32)
        return np.mean(self._histograms[first:last], axis=0)


def group(shots: Sequence[Span], colours: Colours) -> list[list[Span]]:
    """The shots, which follow each other, as scenes: lists of shots, in order."""
    histograms = [colours.of(shot) for shot in shots]
    reach = list(range(len(shots)))  # the last shot that each one is linked to
    for one, (_, end) in enumerate(shots):
        for other in range(one + 1, len(shots)):
            if shots[other][0] - end > WINDOW:
                break
            if np.minimum(histograms[one], histograms[other]).sum() >= ALIKE:
                reach[one] = other
    spanned = np.maximum.accumulate(reach)
    edges = [0, *(place for place in range(1, len(shots)) if spanned[place - 1] < place), len(shots)]
    return [list(shots[first:last]) for first, last in pairwise(edges)]


def _histogram(picture: np.ndarray) -> np.ndarray:
    """float32 (bins,): the share of the pixels of each colour."""
    hsv = np.asarray(Image.fromarray(picture[..., ::-1]).convert("HSV")).reshape(-1, 3)
    places = np.ravel_multi_index(tuple((hsv * np.array(BINS) // 256).T), BINS)
    return (np.bincount(places, minlength=math.prod(BINS)) / len(hsv)).astype(np.float32)
