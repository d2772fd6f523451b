"""A span or the whole video in a few sentences, made of summaries of its parts (as arXiv 2109.10862 does books)."""

from __future__ import annotations

from typing import ClassVar

from agent import prompts
from agent.session import Session
from agent.spans import Span
from agent.tools.tool import Shown, ToolArguments, checked_span
from agent.tools.transcribe import lines_in
from agent.workspace import Workspace

PART, PARTS = 60.0, 8
"""Seconds that one summary of frames covers at most, unless a part would be one of more than PARTS * PARTS; summaries
that are merged at once."""

FRAMES, WORDS = 12, 128


class Summarize:
    """What happens, in order."""

    name: ClassVar[str] = "summarize"
    description: ClassVar[str] = "Sums up the video, or a span of it (seconds), in a few sentences."

    class Arguments(ToolArguments):
        start: float | None = None
        end: float | None = None

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def __call__(self, arguments: Summarize.Arguments) -> Shown:
        span = checked_span(arguments.start, arguments.end, self._workspace.duration)
        # By the model, but of frames and subtitles that may say anything: quoted like those.
        return Shown(f"Summary of {span[0]:.1f} to {span[1]:.1f}.", quoted=[self.summary(span)])

    def summary(self, span: Span) -> str:
        """The summary's text."""
        length = max(PART, (span[1] - span[0]) / PARTS**2)
        count = max(1, round((span[1] - span[0]) / length))
        edges = [span[0] + (span[1] - span[0]) * index / count for index in range(count + 1)]
        notes = [self._of_frames((edges[index], edges[index + 1])) for index in range(count)]
        while len(notes) > 1:
            notes = [self._of_notes(notes[first : first + PARTS]) for first in range(0, len(notes), PARTS)]
        return notes[0].partition(": ")[2]

    def _of_frames(self, span: Span) -> str:
        clip = self._workspace.look(span, fps=FRAMES / (span[1] - span[0]), most=FRAMES)
        session = self._workspace.asked(clip, prompts.SUMMARY, quoted=lines_in(self._workspace, span))
        return f"{span[0]:.1f} to {span[1]:.1f}: {_said(session)}"

    def _of_notes(self, notes: list[str]) -> str:
        first, last = notes[0].partition(" to ")[0], notes[-1].partition(": ")[0].partition(" to ")[2]
        session = self._workspace.fresh()
        text = "\n".join(f"> {note}" for note in notes)
        session.read([{"role": "user", "content": f"{prompts.SUMMARY_OF_PARTS}\n{text}"}])
        return f"{first} to {last}: {_said(session)}"


def _said(session: Session) -> str:
    """The model's answer in one line, so that the mark before a note marks all of it."""
    return " ".join("".join(session.answer(WORDS)).split())
