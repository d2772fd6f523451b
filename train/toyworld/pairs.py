"""Lists of pairs, to be repeated in another order or asked about: what stands behind a word is learned to be looked up.

A transcript's sentence has to be found by two words, and says one of few things: a small model guesses well enough to
learn that slowly. Here every answer follows from a word or two and the list.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ivcore.files import write_beside
from train.toyworld.script import Split, pick, random_of, seeds
from train.toyworld.words import COLOURS, FACTS, NAMES, SHAPES

TALKS = 0.5
"""The share of lists that are asked about, key by key."""

_REQUEST = "Repeat these pairs, in any order."
_KEYS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "name": tuple(map(str, NAMES)),
}


def write_pairs(folder: str | Path, split: Split, first: int, count: int) -> Path:
    """Write a row for each of the seeds number first..first+count of a split; returns the JSONL."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{split}.jsonl"
    write_beside(file, "".join(f"{json.dumps(row(seed))}\n" for seed in seeds(split, first, count)).encode())
    return file


def row(seed: int) -> dict[str, Any]:
    """The JSONL's object of a seed: two to eight pairs of a key and a value, none twice."""
    rng = random_of(seed, 11)
    keys, values = _KEYS[pick(rng, tuple(_KEYS))], FACTS[pick(rng, tuple(FACTS))].values
    count = int(rng.integers(2, min(len(keys), len(values)) + 1))
    drawn = zip(rng.permutation(len(keys))[:count], rng.permutation(len(values))[:count], strict=True)
    pairs = [(f"The {keys[key]}", values[value]) for key, value in drawn]
    listed = [f"{key}: {value}" for key, value in pairs]
    mixed = rng.permutation(count)
    turns = [(_REQUEST, "\n".join(listed[index] for index in mixed))]
    if rng.random() < TALKS:
        turns = [(f"{pairs[index][0]}?", pairs[index][1]) for index in mixed]
    messages: list[dict[str, str]] = []
    for asked, answer in turns:
        text = asked if messages else "\n".join([*listed, "", asked])
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "kind": "pairs", "seed": seed}
