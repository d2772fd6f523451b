"""Frames: of the whole video at a glance, and of a span as closely as it takes."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from agent.tools.tool import Shown, ToolArguments, checked_span
from agent.workspace import Workspace
from ivcore.video import Clip

GLANCE = 8
MOST_FRAMES = 64
ANSWER_TOKENS = 32


class Overview:
    """A storyboard: keyframes, evenly spread."""

    name: ClassVar[str] = "overview"
    description: ClassVar[str] = "Shows a few frames of the whole video, or of a span of it (seconds)."

    class Arguments(ToolArguments):
        start: float | None = None
        end: float | None = None
        frames: int = Field(default=GLANCE, ge=1, le=MOST_FRAMES)

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def __call__(self, arguments: Overview.Arguments) -> Shown:
        span = checked_span(arguments.start, arguments.end, self._workspace.duration)
        clip = self._workspace.look(span, fps=1.0, most=arguments.frames, keyframes=True)
        text = f"{len(clip.timestamps)} frames of {span[0]:.1f} to {span[1]:.1f}."
        return Shown(text, span=span, frames=clip.frames, times=clip.timestamps)


class Look:
    """Frames of a span at a chosen rate, and what a fresh look at them answers to a question.

    A context that has seen nothing else is better at reading something off a few frames than a run that has grown long.
    """

    name: ClassVar[str] = "look"
    description: ClassVar[str] = (
        "Shows the frames of a span (seconds), 2 a second unless fps says otherwise, and answers a question about them."
    )

    class Arguments(ToolArguments):
        start: float
        end: float
        fps: float = Field(default=2.0, gt=0, le=30)
        question: str = ""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def __call__(self, arguments: Look.Arguments) -> Shown:
        span = checked_span(arguments.start, arguments.end, self._workspace.duration)
        clip = self._workspace.look(span, fps=arguments.fps, most=MOST_FRAMES)
        wanted = (span[1] - span[0]) * arguments.fps
        fewer = f" (at most {MOST_FRAMES} at once)" if wanted > MOST_FRAMES + 1 else ""
        text = f"{len(clip.timestamps)} frames of {span[0]:.1f} to {span[1]:.1f}{fewer}."
        answered = self._answered(clip, arguments.question) if arguments.question else ""
        return Shown(text, span=span, frames=clip.frames, times=clip.timestamps, answered=answered)

    def _answered(self, clip: Clip, question: str) -> str:
        known = (self.name, clip.timestamps, question)
        if known not in self._workspace.memo:
            session = self._workspace.asked(clip, question)
            self._workspace.memo[known] = "".join(session.answer(ANSWER_TOKENS)).strip()
        return str(self._workspace.memo[known])
