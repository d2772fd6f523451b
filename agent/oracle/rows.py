"""What the model is asked in fresh contexts: by `ground` when something is to be seen, by `verify` for a verdict.

And a film's question by itself, which a run is to answer.

- The words and the sampling are those of the tools, so the first question of a row is what the model will meet. Others
  follow it about the same frames, some of what is there and some of what is not: one by itself teaches so little that
  the likelier answer is soon given without a look.
- What is there too shortly to be in a frame, and what the words do not tell from something else, is not asked about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from agent import prompts
from agent.oracle.wording import READ_OFF, absent, description, false_told, fits, misread, moved, statement, told
from agent.spans import Span, around, overlap
from agent.tools import ground, verify
from agent.tools.transcribe import lines_in
from agent.workspace import Workspace, question_parts
from ivcore.video import Clip
from train.toyworld.questions import NOT_THERE, Question, about, answer_of
from train.toyworld.score import span_text
from train.toyworld.script import Line, Script, pick
from train.toyworld.talks import shows_direction
from train.toyworld.turns import messages_of
from train.toyworld.words import FACTS, NAMES


@dataclass(frozen=True)
class Drawn:
    """How much of a film is asked about.

    without: coarse windows beside those with the key; parts: share of the parts of these; matches: figures looked at as
    `ground` does a match; looks: at figures, beside the question's, about which there are claims; kinds: of what is
    looked for, and of claims about what is not there, each as frequent as it stands here.
    """

    without: int = 2
    parts: float = 0.3
    matches: int = 0
    looks: int = 5
    kinds: tuple[str, ...] = READ_OFF


OF_A_FILM = Drawn()
OF_A_LONGEST = Drawn(without=4, matches=6, looks=12, kinds=("colour", "colour", *READ_OFF))
"""More of what there is more of. That no figure has the shape whose colour is asked for is learned last."""

READS = 1
"""Lines of a film, beside the question's, about which there are claims."""

MOST_LOOKED_FOR, MOST_CLAIMS = 12, 8
"""Of a row."""

NAMED = 0.7
"""Share of the figures of whose colour or shape there is a claim."""

ASKED_FIRST = 0.8
"""Share of the claims whose question a fresh look answers first."""

MATCHES = 0.4, 0.6
"""IoU up to which a span is not that of a figure, and from which it is."""

BRIEF = 0.1
"""Seconds of a figure in a window from which on it is asked when it is there: a shorter span is none when rounded."""

FILMS = "films"
"""The folder of films, beside the rows."""

Row = dict[str, Any]
Turn = tuple[str, str]
T = TypeVar("T")


@dataclass(frozen=True)
class Judged:
    """A claim and its verdict; question, answer: what a fresh look is asked first, if anything, and says."""

    claim: str
    verdict: str
    question: str = ""
    answer: str = ""


def windows_of(
    script: Script, question: Question, workspace: Workspace, rng: np.random.Generator, drawn: Drawn = OF_A_FILM
) -> Iterator[Row]:
    """Rows of `ground`: coarse windows, those with the key and others, parts of them, and last looks at matches."""
    coarse = ground.windows((0.0, script.duration))
    there = [each for each in coarse if not absent(question) and overlap(each, script.keys[0].span)]
    others = [each for each in coarse if each not in there]
    for window in [*there, *(others[index] for index in rng.permutation(len(others))[: drawn.without])]:
        parts = [part for part in ground.parts_of(window) if rng.random() < drawn.parts]
        for span in (window, *parts):
            closely = span != window
            clip = workspace.look(span, fps=ground.FINE_FPS if closely else ground.FPS, most=ground.MOST_FRAMES)
            if turns := list(_looked_for(script, span, clip, closely, rng, drawn.kinds)):
                yield _row("window", workspace, clip, turns, origin=span[0])
    for figure in _drawn(rng, script.figures, drawn.matches):
        near = around(figure.span, workspace.duration)
        clip = workspace.look(near, fps=ground.CLOSEST_FPS, most=ground.MOST_CLOSEST)
        if turns := list(_looked_for(script, near, clip, False, rng, drawn.kinds)):
            yield _row("window", workspace, clip, turns, origin=near[0])


