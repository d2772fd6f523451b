"""Conversations about one clip: its own question first, then others that its script answers.

A clip costs a hundred tokens or hundreds to look at; with several questions there is as much more to learn from them.
Where several figures come, they make the model look for the one that is meant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from train.toyworld.dataset import clip_name, row
from train.toyworld.questions import Question, about, ask
from train.toyworld.script import ROUNDING, Figure, Script, random_of

MOST_OF_A_KIND = 2
"""Further questions of each kind. The answer to when has four times the tokens of others and would outweigh them."""

WHOLE = 1.8
"""Seconds, at two frames a second, after which a figure has been there in both frames of a pair."""


def talk(script: Script) -> dict[str, Any]:
    """The JSONL's object of a script: its own question, as in `dataset.row`, and then others."""
    made = row(script, ask(script), clip_name(script))
    messages = made["messages"]
    for question in _others(script):
        messages.append({"role": "user", "content": question.text})
        messages.append({"role": "assistant", "content": question.answer})
    return {"messages": messages, "kind": script.kind, "duration": script.duration, "seed": script.seed}


def shows_direction(figure: Figure) -> bool:
    """Whether the figure is there long enough for one to see where it goes."""
    return figure.span[1] - figure.span[0] > WHOLE - ROUNDING


def unambiguous(script: Script) -> list[tuple[str, Figure]]:
    """What may be asked about figures whose name, colour or shape is there once: plain kinds, with the figure."""
    names = Counter(figure.name for figure in script.figures)
    colours = Counter(figure.name.colour for figure in script.figures)
    shapes = Counter(figure.name.shape for figure in script.figures)
    asked: list[tuple[str, Figure]] = []
    for figure in script.figures:
        alone = names[figure.name] == 1
        asked += [("when", figure)] if alone else []
        asked += [("direction", figure)] if alone and shows_direction(figure) else []
        asked += [("shape", figure)] if colours[figure.name.colour] == 1 else []
        asked += [("colour", figure)] if shapes[figure.name.shape] == 1 else []
    return asked


def _others(script: Script) -> Iterator[Question]:
    """Other questions than the script's own, in an order of chance."""
    rng, asked = random_of(script.seed, 6), unambiguous(script)
    own, kinds = ask(script).text, Counter[str]()
    for index in rng.permutation(len(asked)):
        kind, figure = asked[int(index)]
        question = about(rng, kind, figure)
        if question.text != own and kinds[kind] < MOST_OF_A_KIND:
            kinds[kind] += 1
            yield question
