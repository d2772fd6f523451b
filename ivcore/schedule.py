"""What runs in what portions so that working memory stays under a budget; shared by both backends.

A prompt is prefilled in chunks of tokens, each chunk attends to the keys in blocks, and the vision tower encodes frames
in groups just before the chunk that needs them. None of the three portions grows with the video.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ivcore.config import ModelConfig, TextConfig

DEFAULT_MEMORY_BUDGET = 512 * 2**20
"""Bytes of working memory above weights and cache that a prefill plans for."""

MAX_CHUNK = 2048
MAX_GROUP_PATCHES = 4096  # rows enough to keep a GPU's matrix units busy; more would only take memory
_SCORE_BYTES = 12  # float32 scores, their exponentials, and the copy in the model's dtype or a mask


@dataclass(frozen=True)
class FrameGroup:
    """`frames` temporal patches of one size: rows `start` to `start + frames * height * width` of the pixels."""

    start: int
    frames: int
    height: int
    width: int

    @property
    def stop(self) -> int:
        return self.start + self.frames * self.height * self.width


def frame_groups(config: ModelConfig, grid_thw: np.ndarray, budget: int, itemsize: int) -> Iterator[FrameGroup]:
    """Groups of frames: up to 4,096 patches whose activations fit in half of `budget` bytes, but at least one frame."""
    vision = config.vision
    # Pixels in float32 and the widest moment of a block: residual, q, k, v and their rotated copies, or the MLP.
    per_patch = 4 * vision.patch_dim + itemsize * (
        2 * vision.hidden_size + max(8 * vision.hidden_size, 2 * vision.intermediate_size)
    )
    row = 0
    for time, height, width in np.asarray(grid_thw).tolist():
        frames_at_once = max(1, min(MAX_GROUP_PATCHES, budget // 2 // per_patch) // (height * width))
        for first in range(0, time, frames_at_once):
            frames = min(frames_at_once, time - first)
            yield FrameGroup(row, frames, height, width)
            row += frames * height * width


def vision_query_block(frames: int, heads: int, patches: int, budget: int) -> int:
    """Query patches that may attend at once, so that the scores of (frames, heads, block, patches) fit in half."""
    return max(1, min(patches, budget // 2 // (frames * heads * patches * _SCORE_BYTES)))


def chunk_size(text: TextConfig, budget: int, itemsize: int) -> int:
    """Tokens in a prefill chunk: a power of two up to 2,048 whose activations fit in half of `budget` bytes.

    A large chunk rebuilds the keys of the expanded form less often; 2,048 is also what mlx-lm prefills at a time.
    """
    geometry = text.geometry
    attention = geometry.num_heads * (2 * (geometry.nope_dim + geometry.rope_dim) + 2 * geometry.v_dim)
    per_token = itemsize * (4 * text.hidden_size + max(3 * text.intermediate_size, attention))
    chunk = MAX_CHUNK
    while chunk > 16 and chunk * per_token > budget // 2:
        chunk //= 2
    return chunk


def key_block(query_rows: int, key_numbers: int, budget: int, itemsize: int) -> int:
    """Keys to attend to at a time, so that scores and rebuilt keys and values fit in half of `budget` bytes.

    query_rows: batch * heads * query tokens. key_numbers: numbers of K and V that one key is rebuilt to (0 for a view).
    """
    return max(16, budget // 2 // (query_rows * _SCORE_BYTES + 2 * key_numbers * itemsize))
