"""Room in the context: the oldest observations become memory when it is nearly full."""

from __future__ import annotations

from agent import prompts
from agent.context import Context
from agent.entries import Memory, Observation
from agent.workspace import Workspace
from ivcore.video import Clip, decode_at

CAPTION_TOKENS = 48
SHARE = 0.5
"""Of the frames in view, oldest first, that make room at once: trimming one by one would read the rest as often."""


def make_room(context: Context, workspace: Workspace) -> Memory | None:
    """A memory of the oldest half of the observations in view; None where none is left to make room."""
    oldest = context.in_view()
    if not oldest:
        return None
    gone = oldest[: max(1, round(len(oldest) * SHARE))]
    return Memory(text=" ".join(_caption(each, workspace) for each in gone), of=tuple(each.id for each in gone))


def _caption(seen: Observation, workspace: Workspace) -> str:
    """One sentence on an observation, by the model, from its frames alone."""
    clip: Clip = decode_at(workspace.video, seen.times)
    session = workspace.asked(clip, prompts.CAPTION)
    said = " ".join("".join(session.answer(CAPTION_TOKENS)).split())
    return f"{seen.id}, {seen.span[0]:.1f} to {seen.span[1]:.1f}: {said}"
