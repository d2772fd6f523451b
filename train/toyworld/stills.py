"""Pictures of several figures at once, described in a few words or asked about: one word tells which figure is meant.

A picture costs sixteen tokens, and every second word of its description follows from the word before and one figure.
In clips, where a figure has a few of many more tokens, iv3-tiny did not learn to find it by its shape. What has learned
to describe answers questions soon, but not without being asked any (docs/training.md).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ivcore.files import write_beside
from train.toyworld.compose import still
from train.toyworld.descriptions import REQUESTS
from train.toyworld.questions import about
from train.toyworld.render import frames
from train.toyworld.script import SHORT_SECONDS, Figure, Script, Split, random_of, seeds
from train.toyworld.turns import messages_of

BY_SHAPE = 0.7
"""The share in which the shape tells the figure: to find one by that is learned last."""

PICTURES = "pictures"
"""The folder beside the rows."""


def write_stills(folder: str | Path, split: Split, first: int, count: int) -> Path:
    """Write a picture for each of the seeds number first..first+count of a split, and two rows about each.

    Descriptions are in `folder`/`split`.jsonl, which is returned, questions beside it in talks.jsonl.
    """
    folder = Path(folder)
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    drawn = [(still(seed), f"{PICTURES}/{seed:07}.png") for seed in seeds(split, first, count)]
    for script, path in drawn:
        if not (folder / path).exists():
            (picture,) = frames(script, random_of(script.seed, 9).uniform(0, SHORT_SECONDS, 1))
            Image.fromarray(picture).save(folder / path)
    for name, make in (("talks", talk), (split, description)):
        rows = "".join(f"{json.dumps(make(script, path))}\n" for script, path in drawn)
        write_beside(folder / f"{name}.jsonl", rows.encode())
    return folder / f"{split}.jsonl"


def description(script: Script, path: str) -> dict[str, Any]:
    """A row about a script whose picture is at `path`: its figures in an order of chance, each once."""
    rng = random_of(script.seed, 10)
    way = "shape" if rng.random() < BY_SHAPE else "colour"
    named = [figure.name for figure in _mixed(rng, script)]
    said = "; ".join(" ".join(reversed(name) if way == "shape" else name) for name in named)
    return _row(script, f"still by {way}", path, [(REQUESTS[way], said)])


def talk(script: Script, path: str) -> dict[str, Any]:
    """As `description`, but every figure is asked about, by its shape or its colour."""
    rng = random_of(script.seed, 12)
    listed = _mixed(rng, script)
    questions = [about(rng, "colour" if rng.random() < BY_SHAPE else "shape", figure) for figure in listed]
    return _row(script, "still", path, [(question.text, question.answer) for question in questions])


def _mixed(rng: np.random.Generator, script: Script) -> list[Figure]:
    return [script.figures[index] for index in rng.permutation(len(script.figures))]


def _row(script: Script, kind: str, path: str, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    messages = messages_of(turns, lambda asked: [{"type": "image", "image": path}, {"type": "text", "text": asked}])
    return {"messages": messages, "kind": kind, "seed": script.seed}
