"""Conversations about transcripts alone: reading is learned from many short rows, which cost no frames.

A clip's few lines can be guessed from well enough for a small model never to learn to look the right one up. Here there
are up to eight, mostly of one fact, and all of them are asked about. Or they are to be repeated in another order: there
the end of a sentence follows from its beginning and the lines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from train.toyworld.dataset import write_of_seeds
from train.toyworld.script import Line, Split, pick, random_of
from train.toyworld.subtitles import transcript
from train.toyworld.turns import messages_of
from train.toyworld.words import FACTS, NAMES

MOST_LINES = 8
ONE_FACT = 0.75
"""The share of transcripts whose lines are all of one fact."""

REPEATED = 0.5
"""The share of transcripts that are to be repeated."""

_REPEAT = "Repeat what is said, in any order."


def write_texts(folder: str | Path, split: Split, first: int, count: int) -> Path:
    """Write a row for each of the seeds number first..first+count of a split; returns the JSONL."""
    return write_of_seeds(Path(folder) / f"{split}.jsonl", conversation, split, first, count)


def conversation(seed: int) -> dict[str, Any]:
    """The JSONL's object of a seed: a transcript, then a question and an answer for each of its lines, or all again."""
    rng = random_of(seed, 4)
    lines = _lines(rng, int(rng.integers(2, MOST_LINES + 1)))
    mixed = [lines[index] for index in rng.permutation(len(lines))]
    turns = [(pick(rng, FACTS[line.fact].questions).format(name=line.name), line.value) for line in mixed]
    if rng.random() < REPEATED:
        turns = [(_REPEAT, " ".join(line.text for line in mixed))]
    messages = messages_of(turns, lambda asked: f"Subtitles:\n{transcript(lines)}\n\n{asked}")
    return {"messages": messages, "kind": "said", "seed": seed}


def _lines(rng: np.random.Generator, count: int) -> list[Line]:
    """Lines about as many figures, each value said once of a fact."""
    topics = [pick(rng, tuple(FACTS))] * count
    if rng.random() >= ONE_FACT:
        topics = [pick(rng, tuple(FACTS)) for _ in range(count)]
    values = {fact: rng.permutation(FACTS[fact].values) for fact in FACTS}
    names = rng.permutation(len(NAMES))[:count]
    lines, end = [], 0.0
    for number, fact in enumerate(topics):
        start = end + float(rng.uniform(0.0, 2.0))
        end = start + float(rng.uniform(1.2, 3.0))
        name, value = NAMES[names[number]], str(values[fact][number])
        text = FACTS[fact].statement.format(name=name, value=value)
        lines.append(Line((round(start, 1), round(end, 1)), name, fact, value, text))
    return lines
