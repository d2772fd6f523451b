"""What each temporal patch of sampled frames shows, for training a vision tower by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from train.toyworld.script import Script


@dataclass(frozen=True)
class PatchLabel:
    """What the frames of one temporal patch show.

    visible: for every frame, whether anything is there. figures: how many different ones in all the frames. colour,
    shape: of the one figure, None unless there is exactly one. direction: of it, None unless it is in every frame,
    since a single picture shows no motion.
    """

    visible: tuple[bool, ...]
    figures: int
    colour: str | None
    shape: str | None
    direction: str | None


def label(script: Script, times: Sequence[float]) -> PatchLabel:
    """The label of a temporal patch whose frames are at these times in seconds."""
    shown = [script.visible_at(time) for time in times]
    visible = tuple(bool(each) for each in shown)
    figures = {id(figure): figure for each in shown for figure in each}
    if len(figures) != 1:
        return PatchLabel(visible, len(figures), None, None, None)
    (figure,) = figures.values()
    return PatchLabel(visible, 1, figure.name.colour, figure.name.shape, figure.direction if all(visible) else None)


def patch_labels(script: Script, timestamps: Sequence[float], temporal_patch_size: int = 2) -> list[PatchLabel]:
    """The labels of a clip's temporal patches, from the timestamps of its sampled frames (`Media.timestamps`)."""
    groups = range(0, len(timestamps), temporal_patch_size)
    return [label(script, timestamps[first : first + temporal_patch_size]) for first in groups]
