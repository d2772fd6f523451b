"""Where the video is cut, and which shots belong together."""

from __future__ import annotations

from typing import ClassVar

from agent.scenes import scenes
from agent.tools.tool import Shown, ToolArguments, checked_span
from agent.workspace import Workspace

MOST_SHOTS = 100


class Segment:
    """Shots, and the scenes that they make up."""

    name: ClassVar[str] = "segment"
    description: ClassVar[str] = "Lists the shots and scenes of the video, or of a span of it (seconds)."

    class Arguments(ToolArguments):
        start: float | None = None
        end: float | None = None

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def __call__(self, arguments: Segment.Arguments) -> Shown:
        span = checked_span(arguments.start, arguments.end, self._workspace.duration)
        found = scenes(self._workspace.video, span)
        lines = [
            f"{start:.1f} to {end:.1f}, scene {number}" for number, scene in enumerate(found, 1) for start, end in scene
        ]
        more = f" The first {MOST_SHOTS} of them; ask for less." if len(lines) > MOST_SHOTS else ""
        shots, groups = f"shot{'s' * (len(lines) > 1)}", f"scene{'s' * (len(found) > 1)}"
        head = f"{len(lines)} {shots} in {len(found)} {groups}.{more}"
        return Shown("\n".join([head, *lines[:MOST_SHOTS]]))
