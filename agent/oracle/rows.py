"""What the model is asked in fresh contexts: by `ground` when something is to be seen, by `verify` for a verdict.

And a film's question by itself, which a run is to answer.

The words and the sampling are those of the tools, so a row is what the model will meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from agent import prompts
from agent.oracle.wording import absent, asked_of, description, false_statement, false_told, statement, told
from agent.spans import Span, overlap
from agent.tools import ground, verify
from agent.tools.transcribe import lines_in
from agent.workspace import Workspace, question_parts
from train.toyworld.questions import Question
from train.toyworld.score import span_text
from train.toyworld.script import Figure, Script

WINDOWS_WITHOUT = 2
"""Windows of a film in which what is looked for is not there, for one in which it is."""

PARTS_WITHOUT = 0.3
"""Share of the parts of a window with the key in which it is not, that are asked about."""

SEEN = 0.5
"""Seconds of the key that a window has to have; with fewer nothing is asked."""

FILMS = "films"
"""The folder of films, beside the rows."""

Row = dict[str, Any]


def windows_of(script: Script, question: Question, workspace: Workspace, rng: np.random.Generator) -> Iterator[Row]:
    """Rows of `ground`: windows with the key, coarse ones and parts of them, and without it."""
    if question.read:
        return
    key, gone = script.keys[0], absent(question)
    what = description("direction" if gone else asked_of(script, question), key.name)
    coarse = ground.windows((0.0, script.duration))
    for window in (each for each in coarse if not gone and overlap(each, key.span) >= SEEN):
        yield _window(what, window, ground.FPS, workspace, key)
        for part in ground.parts_of(window):
            if overlap(part, key.span) >= SEEN or (rng.random() < PARTS_WITHOUT and not overlap(part, key.span)):
                yield _window(what, part, ground.FINE_FPS, workspace, key)
    outside = [each for each in coarse if gone or not overlap(each, key.span)]
    for index in rng.permutation(len(outside))[:WINDOWS_WITHOUT].tolist():
        yield _window(what, outside[index], ground.FPS, workspace, None)
        parts = ground.parts_of(outside[index])
        yield _window(what, parts[int(rng.integers(len(parts)))], ground.FINE_FPS, workspace, None)


def claims_of(script: Script, question: Question, workspace: Workspace, rng: np.random.Generator) -> Iterator[Row]:
    """Rows of `verify`: a claim that holds, one that does not, and one about what is not to be seen there."""
    others = [each for each in script.figures if each.name != script.keys[0].name]
    elsewhere = others[int(rng.integers(len(others)))].span
    if question.read:
        for line in (each for each in script.lines if each.span == question.span):
            yield _claim(told(line), line.span, "support", workspace)
            yield _claim(false_told(line, rng), line.span, "contradict", workspace)
            if not any(each.name == line.name for each in script.lines if each is not line):
                yield _claim(told(line), elsewhere, "unclear", workspace)
        return
    key, asked = script.keys[0], "direction" if absent(question) else asked_of(script, question)
    if not absent(question):
        yield _claim(statement(asked, key), key.span, "support", workspace)
        yield _claim(false_statement(asked, key, rng), key.span, "contradict", workspace)
    yield _claim(statement(asked, key), elsewhere, "unclear", workspace)


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


def _window(what: str, window: Span, fps: float, workspace: Workspace, key: Figure | None) -> Row:
    clip = workspace.look(window, fps=fps, most=int(ground.WINDOW * ground.FINE_FPS))
    answer = prompts.NOT_THERE
    if key is not None and overlap(key.span, window):
        answer = span_text((max(key.span[0] - window[0], 0.0), min(key.span[1], window[1]) - window[0]))
    return _row("window", workspace, clip.timestamps, prompts.when(what), (), answer, window[0])


def _claim(claim: str, span: Span, verdict: str, workspace: Workspace) -> Row:
    near = max(span[0] - verify.MARGIN, 0.0), min(span[1] + verify.MARGIN, workspace.duration)
    clip = workspace.look(near, fps=verify.FPS, most=verify.MOST_FRAMES)
    return _row("claim", workspace, clip.timestamps, prompts.claim(claim), lines_in(workspace, near), verdict)


def _row(
    kind: str, workspace: Workspace, times: Sequence[float], question: str, quoted: Sequence[str], answer: str,
    origin: float = 0.0,
) -> Row:  # fmt: skip
    video = {**_video(workspace), "times": list(times), "origin": origin}
    content = [video, *question_parts(None, question, quoted)]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "kind": kind}


def _video(workspace: Workspace) -> dict[str, Any]:
    return {"type": "video", "video": f"{FILMS}/{workspace.video.name}"}
