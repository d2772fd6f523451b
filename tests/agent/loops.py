"""Loops about a short film, with a model whose messages are written down: real weights read, real tools look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent.calls import written
from agent.entries import Entry, Feedback, Result
from agent.loop import MESSAGE_TOKENS, Loop
from agent.tools.verify import Check, Verify
from agent.workspace import Workspace
from ivcore.tokenizer import Tokenizer
from tests.agent.commands import MICRO, loaded
from tests.agent.scripted import Scripted

MakeLoop = Callable[..., Loop]
TOOLS = "look", "transcript", "verify"
"""Of a loop that is not told otherwise: what all of them take to describe is long to read."""

LOOK = written("look", {"start": 2.0, "end": 4.0})


def maker(clip: Path, monkeypatch: pytest.MonkeyPatch) -> MakeLoop:
    """Function (messages of the model, verdicts of fresh looks or None for real ones, options) -> a loop."""
    tokenizer = Tokenizer.from_dir(MICRO)
    monkeypatch.setattr("agent.belief.ANSWER_TOKENS", 4)  # what random weights foresee is noise, and takes long

    def loop(*messages: str, verdicts: Sequence[str] | None = None, video: Path = clip, **options: Any) -> Loop:
        options.setdefault("tools", TOOLS)
        scripted = Scripted(loaded(), tokenizer, messages, least=options.get("message_tokens", MESSAGE_TOKENS))
        if verdicts is not None:
            told = iter(verdicts)
            monkeypatch.setattr(
                Verify,
                "check",
                lambda self, claim, spans, question: Check(next(told), 0.5, tuple(spans), f"{question} Green."),  # type: ignore[arg-type]
            )
        return Loop(Workspace(video, scripted, tokenizer), **options)  # type: ignore[arg-type]

    return loop


def run(loop: Loop, question: str = "What moves?") -> list[Entry]:
    """All entries of a question's run."""
    return list(loop.ask(question))


def result(entries: Sequence[Entry]) -> Result:
    """Its one Result, which is the last."""
    assert isinstance(entries[-1], Result) and sum(isinstance(each, Result) for each in entries) == 1
    return entries[-1]


def problems(entries: Sequence[Entry]) -> list[str]:
    """What was wrong with its calls."""
    return [each.problem for each in entries if isinstance(each, Feedback) and each.problem is not None]
