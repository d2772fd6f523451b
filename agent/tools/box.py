"""The tools by name, and those among them that a run may use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agent.tools.ground import Ground
from agent.tools.look import Look, Overview
from agent.tools.memory import Note, Recall, Search
from agent.tools.segment import Segment
from agent.tools.summarize import Summarize
from agent.tools.tool import Tool, ToolError
from agent.tools.transcribe import Transcript
from agent.tools.verify import Verify
from agent.workspace import Workspace

_KINDS = (Overview, Segment, Look, Ground, Transcript, Search, Note, Recall, Summarize, Verify)
NAMES = tuple(kind.name for kind in _KINDS)
OF_LIBRARY = frozenset({Search.name, Note.name, Recall.name})


def check_names(names: Sequence[str] | None) -> None:
    """ToolError names the first one that is no tool's."""
    unknown = [name for name in names or () if name not in NAMES]
    if unknown:
        raise ToolError(f"There is no tool {unknown[0]!r}; there are {', '.join(NAMES)}.")


def tools(workspace: Workspace, names: Sequence[str] | None = None) -> Mapping[str, Tool]:
    """The tools of these names; None is all that work here. ToolError names an unknown one."""
    check_names(names)
    wanted = (
        [name for name in NAMES if workspace.notes is not None or name not in OF_LIBRARY] if names is None else names
    )
    every: Mapping[str, Tool] = {kind.name: kind(workspace) for kind in _KINDS}
    return {name: every[name] for name in wanted}
