"""What a question of the toy world is about, in the words of tools, claims and thoughts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from train.toyworld.questions import NOT_THERE, Question
from train.toyworld.score import span_text
from train.toyworld.script import Figure, Line, Span, pick
from train.toyworld.words import COLOURS, DIRECTIONS, FACTS, SHAPES, Name

READ_OFF = ("colour", "shape", "direction")
"""Kinds of question that a look answers, each of which names what it is about in another way; when something is there,
`ground` says."""


def description(asked: str, name: Name) -> str:
    """What to look for: the answer is not in it."""
    if asked == "colour":
        return name.shape
    return f"{name.colour} figure" if asked == "shape" else str(name)


def fits(description: str, name: Name) -> bool:
    """Whether what is looked for may be this: a shape, a colour, or both."""
    return all(word in (name.colour, name.shape, "figure") for word in description.split())


def statement(asked: str, figure: Figure) -> str:
    """What is so about a figure, as a claim."""
    name = figure.name
    said = {
        "colour": f"The {name.shape} is {name.colour}.",
        "shape": f"The {name.colour} figure is a {name.shape}.",
        "direction": f"The {name} moves {figure.direction}.",
        "when": f"The {name} is visible from {span_text(figure.span)}.",
    }
    return said[asked]


def told(line: Line) -> str:
    """What a line says, as a claim."""
    return f"The {line.name} {FACTS[line.fact].statement.partition('} ')[2].format(value=line.value)}"


def misread(asked: str, figure: Figure, rng: np.random.Generator) -> Figure:
    """The figure with another colour, shape or direction."""
    name = figure.name
    if asked == "colour":
        return replace(figure, name=name._replace(colour=pick(rng, [each for each in COLOURS if each != name.colour])))
    if asked == "shape":
        return replace(figure, name=name._replace(shape=pick(rng, [each for each in SHAPES if each != name.shape])))
    return replace(figure, direction=pick(rng, [each for each in DIRECTIONS if each != figure.direction]))


def false_told(line: Line, rng: np.random.Generator) -> str:
    """What a line does not say."""
    value = pick(rng, [each for each in FACTS[line.fact].values if each != line.value])
    return told(Line(line.span, line.name, line.fact, value, line.text))


def moved(span: Span, rng: np.random.Generator) -> Span:
    """A span whose overlap with this one is less than half."""
    length = span[1] - span[0]
    shift = float(rng.uniform(0.7, 1.5)) * length * (1 if span[0] < 2 * length or rng.random() < 0.5 else -1)
    return round(max(span[0] + shift, 0.0), 1), round(max(span[1] + shift, 0.2), 1)


def absent(question: Question) -> bool:
    """Whether the video does not tell."""
    return question.answer == NOT_THERE