def claims_of(
    script: Script, question: Question, workspace: Workspace, rng: np.random.Generator, drawn: Drawn = OF_A_FILM
) -> Iterator[Row]:
    """Rows of `verify`: claims that hold, that do not, and about what is not to be seen or read there."""
    looked = [each.span for each in _drawn(rng, script.figures, drawn.looks)]
    read = [each.span for each in _drawn(rng, script.lines, READS)]
    if question.span is not None:
        (read if question.read else looked).append(question.span)
    for span in looked:
        other = moved(span, rng)
        said = other if rng.random() < 0.5 and other[1] <= workspace.duration else span
        near = around(said, workspace.duration)
        clip = workspace.look(near, fps=verify.FPS, most=verify.MOST_FRAMES)
        claims = [*_of_spans(script, said, near, clip, rng), *_of_figures(script, near, clip, rng, drawn.kinds)]
        yield from _claims(claims, near, clip, workspace)
    for span in read:
        near = around(span, workspace.duration)
        clip = workspace.look(near, fps=verify.FPS, most=verify.MOST_FRAMES)
        yield from _claims(_of_lines(script, near, rng), near, clip, workspace)


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


def _looked_for(
    script: Script, window: Span, clip: Clip, closely: bool, rng: np.random.Generator, asked_of: Sequence[str]
) -> Iterator[Turn]:
    """As much that is there, the key before others, as is not; a close look is asked for the span, too.

    Of what is there each has another name, and the same kinds of words say what is not: no answer must follow from
    another one, or from the words alone.
    """
    near = [each for each in script.figures if overlap(each.span, window)]
    seen = {each.name for each in near if any(map(each.visible, clip.timestamps))}
    names = sorted(_drawn(rng, sorted(seen), len(seen)), key=lambda name: name != script.keys[0].name)
    words = {kind: list(dict.fromkeys(description(kind, name) for name in NAMES)) for kind in READ_OFF}
    left = {
        kind: [what for what in each if not any(fits(what, one.name) for one in near)] for kind, each in words.items()
    }
    asked: list[str] = []
    for name in names:
        kinds = [kind for kind in asked_of if left[kind] and description(kind, name) not in asked]
        if kinds and len(asked) < MOST_LOOKED_FOR:
            kind = pick(rng, kinds)
            asked += [description(kind, name), left[kind].pop(int(rng.integers(len(left[kind]))))]
    for what in _drawn(rng, asked, MOST_LOOKED_FOR):
        matching = [each for each in near if fits(what, each.name)]
        yield prompts.is_visible(what), prompts.YES_NO[not matching]
        if closely and len(matching) == 1 and overlap(matching[0].span, window) > BRIEF:
            start, end = matching[0].span
            yield prompts.when(what), span_text((max(start - window[0], 0.0), min(end, window[1]) - window[0]))


def _claims(claims: Sequence[Judged], near: Span, clip: Clip, workspace: Workspace) -> Iterator[Row]:
    turns: list[Turn] = []
    for each in claims[:MOST_CLAIMS]:
        turns += [(each.question, each.answer)] if each.question else []
        turns.append((prompts.claim(each.claim), each.verdict))
    if turns:
        yield _row("claim", workspace, clip, turns, lines_in(workspace, near))


def _of_spans(script: Script, said: Span, near: Span, clip: Clip, rng: np.random.Generator) -> list[Judged]:
    """Of a figure that is there, whether it is so in just these seconds; nothing where that is a matter of taste."""
    names = Counter(each.name for each in script.figures if overlap(each.span, near))
    seen = [each for each in script.figures if any(map(each.visible, clip.timestamps)) and names[each.name] == 1]
    claims = []
    for figure in seen:
        both = max(said[1], figure.span[1]) - min(said[0], figure.span[0])
        shared = overlap(said, figure.span) / both
        if not MATCHES[0] < shared < MATCHES[1]:
            verdict = "support" if shared >= MATCHES[1] else "contradict"
            claims.append(Judged(statement("when", replace(figure, span=said)), verdict))
    return _drawn(rng, claims, 1)


