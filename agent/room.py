"""Room in the context: the oldest observations become memory when it is nearly full."""

from __future__ import annotations

from agent import prompts
from agent.context import Context
from agent.entries import Memory, Observation
from agent.workspace import Workspace, video_part

CAPTION_TOKENS = 48
SHARE = 0.5
"""Of the observations in view, oldest first, that make room at once: one by one, the rest would be read as often."""


def make_room(context: Context, workspace: Workspace) -> Memory | None:
    """A memory of the oldest half of the observations in view; None where none is left to make room."""
    oldest = context.in_view()
    if not oldest:
        return None
    gone = oldest[: max(1, round(len(oldest) * SHARE))]
    captions = (_caption(each, context, workspace) for each in gone)
    return Memory(text="\n".join(captions), of=tuple(each.id for each in gone))


def _caption(seen: Observation, context: Context, workspace: Workspace) -> str:
    """A line on an observation, by the model, from its frames or its text alone."""
    session = workspace.fresh()
    shown = [video_part(context.frames(seen), seen.times)] if seen.times else []
    lines = f"Subtitles:\n{seen.text}\n\n" if seen.text else ""
    asked = prompts.CAPTION if seen.times else prompts.SUMMARY
    session.read([{"role": "user", "content": [*shown, {"type": "text", "text": f"{lines}{asked}"}]}])
    said = " ".join("".join(session.answer(CAPTION_TOKENS)).split())
    return f"{seen.id}, {seen.span[0]:.1f} to {seen.span[1]:.1f}: {said}"
