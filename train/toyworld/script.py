"""What happens in a clip, as data, and the seeds that scripts are made from.

Time runs in ticks of a tenth of a second, one a frame, so every time in a script has one decimal and is a frame's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np

from train.toyworld.words import Name

WORLD_VERSION = 1  # goes into every seed: raise it when the same seed is to make another clip
TICKS = 10  # a second; also the frames per second of the clips
SIZE = 64  # side in pixels of the pictures that radii and paths are given for
SHORT_SECONDS = 4.0
LONG_SECONDS = 16.0  # the shortest clip of several scenes

T = TypeVar("T")

Split = Literal["train", "heldout"]
Span = tuple[float, float]
Colour = tuple[int, int, int]
ROUNDING = 1e-4  # seconds by which a frame's time, read from a file, may miss its tick


def seeds(split: Split, first: int, count: int) -> range:
    """Seeds number first..first+count of a split: even ones are for training, odd ones are held out.

    Whatever is made from a seed belongs to `split_of(seed)`, so no function can bring the two together.
    """
    if split not in get_args(Split) or first < 0 or count < 0:
        raise ValueError(f"no seeds {first}..{first + count} of {split!r}; the splits are {get_args(Split)}")
    parity = get_args(Split).index(split)
    return range(2 * first + parity, 2 * (first + count) + parity, 2)


def split_of(seed: int) -> Split:
    """The only split that a seed belongs to."""
    return "heldout" if seed % 2 else "train"


def random_of(seed: int, *stream: int) -> np.random.Generator:
    """The world's random numbers for one purpose (`stream`) of one seed."""
    return np.random.default_rng([WORLD_VERSION, seed, *stream])


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, each equally likely."""
    return options[int(rng.integers(len(options)))]


@dataclass(frozen=True)
class Figure:
    """A shape that is there from `start` to `end` (seconds, end excluded) and moves on a straight line meanwhile.

    path: its centre's first and last (x, y), in pixels of a SIZE x SIZE picture, y downwards; radius: in those, too.
    """

    name: Name
    direction: str
    radius: float
    span: Span
    path: tuple[tuple[float, float], tuple[float, float]]

    def visible(self, time: float) -> bool:
        start, end = self.span
        return start - ROUNDING <= time < end - ROUNDING

    def centre(self, times: np.ndarray) -> np.ndarray:
        """float64 (N, 2): (x, y) at every time of (N,)."""
        (start, end), (first, last) = self.span, np.array(self.path)
        return first + ((times - start) / (end - start))[:, None] * (last - first)


@dataclass(frozen=True)
class Scene:
    """A part of a clip with its own background: a gradient from the top's colour to the bottom's."""

    span: Span
    top: Colour
    bottom: Colour


@dataclass(frozen=True)
class Line:
    """A subtitle: a fact (a key of FACTS) about the figures of a name, which no picture shows."""

    span: Span
    name: Name
    fact: str
    value: str
    text: str


@dataclass(frozen=True)
class Script:
    """A clip of `duration` seconds: scenes and lines in order, figures by the time they come.

    keys: the figures that the question of this kind is about, by the time they come; in a script of the kind "absent"
    they are not among `figures`.
    """

    seed: int
    kind: str
    duration: float
    scenes: tuple[Scene, ...]
    figures: tuple[Figure, ...]
    keys: tuple[Figure, ...]
    lines: tuple[Line, ...]

    def visible_at(self, time: float) -> tuple[Figure, ...]:
        """The figures to be seen at a time in seconds."""
        return tuple(figure for figure in self.figures if figure.visible(time))

    def frame_times(self) -> np.ndarray:
        """float64 (N,): the time in seconds of every frame."""
        return np.arange(round(self.duration * TICKS)) / TICKS
