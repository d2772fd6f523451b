"""Questions about a script, and the answers that follow from it alone.

- The words of a question never tell its answer: every answer of its class is equally frequent under every wording.
- A figure is named by what tells it apart without giving the answer away: its shape where the colour is asked, its
  colour where the shape is, both elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from train.toyworld.compose import KINDS, MAX_COUNT, what_is_asked
from train.toyworld.score import span_text
from train.toyworld.script import SHORT_SECONDS, TICKS, Figure, Script, Span, pick, random_of
from train.toyworld.words import COLOURS, DIRECTIONS, FACTS, SHAPES

NOT_THERE = "not in the video"  # the answer to questions of the kind "absent"

_WORDINGS: dict[str, tuple[str, ...]] = {
    "colour": (
        "What colour is the {shape}?",
        "Which colour does the {shape} have?",
        "Name the colour of the {shape}.",
    ),
    "shape": (
        "What shape is the {colour} figure?",
        "Which shape does the {colour} figure have?",
        "Name the shape of the {colour} figure.",
    ),
    "direction": (
        "Which way does the {colour} {shape} move?",
        "In which direction does the {colour} {shape} go?",
        "Where is the {colour} {shape} heading?",
    ),
    "when": (
        "When is the {colour} {shape} visible?",
        "From when to when can the {colour} {shape} be seen?",
        "At what time is the {colour} {shape} there?",
    ),
    "count": (
        "How many figures are there at once?",
        "What is the largest number of figures seen together?",
        "Count the figures that are visible at the same time.",
    ),
}
# Of each pair the first asks for the earlier one.
_ORDER = (
    ("Which comes first, the {a} or the {b}?", "Which comes later, the {a} or the {b}?"),
    ("Which appears earlier, the {a} or the {b}?", "Which appears last, the {a} or the {b}?"),
)
_BEFORE_AFTER = (
    ("What comes just before the {key}, the {a} or the {b}?", "What comes just after the {key}, the {a} or the {b}?"),
    (
        "What is seen just before the {key}, the {a} or the {b}?",
        "What is seen just after the {key}, the {a} or the {b}?",
    ),
)
_RARE = {
    "colour": (
        "For a moment a {shape} appears. What colour is it?",
        "Once there is a {shape}. Which colour does it have?",
    ),
    "shape": (
        "For a moment a {colour} figure appears. What shape is it?",
        "Once there is a {colour} figure. Which shape does it have?",
    ),
    "direction": (
        "For a moment a {colour} {shape} appears. Which way does it move?",
        "Once there is a {colour} {shape}. In which direction does it go?",
    ),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "count": tuple(str(number) for number in range(1, MAX_COUNT + 1)),
}
# What is asked about a single key.
_PLAIN = ("colour", "shape", "direction", "when")


@dataclass(frozen=True)
class Question:
    """A question and its one right answer.

    choices: what the answer may be; empty where a span is asked for.
    span: where in the clip the answer is to be seen or read, in seconds; for the kind "when" it is the answer itself.
        None where there is no answer.
    read: whether the answer is to be read in the subtitles, not seen.
    asked: the plain kind of what is asked about a single figure; "" for any other question.
    """

    kind: str
    text: str
    answer: str
    choices: tuple[str, ...]
    span: Span | None
    read: bool = False
    asked: str = ""


def kinds_of(script: Script) -> tuple[str, ...]:
    """The kinds of question that a script answers: its own first, then what else may be asked about a single key."""
    if script.kind not in _PLAIN:
        return (script.kind,)
    # In a long clip only colour and shape together are sure to tell the key from fillers.
    others = set(_PLAIN if script.duration == SHORT_SECONDS else ("direction", "when"))
    if script.kind == "when":
        others -= {"direction"}  # it may be there too shortly to show one
    return (script.kind, *(kind for kind in _PLAIN if kind in others - {script.kind}))


def ask(script: Script, kind: str | None = None) -> Question:
    """The question of a kind about a script; the same for the same arguments.

    kind: one of `kinds_of(script)`; None is the script's own.
    """
    kind = script.kind if kind is None else kind
    if kind not in kinds_of(script):
        raise ValueError(f"a script made for {script.kind!r} answers {kinds_of(script)}, not {kind!r}")
    rng = random_of(script.seed, 1, KINDS.index(kind), round(script.duration * TICKS))
    if kind in _PLAIN:
        return _about(rng, kind, kind, script.keys[0], _WORDINGS[kind])
    return _OTHERS[kind](rng, script)


def about(rng: np.random.Generator, kind: str, figure: Figure) -> Question:
    """A question of a plain kind about any figure; whether its words tell it apart is for the caller to know."""
    return _about(rng, kind, kind, figure, _WORDINGS[kind])


def answer_of(asked: str, figure: Figure) -> str:
    """What a question of a plain kind about a figure is answered with."""
    return {**figure.name._asdict(), "direction": figure.direction, "when": span_text(figure.span)}[asked]


def in_vain(question: Question) -> Question:
    """The same, of a figure that is not there."""
    choices = (*question.choices, NOT_THERE) if question.choices else ()
    return replace(question, kind="absent", answer=NOT_THERE, choices=choices, span=None)


def _about(rng: np.random.Generator, kind: str, asked: str, key: Figure, wordings: Sequence[str]) -> Question:
    """What is asked about one figure: its colour, shape or direction, or when it is there."""
    text = pick(rng, wordings).format(**key.name._asdict())
    return Question(kind, text, answer_of(asked, key), _CHOICES.get(asked, ()), key.span, asked=asked)


def _rare(rng: np.random.Generator, script: Script) -> Question:
    asked = what_is_asked(script.seed, "rare")
    return _about(rng, "rare", asked, script.keys[0], _RARE[asked])


def _count(rng: np.random.Generator, script: Script) -> Question:
    group = max((script.visible_at(figure.span[0]) for figure in script.figures), key=len)
    return Question("count", pick(rng, _WORDINGS["count"]), str(len(group)), _CHOICES["count"], group[0].span)


def _order(rng: np.random.Generator, script: Script) -> Question:
    early, late = (script.keys[index] for index in np.sort(rng.permutation(len(script.keys))[:2]))
    words, asks_late = pick(rng, _ORDER), int(rng.integers(2))
    return _either(rng, "order", words[asks_late], (early, late)[asks_late], (late, early)[asks_late])


def _before_after(rng: np.random.Generator, script: Script) -> Question:
    place, step = pick(rng, ((0, 1), (1, 1), (1, -1), (2, -1)))
    key, right = script.keys[place], script.keys[place + step]
    (wrong,) = (figure for figure in script.keys if figure not in (key, right))
    return _either(rng, "before_after", pick(rng, _BEFORE_AFTER)[step == 1], right, wrong, key)


def _either(
    rng: np.random.Generator, kind: str, words: str, right: Figure, wrong: Figure, key: Figure | None = None
) -> Question:
    """A choice between two figures, named in an order that says nothing; `key` is a third one that the words name."""
    shown = (right, wrong) if rng.integers(2) else (wrong, right)
    choices = tuple(str(figure.name) for figure in shown)
    text = words.format(a=choices[0], b=choices[1], key=key and key.name)
    spans = [figure.span for figure in (right, key or wrong)]
    span = min(start for start, _ in spans), max(end for _, end in spans)
    return Question(kind, text, str(right.name), choices, span)


def _said(rng: np.random.Generator, script: Script) -> Question:
    names = {figure.name for figure in script.keys}
    line = pick(rng, [line for line in script.lines if line.name in names])
    fact = FACTS[line.fact]
    text = pick(rng, fact.questions).format(name=line.name)
    return Question("said", text, line.value, fact.values, line.span, read=True)


def _absent(rng: np.random.Generator, script: Script) -> Question:
    """A question like any other, about a figure that neither the picture nor a line has."""
    name = script.keys[0].name
    seen = [(_WORDINGS[kind], _CHOICES.get(kind, ()), kind) for kind in _PLAIN]
    wordings, choices, asked = pick(rng, [*seen, *((fact.questions, fact.values, "") for fact in FACTS.values())])
    text = pick(rng, wordings).format(name=name, **name._asdict())
    return Question("absent", text, NOT_THERE, (*choices, NOT_THERE) if choices else (), None, not asked, asked)


_OTHERS: dict[str, Callable[[np.random.Generator, Script], Question]] = {
    "count": _count,
    "order": _order,
    "before_after": _before_after,
    "said": _said,
    "rare": _rare,
    "absent": _absent,
}
