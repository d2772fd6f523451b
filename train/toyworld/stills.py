"""Pictures of several figures at once, described in a few words or asked about: one word tells which figure is meant.

A picture costs sixteen tokens, and every second word of its description follows from the word before and one figure.
In clips, where a figure has a few of many more tokens, a small model does not learn to find it by its shape. What has
learned to describe answers questions soon, but not without being asked any.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from ivcore.files import write_beside
from train.toyworld.compose import still
from train.toyworld.descriptions import REQUESTS
from train.toyworld.questions import about
from train.toyworld.render import frames
from train.toyworld.script import SHORT_SECONDS, Script, Split, random_of, seeds

TALKS = 0.5
"""The share of pictures that are asked about, figure by figure."""

BY_SHAPE = 0.7
"""The share in which the shape tells the figure: to find one by that is learned last."""

PICTURES = "pictures"
"""The folder beside the rows."""


def write_stills(folder: str | Path, split: Split, first: int, count: int) -> Path:
    """Write a picture and a row for each of the seeds number first..first+count of a split; returns the JSONL."""
    folder = Path(folder)
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    file = folder / f"{split}.jsonl"
    rows = (_write(folder, seed) for seed in seeds(split, first, count))
    write_beside(file, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    return file


def _write(folder: Path, seed: int) -> dict[str, Any]:
    script, path = still(seed), f"{PICTURES}/{seed:07}.png"
    if not (folder / path).exists():
        rng = random_of(seed, 9)
        (picture,) = frames(script, rng.uniform(0, SHORT_SECONDS, 1))
        Image.fromarray(picture).save(folder / path)
    return row(script, path)


def row(script: Script, path: str) -> dict[str, Any]:
    """The JSONL's object of a script whose picture is at `path`: its figures in an order of chance, each once."""
    rng = random_of(script.seed, 10)
    listed = [script.figures[index] for index in rng.permutation(len(script.figures))]
    if rng.random() < TALKS:
        questions = [about(rng, "colour" if rng.random() < BY_SHAPE else "shape", figure) for figure in listed]
        kind, turns = "still", [(question.text, question.answer) for question in questions]
    else:
        way = "shape" if rng.random() < BY_SHAPE else "colour"
        said = "; ".join(" ".join(reversed(each.name) if way == "shape" else each.name) for each in listed)
        kind, turns = f"still by {way}", [(REQUESTS[way], said)]
    messages: list[dict[str, Any]] = []
    for asked, answer in turns:
        text = {"type": "text", "text": asked}
        content = [text] if messages else [{"type": "image", "image": path}, text]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "kind": kind, "seed": script.seed}
