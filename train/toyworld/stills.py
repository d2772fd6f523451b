"""Pictures of several figures at once, described in a few words: what is said first tells which figure is meant.

A picture costs sixteen tokens, and every second word of its description follows from the word before and one figure.
In clips, where a figure has a few of many more tokens, a small model does not learn to find it by its shape.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from ivcore.files import write_beside
from train.toyworld.compose import still
from train.toyworld.descriptions import REQUESTS
from train.toyworld.render import frames
from train.toyworld.script import SHORT_SECONDS, Script, Split, random_of, seeds

BY_SHAPE = 0.7
"""The share of descriptions in which the shape comes first: to find a figure by that is learned last."""

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
    """The JSONL's object of a script whose picture is at `path`: its figures in an order of chance."""
    rng = random_of(script.seed, 10)
    way = "shape" if rng.random() < BY_SHAPE else "colour"
    listed = [script.figures[index] for index in rng.permutation(len(script.figures))]
    said = "; ".join(" ".join(reversed(each.name) if way == "shape" else each.name) for each in listed)
    content = [{"type": "image", "image": path}, {"type": "text", "text": REQUESTS[way]}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": said}]
    return {"messages": messages, "kind": f"still by {way}", "seed": script.seed}
