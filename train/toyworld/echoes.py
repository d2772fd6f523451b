"""Short lists of words and times to be said again: what follows each of them is what followed it before.

To find that is what induction heads do (Olsson et al., arXiv 2209.11895), and an agent's calls are full of it: the
span that a tool has named, the words of the question. From runs alone it is learned very slowly. Here every word can be
known, most are rare, and there are few of them in a list.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from train.toyworld.dataset import write_of_seeds
from train.toyworld.script import Split, pick, random_of
from train.toyworld.tokenizer import corpus
from train.toyworld.turns import messages_of

FEWEST, MOST = 2, 8
_REQUEST = "Repeat:"
_BETWEEN = (" ", ", ", "; ", "\n")
_LATEST = (10.0, 100.0, 600.0)
"""Seconds up to which times are drawn: of one, two or three digits before the point."""


def write_echoes(folder: str | Path, split: Split, first: int, count: int) -> Path:
    """Write a row for each of the seeds number first..first+count of a split to `folder`/`split`.jsonl."""
    return write_of_seeds(Path(folder) / f"{split}.jsonl", echo, split, first, count)


def echo(seed: int) -> dict[str, Any]:
    """A row of a seed: FEWEST to MOST things, and the same once more."""
    rng = random_of(seed, 16)
    listed = pick(rng, _BETWEEN).join(_thing(rng) for _ in range(int(rng.integers(FEWEST, MOST + 1))))
    messages = messages_of([(_REQUEST, listed)], lambda asked: f"{asked} {listed}")
    return {"messages": messages, "kind": "echoes", "seed": seed}


@cache
def lexicon() -> tuple[str, ...]:
    """The words of all that the tokenizer was trained on."""
    return tuple(sorted({word for text in corpus() for word in re.findall(r"[A-Za-z]{2,}", text)}))


def _thing(rng: np.random.Generator) -> str:
    """A word or two, a time or a span."""
    form = rng.random()
    if form < 0.6:
        return " ".join(pick(rng, lexicon()) for _ in range(1 if form < 0.4 else 2))
    return " to ".join(f"{rng.uniform(0, pick(rng, _LATEST)):.1f}" for _ in range(1 if form < 0.8 else 2))
