"""Lists of pairs, to be repeated in another order: from these it is learned to look up what stands behind a word.

A transcript's sentence has to be found by two words, and says one of few things: a small model guesses well enough to
learn that slowly. Here every second word follows from the one before and the list.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ivcore.files import write_beside
from train.toyworld.script import Split, pick, random_of, seeds
from train.toyworld.words import COLOURS, FACTS, NAMES, SHAPES

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
    pairs = [f"The {keys[key]}: {values[value]}" for key, value in drawn]
    mixed = [pairs[index] for index in rng.permutation(len(pairs))]
    messages = [
        {"role": "user", "content": "\n".join([*pairs, "", _REQUEST])},
        {"role": "assistant", "content": "\n".join(mixed)},
    ]
    return {"messages": messages, "kind": "pairs", "seed": seed}
