"""What the model is asked in fresh contexts: by `ground` when something is to be seen, by `verify` for a verdict.

And a film's question by itself, which a run is to answer.

- The words and the sampling are those of the tools, so the first question of a row is what the model will meet. Others
  follow it about the same frames, some of what is there and some of what is not: one by itself teaches so little that
  the likelier answer is soon given without a look.
- What is there too shortly to be in a frame, and what the words do not tell from something else, is not asked about.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, TypeVar

import numpy as np

from agent import prompts
from agent.oracle.wording import absent, description, false_statement, false_told, fits, statement, told
from agent.spans import Span, overlap
from agent.tools import ground, verify
from agent.tools.transcribe import lines_in
from agent.workspace import Workspace, question_parts
from ivcore.video import Clip
from train.toyworld.questions import Question
from train.toyworld.score import span_text
from train.toyworld.script import Line, Script
from train.toyworld.talks import shows_direction
from train.toyworld.turns import messages_of
from train.toyworld.words import NAMES

WINDOWS_WITHOUT = 2
"""Coarse windows of a film, beside those with the key."""

PARTS = 0.3
"""Share of the parts of these that are asked about."""

MOST_LOOKED_FOR, MOST_CLAIMS = 8, 8
"""Of a row."""

ASKED = ("colour", "shape", "direction")
"""Kinds of question, each of which names what it is about in another way."""

FILMS = "films"
"""The folder of films, beside the rows."""

Row = dict[str, Any]
Turn = tuple[str, str]
T = TypeVar("T")


def windows_of(script: Script, question: Question, workspace: Workspace, rng: np.random.Generator) -> Iterator[Row]:
    """Rows of `ground`: coarse windows, those with the key and others, and parts of them."""
    coarse = ground.windows((0.0, script.duration))
    there = [each for each in coarse if not absent(question) and overlap(each, script.keys[0].span)]
    others = [each for each in coarse if each not in there]
    for window in [*there, *(others[index] for index in rng.permutation(len(others))[:WINDOWS_WITHOUT])]:
        parts = [part for part in ground.parts_of(window) if rng.random() < PARTS]
        for span in (window, *parts):
            clip = workspace.look(span, fps=ground.FPS, most=int(ground.WINDOW * ground.FPS))
            if turns := list(_looked_for(script, span, clip, span != window, rng)):
                yield _row("window", workspace, clip, turns, origin=span[0])


def claims_of(script: Script, question: Question, workspace: Workspace, rng: np.random.Generator) -> Iterator[Row]:
    """Rows of `verify`: claims that hold, that do not, and about what is not to be seen or read there."""
    spans = [script.figures[int(rng.integers(len(script.figures)))].span]
    if question.span is not None:
        spans.append(question.span)
    if question.read:
        spans += [script.lines[int(rng.integers(len(script.lines)))].span]
    for span in spans:
        near = max(span[0] - verify.MARGIN, 0.0), min(span[1] + verify.MARGIN, workspace.duration)
        clip, quoted = workspace.look(near, fps=verify.FPS, most=verify.MOST_FRAMES), lines_in(workspace, near)
        asked = [*ASKED, "when"] if question.kind == "when" else list(ASKED)
        claims = _of_lines(script, near, rng) if question.read else _of_figures(script, near, clip, asked, rng)
        if turns := [(prompts.claim(claim), verdict) for claim, verdict in claims]:
            yield _row("claim", workspace, clip, turns, quoted)


def question_of(script: Script, question: Question, workspace: Workspace) -> Row:
    """A row of `environment.Acting`: `span` is where the answer is to be seen or read."""
    content = [_video(workspace), {"type": "text", "text": question.text}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": question.answer}]
    made: Row = {"messages": messages, "kind": f"run {question.kind}", "duration": script.duration}
    choices = question.choices
    if absent(question) and not choices:  # asked when it is there, which has no choices
        choices = (span_text(script.keys[0].span), question.answer)
    if choices:
        made |= {"choices": choices, "answer": choices.index(question.answer)}
    return made if question.span is None else {**made, "span": question.span}


def _looked_for(script: Script, window: Span, clip: Clip, closely: bool, rng: np.random.Generator) -> Iterator[Turn]:
    """As much that is there, the key before others, as is not; a close look is asked for the span, too.

    Of what is there each has another name: from one answer the next must not follow.
    """
    near = [each for each in script.figures if overlap(each.span, window)]
    seen = {each.name for each in near if any(map(each.visible, clip.timestamps))}
    names = sorted(_drawn(rng, sorted(seen), len(seen)), key=lambda name: name != script.keys[0].name)
    there = [description(ASKED[int(rng.integers(len(ASKED)))], name) for name in names[: MOST_LOOKED_FOR // 2]]
    words = dict.fromkeys(description(asked, name) for name in NAMES for asked in ASKED)
    gone = [what for what in words if not any(fits(what, each.name) for each in near)]
    for what in _drawn(rng, [*dict.fromkeys(there), *_drawn(rng, gone, len(there))], MOST_LOOKED_FOR):
        matching = [each for each in near if fits(what, each.name)]
        yield prompts.is_visible(what), prompts.YES_NO[not matching]
        if closely and len(matching) == 1:
            start, end = matching[0].span
            yield prompts.when(what), span_text((max(start - window[0], 0.0), min(end, window[1]) - window[0]))


def _of_figures(script: Script, near: Span, clip: Clip, asked: Sequence[str], rng: np.random.Generator) -> list[Turn]:
    seen = [each for each in script.figures if overlap(each.span, near)]
    right, wrong = [], []
    for figure in (each for each in seen if sum(map(each.visible, clip.timestamps)) > 1):
        for kind in asked:
            alone = sum(fits(description(kind, figure.name), each.name) for each in seen) == 1
            if alone and (kind != "direction" or shows_direction(figure)):
                right.append((statement(kind, figure), "support"))
                wrong.append((false_statement(kind, figure, rng), "contradict"))
    unclear = []
    for index in rng.permutation(len(NAMES))[:MOST_CLAIMS].tolist():
        kind, name = asked[int(rng.integers(len(asked)))], NAMES[index]
        if not any(fits(description(kind, name), each.name) for each in seen):
            unclear.append((statement(kind, replace(script.figures[0], name=name)), "unclear"))
    return _mixed(rng, *(_drawn(rng, each, 3) for each in (right, wrong, unclear)))


def _of_lines(script: Script, near: Span, rng: np.random.Generator) -> list[Turn]:
    read = [each for each in script.lines if overlap(each.span, near)]
    unread = [each for each in script.lines if not any(_alike(each, other) for other in read)]
    right = [(told(each), "support") for each in read]
    wrong = [(false_told(each, rng), "contradict") for each in read]
    unclear = [(told(each), "unclear") for each in unread]
    return _mixed(rng, *(_drawn(rng, each, 3) for each in (right, wrong, unclear)))


def _alike(one: Line, other: Line) -> bool:
    return (one.name, one.fact) == (other.name, other.fact)


def _drawn(rng: np.random.Generator, given: Sequence[T], most: int) -> list[T]:
    return [given[index] for index in rng.permutation(len(given))[:most].tolist()]


def _mixed(rng: np.random.Generator, *groups: Sequence[T]) -> list[T]:
    """MOST_CLAIMS or fewer, as many of each group as there are, in an order of chance."""
    taken = [each for one in zip_longest(*groups) for each in one if each is not None]
    return _drawn(rng, taken[:MOST_CLAIMS], MOST_CLAIMS)


def _row(
    kind: str, workspace: Workspace, clip: Clip, turns: Iterable[Turn], quoted: Sequence[str] = (), origin: float = 0.0
) -> Row:
    video = {**_video(workspace), "times": list(clip.timestamps), "origin": origin}
    messages = messages_of(turns, lambda asked: [video, *question_parts(None, asked, quoted)])
    return {"messages": messages, "kind": kind}


def _video(workspace: Workspace) -> dict[str, Any]:
    return {"type": "video", "video": f"{FILMS}/{workspace.video.name}"}
