"""M-RoPE position ids: time, height and width of every token (`get_rope_index` of Hugging Face's Qwen3-VL)."""

from __future__ import annotations

import numpy as np

from ivcore.errors import PromptError


def position_ids(
    token_ids: np.ndarray,
    grid_thw: np.ndarray | None,
    *,
    image_token_id: int,
    video_token_id: int,
    merge_size: int,
    start: int = 0,
) -> np.ndarray:
    """int32 (3, S) positions along time, height and width; `start` is the first token's.

    Text counts up in all three. A run of placeholders stands still in time and spreads over the h x w tokens of its
    frame; the next token follows the frame's longer side. A video of grid (T, h, w) is T such runs, because its
    timestamps stand between them. Grids are in order of appearance.

    Raises PromptError where placeholders and grids disagree.
    """
    ids = np.asarray(token_ids)
    kind = (ids == image_token_id) * 1 + (ids == video_token_id) * 2  # (S,) 0 text, 1 image, 2 video
    edges = np.flatnonzero(np.diff(kind, prepend=0, append=0))
    opens = kind[edges[:-1]] > 0
    firsts, lasts = edges[:-1][opens], edges[1:][opens]  # (runs,) first token of each run and the one after its last
    grids = np.zeros((0, 3), np.int64) if grid_thw is None else np.asarray(grid_thw, np.int64).reshape(-1, 3)
    _check(kind[firsts], lasts - firsts, grids, merge_size)

    height, width = np.repeat(grids[:, 1:] // merge_size, grids[:, 0], axis=0).T  # (runs,)
    advance = np.ones(len(ids), np.int64)
    visual = kind > 0
    advance[visual] = 0
    advance[lasts - 1] = np.maximum(height, width)
    positions = np.broadcast_to(start + np.cumsum(advance) - advance, (3, len(ids))).astype(np.int32)
    # Row and column of every placeholder within its own run.
    within = np.flatnonzero(visual) - np.repeat(firsts, lasts - firsts)
    columns = np.repeat(width, lasts - firsts)
    positions[1, visual] += (within // columns).astype(np.int32)
    positions[2, visual] += (within % columns).astype(np.int32)
    return positions


def next_position(position_ids: np.ndarray) -> int:
    """The position of the token after these: one above the largest of the three axes."""
    return int(position_ids.max()) + 1 if position_ids.size else 0


def _check(kinds: np.ndarray, lengths: np.ndarray, grids: np.ndarray, merge_size: int) -> None:
    """The runs of placeholders (kind and length of each) are the frames of the grids, in the same order."""
    if (grids < 1).any() or (grids[:, 1:] % merge_size).any():
        raise PromptError(
            f"grid_thw {grids.tolist()} holds a size that is not a positive multiple of the merge size {merge_size}."
        )
    if len(kinds) != grids[:, 0].sum():
        raise PromptError(
            f"The prompt has {len(kinds)} runs of visual placeholders but the {len(grids)} grids of its media have "
            f"{grids[:, 0].sum()} frames; every frame needs one run."
        )
    tokens = np.repeat(grids[:, 1] * grids[:, 2] // merge_size**2, grids[:, 0])
    owner = np.repeat(np.arange(len(grids)), grids[:, 0])
    if (wrong := np.flatnonzero(lengths != tokens)).size:
        run = int(wrong[0])
        raise PromptError(
            f"Run {run + 1} of visual placeholders has {lengths[run]} tokens but its medium's grid "
            f"{grids[owner[run]].tolist()} needs {tokens[run]} per frame."
        )
    first_of_owner = np.cumsum(grids[:, 0]) - grids[:, 0]
    mixed = kinds != kinds[first_of_owner][owner] if len(kinds) else kinds
    if (wrong := np.flatnonzero(mixed)).size:
        medium = int(owner[wrong[0]])
        raise PromptError(
            f"Medium {medium + 1} with grid {grids[medium].tolist()} has image and video placeholders mixed."
        )
    still = kinds[first_of_owner] == 1 if len(kinds) else kinds
    if (wrong := np.flatnonzero(still & (grids[:, 0] > 1))).size:
        raise PromptError(f"Grid {grids[wrong[0]].tolist()} has several frames but its placeholders are an image's.")
