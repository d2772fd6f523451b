"""Lists of pairs, to be repeated in another order or asked about: what stands behind a word is learned to be looked up.

A transcript's sentence has to be found by two words, and says one of few things: a small model guesses well enough to
learn that slowly. Here every answer follows from a word or two and the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.toyworld.dataset import write_of_seeds
from train.toyworld.script import Split, pick, random_of
from train.toyworld.turns import messages_of
from train.toyworld.words import COLOURS, FACTS, NAMES, SHAPES

_REQUEST = "Repeat these pairs, in any order."
_KEYS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "name": tuple(map(str, NAMES)),
}


def write_pairs(folder: str | Path, split: Split, first: int, count: int) -> Path:
    """Write two rows for each of the seeds number first..first+count of a split.

    Repetitions are in `folder`/`split`.jsonl, which is returned, questions beside it in talks.jsonl.
    """
    write_of_seeds(Path(folder) / "talks.jsonl", talk, split, first, count)
    return write_of_seeds(Path(folder) / f"{split}.jsonl", repetition, split, first, count)


def repetition(seed: int) -> dict[str, Any]:
    """A row of a seed: two to eight pairs of a key and a value, none twice, to be said again."""
    pairs, mixed = _drawn(seed)
    return _row(seed, pairs, [(_REQUEST, "\n".join(f"{key}: {value}" for key, value in mixed))])


def talk(seed: int) -> dict[str, Any]:
    """As `repetition`, but every key is asked about."""
    pairs, mixed = _drawn(seed)
    return _row(seed, pairs, [(f"{key}?", value) for key, value in mixed])


def _drawn(seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pairs, and the same in another order."""
    rng = random_of(seed, 11)
    keys, values = _KEYS[pick(rng, tuple(_KEYS))], FACTS[pick(rng, tuple(FACTS))].values
    count = int(rng.integers(2, min(len(keys), len(values)) + 1))
    drawn = zip(rng.permutation(len(keys))[:count], rng.permutation(len(values))[:count], strict=True)
    pairs = [(f"The {keys[key]}", values[value]) for key, value in drawn]
    return pairs, [pairs[index] for index in rng.permutation(count)]


def _row(seed: int, pairs: Sequence[tuple[str, str]], turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    listed = "\n".join(f"{key}: {value}" for key, value in pairs)
    messages = messages_of(turns, lambda asked: f"{listed}\n\n{asked}")
    return {"messages": messages, "kind": "pairs", "seed": seed}
