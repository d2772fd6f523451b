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
from agent.spans import Span
from agent.tools import ground, verify
from agent.tools.transcribe import lines_in
from agent.workspace import Workspace, question_parts
from train.toyworld.questions import Question
from train.toyworld.score import span_text
from train.toyworld.script import Figure, Script

WINDOWS_WITHOUT = 2
"""Windows of a film in which what is looked for is not there, for one in which it is."""

FILMS = "films"
"""The folder of films, beside the rows."""

Row = dict[str, Any]


def windows_of(script: Script, question: Question, workspace: Workspace, rng: np.random.Generator) -> Iterator[Row]:
    """Rows of `ground`: windows with the key, coarse and fine, and without it."""
    if question.read:
        return
    key, gone = script.keys[0], absent(question)
    what = description("direction" if gone else asked_of(script, question), key.name)
    every = ground.windows((0.0, script.duration))
    inside = [] if gone else [each for each in every if each[0] < key.span[1] and key.span[0] < each[1]]
    outside = [each for each in every if each not in inside]
    for window in inside:
        yield _window(what, window, ground.COARSE_FPS, workspace, key)
    if not gone:
        near = key.span[0] - float(rng.uniform(0, 4)), key.span[1] + float(rng.uniform(0, 4))
        yield _window(what, _within(near, script), ground.FINE_FPS, workspace, key)
    for index in rng.permutation(len(outside))[:WINDOWS_WITHOUT]:
        yield _window(what, outside[index], ground.COARSE_FPS, workspace, None)
    figure = script.figures[int(rng.integers(len(script.figures)))]
    if figure.name != key.name:
        near = figure.span[0] - float(rng.uniform(0, 3)), figure.span[1] + float(rng.uniform(0, 3))
        if not (near[0] < key.span[1] and key.span[0] < near[1]):
            yield _window(what, _within(near, script), ground.FINE_FPS, workspace, None)


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
    if key is not None:
        answer = span_text((max(key.span[0], window[0]), min(key.span[1], window[1])))
    return _row("window", workspace, clip.timestamps, prompts.when(what), (), answer)


def _claim(claim: str, span: Span, verdict: str, workspace: Workspace) -> Row:
    near = max(span[0] - verify.MARGIN, 0.0), min(span[1] + verify.MARGIN, workspace.duration)
    clip = workspace.look(near, fps=verify.FPS, most=verify.MOST_FRAMES)
    return _row("claim", workspace, clip.timestamps, prompts.claim(claim), lines_in(workspace, near), verdict)


def _row(
    kind: str, workspace: Workspace, times: Sequence[float], question: str, quoted: Sequence[str], answer: str
) -> Row:
    content = [{**_video(workspace), "times": list(times)}, *question_parts(None, question, quoted)]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "kind": kind}


def _video(workspace: Workspace) -> dict[str, Any]:
    return {"type": "video", "video": f"{FILMS}/{workspace.video.name}"}


def _within(span: Span, script: Script) -> Span:
    return max(round(span[0], 1), 0.0), min(round(span[1], 1), script.duration)
