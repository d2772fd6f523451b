"""What is said, and where the video is cut."""

from __future__ import annotations

from typing import ClassVar

from agent.entries import Span
from agent.scenes import shots
from agent.tools.tool import Shown, ToolArguments, checked_span
from agent.transcript.transcript import transcript
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
        lines = lines_in(self._workspace, span)
        if not lines:
            return Shown(f"Nothing is said from {span[0]:.1f} to {span[1]:.1f}.")
        more = f" The first {MOST_LINES} of {len(lines)} lines; ask for less." if len(lines) > MOST_LINES else ""
        return Shown(f"Said from {span[0]:.1f} to {span[1]:.1f}.{more}", quoted=lines[:MOST_LINES], span=span)


class Segment:
    """Shots."""

    name: ClassVar[str] = "segment"
    description: ClassVar[str] = "Lists the shots of the video, or of a span of it (seconds)."

    class Arguments(ToolArguments):
        start: float | None = None
        end: float | None = None

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def __call__(self, arguments: Segment.Arguments) -> Shown:
        span = checked_span(arguments.start, arguments.end, self._workspace.duration)
        found = shots(self._workspace.video, span)
        listed = "\n".join(f"{start:.1f} to {end:.1f}" for start, end in found[:MOST_LINES])
        more = f"\n(the first {MOST_LINES})" if len(found) > MOST_LINES else ""
        return Shown(f"{len(found)} shots:\n{listed}{more}")


def lines_in(workspace: Workspace, span: Span) -> list[str]:
    """The transcript's lines in a span, as prompts quote them: `0.5 to 2.0: The red circle likes plums.`"""
    said = transcript(workspace.video, span, speech_model=workspace.speech_model, language=workspace.language)
    return [f"{line.span[0]:.1f} to {line.span[1]:.1f}: {' '.join(line.text.split())}" for line in said.lines]
