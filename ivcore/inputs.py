"""ModelInputs: what a prompt and its media become, and all that a backend ever sees of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from ivcore.vision import Patches


@dataclass(frozen=True)
class Media:
    """Where one image or video of a prompt came from.

    timestamps: seconds of every sampled frame, in order; empty for an image.
    warnings: sentences for the user about what could not be decoded.
    """

    kind: Literal["image", "video"]
    source: str
    timestamps: tuple[float, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass
class ModelInputs:
    """One prompt, ready for a backend.

    token_ids: int32 (S,), with one placeholder id for every visual token.
    pixels: float32 (P, C * temporal_patch * patch * patch), normalised patches in merge-block order, media in order of
        appearance; an ndarray, or `Patches`, which makes the same rows from uint8 frames when they are asked for.
    grid_thw: int32 (N, 3), the patches of each medium along time, height and width.
    position_ids: int32 (3, S), M-RoPE positions (time, height, width); None lets the backend compute them.
    """

    token_ids: np.ndarray
    pixels: np.ndarray | Patches | None
    grid_thw: np.ndarray | None
    position_ids: np.ndarray | None = None
    media: tuple[Media, ...] = ()