def _of_figures(
    script: Script, near: Span, clip: Clip, rng: np.random.Generator, missing: Sequence[str]
) -> list[Judged]:
    """Of each figure its colour or its shape, then where it moves: the other way round, the first tells the second."""
    seen = [each for each in script.figures if overlap(each.span, near)]
    claims = []
    for figure in _drawn(rng, [each for each in seen if sum(map(each.visible, clip.timestamps)) > 1], MOST_CLAIMS):
        for kind in [*([pick(rng, READ_OFF[:2])] if rng.random() < NAMED else []), READ_OFF[2]]:
            alone = sum(fits(description(kind, figure.name), each.name) for each in seen) == 1
            if alone and (kind != "direction" or shows_direction(figure)):
                said = figure if rng.random() < 0.5 else misread(kind, figure, rng)
                verdict = "support" if said == figure else "contradict"
                asked = about(rng, kind, figure).text if rng.random() < ASKED_FIRST else ""
                claims.append(Judged(statement(kind, said), verdict, asked, answer_of(kind, figure)))
    gone = []
    for index in rng.permutation(len(NAMES)).tolist():
        kind, name = pick(rng, missing), NAMES[index]
        if not any(fits(description(kind, name), each.name) for each in seen):
            figure = replace(script.figures[0], name=name)
            asked = about(rng, kind, figure).text if rng.random() < ASKED_FIRST else ""
            gone.append(Judged(statement(kind, figure), "unclear", asked, NOT_THERE))
    return _among(rng, claims, gone)


def _of_lines(script: Script, near: Span, rng: np.random.Generator) -> list[Judged]:
    read = [each for each in script.lines if overlap(each.span, near)]
    unread = [each for each in script.lines if not any(_alike(each, other) for other in read)]
    claims, gone = [], []
    for line in read:
        said, verdict = (told(line), "support") if rng.random() < 0.5 else (false_told(line, rng), "contradict")
        claims.append(Judged(said, verdict, _asked_of(line, rng), line.value))
    for line in _drawn(rng, unread, len(unread)):
        gone.append(Judged(told(line), "unclear", _asked_of(line, rng), NOT_THERE))
    return _among(rng, claims, gone)


def _asked_of(line: Line, rng: np.random.Generator) -> str:
    if rng.random() > ASKED_FIRST:
        return ""
    return pick(rng, FACTS[line.fact].questions).format(name=line.name)


def _among(rng: np.random.Generator, claims: Sequence[Judged], unclear: Sequence[Judged]) -> list[Judged]:
    """The claims in their order, and half as many unclear ones, or one, at places of chance among them."""
    made = list(claims)
    for each in unclear[: max(1, (len(claims) + 1) // 2)]:
        made.insert(int(rng.integers(len(made) + 1)), each)
    return made


def _alike(one: Line, other: Line) -> bool:
    return (one.name, one.fact) == (other.name, other.fact)


def _drawn(rng: np.random.Generator, given: Sequence[T], most: int) -> list[T]:
    return [given[index] for index in rng.permutation(len(given))[:most].tolist()]


def _row(
    kind: str, workspace: Workspace, clip: Clip, turns: Iterable[Turn], quoted: Sequence[str] = (), origin: float = 0.0
) -> Row:
    video = {**_video(workspace), "times": list(clip.timestamps), "origin": origin}
    messages = messages_of(turns, lambda asked: [video, *question_parts(None, asked, quoted)])
    return {"messages": messages, "kind": kind}


def _video(workspace: Workspace) -> dict[str, Any]:
    return {"type": "video", "video": f"{FILMS}/{workspace.video.name}"}
