"""What is said."""

from __future__ import annotations

from typing import ClassVar

from agent.spans import Span
from agent.tools.tool import Shown, ToolArguments, checked_span
from agent.transcript import transcript as sources
from agent.workspace import Workspace

MOST_LINES = 100


class Transcript:
    """Subtitles, or speech that was recognised."""

    name: ClassVar[str] = "transcript"
    description: ClassVar[str] = "Shows what is said in the video, or in a span of it (seconds)."

    class Arguments(ToolArguments):
        start: float | None = None
        end: float | None = None

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def __call__(self, arguments: Transcript.Arguments) -> Shown:
        span = checked_span(arguments.start, arguments.end, self._workspace.duration)
        said = _said(self._workspace, span)
        if said.source is None:  # which is not the same as a film in which nobody speaks
            return Shown(f"There is no transcript of {span[0]:.1f} to {span[1]:.1f}.", quoted=said.notes)
        lines = _lines(said)
        if not lines:
            return Shown(f"Nothing is said from {span[0]:.1f} to {span[1]:.1f}.")
        more = f" The first {MOST_LINES} of {len(lines)} lines; ask for less." if len(lines) > MOST_LINES else ""
        return Shown(f"Said from {span[0]:.1f} to {span[1]:.1f}.{more}", quoted=lines[:MOST_LINES], span=span)


def lines_in(workspace: Workspace, span: Span) -> list[str]:
    """The transcript's lines in a span, as prompts quote them: `0.5 to 2.0: The red circle likes plums.`"""
    return _lines(_said(workspace, span))


def _said(workspace: Workspace, span: Span) -> sources.Transcript:
    speech_model, language = workspace.speech_model, workspace.language
    return sources.transcript(workspace.video, span, speech_model=speech_model, language=language)


def _lines(said: sources.Transcript) -> list[str]:
    return [f"{line.span[0]:.1f} to {line.span[1]:.1f}: {' '.join(line.text.split())}" for line in said.lines]
