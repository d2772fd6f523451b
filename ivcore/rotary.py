"""Position tables of both towers, in NumPy float32, so that the two backends start from the very same numbers."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ivcore.config import TextConfig
from ivcore.spellings import VISION_ROPE_THETA


def frequency_axes(mrope_section: tuple[int, int, int]) -> np.ndarray:
    """Axis (0 time, 1 height, 2 width) that owns each rotary frequency: (sum of the section,) int.

    Interleaved M-RoPE (Qwen3-VL, arXiv 2511.21631): frequencies are dealt T H W T H W ..., the rest stay with time.
    """
    axes = np.zeros(sum(mrope_section), dtype=np.int64)
    for axis in (1, 2):
        axes[axis : 3 * mrope_section[axis] : 3] = axis
    return axes


def text_rope(text: TextConfig, position_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, float32 (S, rope_dim / 2), of M-RoPE positions (3, S)."""
    rope_dim = text.geometry.rope_dim
    exponent = np.arange(0, rope_dim, 2, dtype=np.float32) / np.float32(rope_dim)
    frequencies = np.float32(1) / np.float32(text.rope_scaling.rope_theta) ** exponent
    axes = frequency_axes(text.rope_scaling.mrope_section)
    angles = position_ids.T.astype(np.float32)[:, axes] * frequencies  # (S, rope_dim / 2)
    return np.cos(angles), np.sin(angles)


@lru_cache(maxsize=32)
def vision_rope(height: int, width: int, head_dim: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, float32 (height * width, head_dim / 2), of one frame's patches in merge-block order.

    The first half of the frequencies turns with the row, the second half with the column.
    """
    half = head_dim // 2
    exponent = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    frequencies = np.float32(1) / np.float32(VISION_ROPE_THETA) ** exponent
    rows, columns = _patch_grid(height, width, merge)
    angles = np.concatenate([np.outer(rows, frequencies), np.outer(columns, frequencies)], axis=1, dtype=np.float32)
    return np.cos(angles), np.sin(angles)


@lru_cache(maxsize=32)
def position_taps(height: int, width: int, side: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """How the learned (side, side) position embeddings are resampled to a frame of height x width patches.

    Bilinear with aligned corners, as in Qwen3-VL: indices int32 (4, height * width) into the flattened table and
    weights float32 (4, height * width), patches in merge-block order.
    """
    rows, columns = _patch_grid(height, width, merge)
    row = np.linspace(0, side - 1, height, dtype=np.float32)[rows]
    column = np.linspace(0, side - 1, width, dtype=np.float32)[columns]
    top, left = row.astype(np.int32), column.astype(np.int32)
    bottom, right = np.minimum(top + 1, side - 1), np.minimum(left + 1, side - 1)
    down, across = row - top, column - left
    indices = np.stack([top * side + left, top * side + right, bottom * side + left, bottom * side + right])
    weights = np.stack([(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across])
    return indices.astype(np.int32), weights.astype(np.float32)


def _patch_grid(height: int, width: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every patch of a frame, (height * width,) each, in merge-block order."""
    grid = np.indices((height, width)).reshape(2, height // merge, merge, width // merge, merge)
    rows, columns = grid.transpose(0, 1, 3, 2, 4).reshape(2, -1)
    return rows, columns
