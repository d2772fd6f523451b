"""Words to be said again in their own order: what follows each of them is what followed it before.

To find that is what induction heads do (Olsson et al., arXiv 2209.11895), and a list's pair or a transcript's sentence
is found the same way. Here nearly every word can be known, in a list of pairs that is repeated every second one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ivcore.files import write_beside
from train.toyworld.script import Split, pick, random_of, seeds
from train.toyworld.turns import messages_of
from train.toyworld.words import COLOURS, FACTS, SHAPES

_REQUEST = "Repeat these words."
_WORDS = (*COLOURS, *SHAPES, *(value for fact in FACTS.values() for value in fact.values))
_BETWEEN = (" ", ", ", "\n")
FEWEST, MOST = 4, 19


def write_copies(folder: str | Path, split: Split, first: int, count: int) -> Path:
    """Write a row for each of the seeds number first..first+count of a split to `folder`/`split`.jsonl."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{json.dumps(copy(seed))}\n" for seed in seeds(split, first, count))
    write_beside(folder / f"{split}.jsonl", rows.encode())
    return folder / f"{split}.jsonl"


def copy(seed: int) -> dict[str, Any]:
    """A row of a seed: FEWEST to MOST words, none twice, and the same once more."""
    rng = random_of(seed, 13)
    drawn = rng.permutation(len(_WORDS))[: int(rng.integers(FEWEST, MOST + 1))]
    words = pick(rng, _BETWEEN).join(_WORDS[index] for index in drawn)
    messages = messages_of([(_REQUEST, words)], lambda asked: f"{words}\n\n{asked}")
    return {"messages": messages, "kind": "copies", "seed": seed}
