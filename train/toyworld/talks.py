"""Conversations about one clip: its own question first, then others that its script answers.

A clip costs a hundred tokens or hundreds to look at; with several questions there is as much more to learn from them.
Where several figures come, they make the model look for the one that is meant.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ivcore.files import write_beside
from train.toyworld.compose import make_script
from train.toyworld.dataset import clip_name, kind_of, row
from train.toyworld.questions import Question, about, ask
from train.toyworld.script import Figure, Script, Split, random_of, seeds

MOST_OF_A_KIND = 2
"""Further questions of each kind. The answer to when has four times the tokens of others and would outweigh them."""

SHORTEST = 1.2
"""Seconds that a figure has to be there for a question about where it goes."""


def write_talks(
    folder: str | Path, split: Split, first: int, count: int, *, shares: Mapping[str, float], duration: float
) -> Path:
    """Write `folder`/talks.jsonl, a row for each clip that `write_dataset` has written there with these arguments."""
    folder = Path(folder)
    rows = (talk(make_script(seed, kind_of(seed, shares), duration)) for seed in seeds(split, first, count))
    file = folder / "talks.jsonl"
    write_beside(file, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    return file


def talk(script: Script) -> dict[str, Any]:
    """The JSONL's object of a script: its own question, as in `dataset.row`, and then others."""
    made = row(script, ask(script), clip_name(script))
    messages = made["messages"]
    for question in _others(script):
        messages.append({"role": "user", "content": question.text})
        messages.append({"role": "assistant", "content": question.answer})
    return {"messages": messages, "kind": script.kind, "duration": script.duration, "seed": script.seed}


def _others(script: Script) -> Iterator[Question]:
    """Questions about figures whose name, colour or shape is there once, in an order of chance."""
    rng = random_of(script.seed, 6)
    names = Counter(figure.name for figure in script.figures)
    colours = Counter(figure.name.colour for figure in script.figures)
    shapes = Counter(figure.name.shape for figure in script.figures)
    asked: list[tuple[str, Figure]] = []
    for figure in script.figures:
        alone = names[figure.name] == 1
        asked += [("when", figure)] if alone else []
        asked += [("direction", figure)] if alone and figure.span[1] - figure.span[0] >= SHORTEST else []
        asked += [("shape", figure)] if colours[figure.name.colour] == 1 else []
        asked += [("colour", figure)] if shapes[figure.name.shape] == 1 else []
    own, kinds = ask(script).text, Counter[str]()
    for index in rng.permutation(len(asked)):
        kind, figure = asked[int(index)]
        question = about(rng, kind, figure)
        if question.text != own and kinds[kind] < MOST_OF_A_KIND:
            kinds[kind] += 1
            yield question
