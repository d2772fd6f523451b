"""What was found before: passages, scenes and notes in the library, of this run and of earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from agent.tools.tool import Shown, ToolArguments, ToolError, checked_span
from agent.workspace import Workspace

if TYPE_CHECKING:
    from agent.library import Collection, Kind, Record

FOUND = 5
SOURCE = "agent"
NOTED = "Noted."


class Search:
    """Passages, scenes and notes that match a query: full text and vectors together."""

    name: ClassVar[str] = "search"
    description: ClassVar[str] = "Finds transcript passages, scenes and notes of this video that match a query."

    class Arguments(ToolArguments):
        query: str = Field(min_length=1)

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def __call__(self, arguments: Search.Arguments) -> Shown:
        return _found(self._workspace, arguments.query, None)


class Recall:
    """Notes that match a query."""

    name: ClassVar[str] = "recall"
    description: ClassVar[str] = "Finds what was noted about this video, now or in an earlier run."

    class Arguments(ToolArguments):
        query: str = Field(min_length=1)

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def __call__(self, arguments: Recall.Arguments) -> Shown:
        return _found(self._workspace, arguments.query, ("note",))


class Note:
    """A sentence about a span, kept for later turns and later runs."""

    name: ClassVar[str] = "note"
    description: ClassVar[str] = "Keeps a sentence about a span (seconds) of this video for later."

    class Arguments(ToolArguments):
        text: str = Field(min_length=1)
        start: float | None = None
        end: float | None = None

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def __call__(self, arguments: Note.Arguments) -> Shown:
        notes = held(self._workspace)
        from agent.library import Entry

        span = checked_span(arguments.start, arguments.end, self._workspace.duration)
        entry = Entry("note", span, arguments.text, SOURCE)
        notes.add_notes(self._workspace.content, self._workspace.video, [entry])
        return Shown(NOTED)


def held(workspace: Workspace) -> Collection:
    """The library's collection; ToolError where there is none."""
    if workspace.notes is None:
        raise ToolError("there is no library here; go on without it.")
    return workspace.notes


def _found(workspace: Workspace, query: str, kinds: Sequence[Kind] | None) -> Shown:
    records = held(workspace).search(query, k=FOUND, video=workspace.content, kinds=kinds)
    if not records:
        return Shown("Nothing matches.")
    matches = f"match{'es' * (len(records) > 1)}"
    return Shown(f"{len(records)} {matches}, the best first.", quoted=[_line(record) for record in records])


def _line(record: Record) -> str:
    return f"{record.kind}, {record.span[0]:.1f} to {record.span[1]:.1f}: {' '.join(record.text.split())}"
