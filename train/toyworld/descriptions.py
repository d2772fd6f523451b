"""Descriptions of clips: every figure with its colour, shape, time and direction, in the order that is asked for.

An answer to a question trains a few tokens, and where most clips show one figure, none that looks for the figure that
is meant. In a description the word before tells which figure it is, so what belongs together is learned from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from train.toyworld.dataset import clip_name
from train.toyworld.score import span_text
from train.toyworld.script import Figure, Script, random_of
from train.toyworld.talks import shows_direction

REQUESTS = {
    "colour": "Describe the figures by their colours.",
    "shape": "Describe the figures by their shapes.",
    "time": "Describe the figures by their times.",
}

_SHARES = (0.25, 0.5, 0.25)  # to find a figure by its shape is learned last


def description(script: Script) -> dict[str, Any] | None:
    """The JSONL's object of a script; None where there is one figure only, which nothing is to be told from.

    By colour or shape: those of a kind one after the other as they come, the kinds in an order of chance, so that
    what is said of a figure follows from that word, and not from the figure before. By time: as they come.
    """
    if len(script.figures) < 2:
        return None
    rng = random_of(script.seed, 7)
    way = str(rng.choice(list(REQUESTS), p=_SHARES))
    listed = list(script.figures) if way == "time" else _mixed(rng, script.figures, way)
    content = [{"type": "video", "video": clip_name(script)}, {"type": "text", "text": REQUESTS[way]}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "; ".join(_said(rng, figure, way) for figure in listed)},
    ]
    return {"messages": messages, "kind": f"description by {way}", "duration": script.duration, "seed": script.seed}


def _mixed(rng: np.random.Generator, figures: Sequence[Figure], way: str) -> list[Figure]:
    def kind(figure: Figure) -> str:
        return str(getattr(figure.name, way))

    groups = [list(group) for _, group in groupby(sorted(figures, key=kind), kind)]
    return [figure for index in rng.permutation(len(groups)) for figure in groups[index]]


def _said(rng: np.random.Generator, figure: Figure, way: str) -> str:
    """Without commas: what is said of a figure follows from the very word before."""
    colour, shape, time = *figure.name, span_text(figure.span)
    going = [figure.direction] if shows_direction(figure) else []
    if way == "time":
        return " ".join([time, colour, shape, *going])
    rest = [time, *going] if rng.integers(2) else [*going, time]
    return " ".join([colour, shape, *rest] if way == "colour" else [shape, colour, *rest])
