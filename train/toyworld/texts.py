"""Conversations about transcripts alone: reading is learned from many short rows, which cost no frames.

Every line of a transcript is asked about, in an order of chance, so that a row has several answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ivcore.files import write_beside
from train.toyworld.compose import make_script
from train.toyworld.script import LONG_SECONDS, SHORT_SECONDS, Script, Split, pick, random_of, seeds
from train.toyworld.subtitles import transcript
from train.toyworld.words import FACTS


def write_texts(folder: str | Path, split: Split, first: int, count: int) -> Path:
    """Write a row for each of the seeds number first..first+count of a split; returns the JSONL.

    Transcripts are those of short and of long clips in turns.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    durations = SHORT_SECONDS, LONG_SECONDS
    rows = (
        conversation(make_script(seed, "said", durations[number % 2]))
        for number, seed in enumerate(seeds(split, first, count))
    )
    file = folder / f"{split}.jsonl"
    write_beside(file, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    return file


def conversation(script: Script) -> dict[str, Any]:
    """The JSONL's object of a script with lines: its transcript, then a question and an answer for each of them."""
    rng = random_of(script.seed, 4)
    messages: list[dict[str, str]] = []
    for index in rng.permutation(len(script.lines)):
        line = script.lines[index]
        question = pick(rng, FACTS[line.fact].questions).format(name=line.name)
        quoted = "" if messages else f"Subtitles:\n{transcript(script.lines)}\n\n"
        messages.append({"role": "user", "content": quoted + question})
        messages.append({"role": "assistant", "content": line.value})
    return {"messages": messages, "kind": "said", "duration": script.duration, "seed": script.seed}
