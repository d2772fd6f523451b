"""ModelInputs: what a prompt and its media become, and all that a backend ever sees of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ivcore.config import ModelConfig
from ivcore.errors import PromptError

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

    def check(self, config: ModelConfig, held: int = 0) -> None:
        """Raise PromptError where the arrays do not fit each other or the model, whose cache holds `held` tokens."""
        length = len(self.token_ids)
        if not length:
            raise PromptError("The prompt holds no token; ask something.")
        check_token_ids(self.token_ids, config)
        if held + length > config.text.max_position_embeddings:
            raise PromptError(
                f"The prompt takes {held + length:,} tokens, but the model's context holds "
                f"{config.text.max_position_embeddings:,}; use fewer frames or fewer tokens a frame."
            )
        if self.position_ids is not None and self.position_ids.shape != (3, length):
            raise PromptError(f"position_ids has shape {self.position_ids.shape} instead of (3, {length}).")
        if (self.pixels is None) != (self.grid_thw is None):
            raise PromptError("pixels and grid_thw must be given together.")
        if self.pixels is not None and self.grid_thw is not None:
            check_pixels(self.pixels, self.grid_thw, config)


def check_pixels(pixels: np.ndarray | Patches, grid_thw: np.ndarray, config: ModelConfig) -> None:
    """Raise PromptError unless pixels are the patches that the grids (N, 3) count."""
    vision, grids = config.vision, np.asarray(grid_thw)
    if grids.ndim != 2 or grids.shape[1] != 3 or (grids < 1).any() or (grids[:, 1:] % vision.spatial_merge_size).any():
        raise PromptError(
            f"grid_thw {grids.tolist()} is not a list of (time, height, width) with positive sizes, height and width "
            f"multiples of {vision.spatial_merge_size}."
        )
    expected = (int(grids.prod(axis=1).sum()), vision.patch_dim)
    if tuple(pixels.shape) != expected:
        raise PromptError(f"pixels has shape {tuple(pixels.shape)}, but the grids and the model say {expected}.")


def check_token_ids(token_ids: np.ndarray, config: ModelConfig) -> None:
    """Raise PromptError for an id outside the vocabulary: an embedding table may be read past its end unnoticed."""
    if not 0 <= token_ids.min() <= token_ids.max() < config.text.vocab_size:
        raise PromptError(f"A token id lies outside the vocabulary of {config.text.vocab_size:,} tokens.")
