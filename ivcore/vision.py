"""Frames -> patches: the size they are resized to, and normalised rows made from uint8 on demand.

The rules are those of Hugging Face's `Qwen3VLVideoProcessor` and `Qwen2VLImageProcessor`, which Qwen3-VL uses too.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from ivcore.errors import MediaError
from ivcore.processor import ProcessorConfig

__all__ = ["Patches", "ProcessorConfig", "smart_resize_image", "smart_resize_video"]

MAX_ASPECT_RATIO = 200  # of both processors of the reference


def smart_resize_image(
    height: int, width: int, config: ProcessorConfig, max_tokens: int | None = None
) -> tuple[int, int]:
    """(height, width) that an image is resized to: multiples of `config.factor`, nearly the same aspect ratio,
    pixels within the config's limits. max_tokens: at most so many tokens, whatever the limits say.

    Raises MediaError above an aspect ratio of 200. From `smart_resize` of Hugging Face's Qwen2VLImageProcessor.
    """
    _check_aspect(height, width, f"{width}x{height}")
    size = _fit(1, 1, height, width, config.factor, config.image_min_pixels, config.image_max_pixels)
    return _cap_tokens(size, height, width, config.factor, max_tokens)


def smart_resize_video(
    n_frames: int, height: int, width: int, config: ProcessorConfig, max_tokens: int | None = None
) -> tuple[int, int]:
    """(height, width) that the frames of a clip of `n_frames` sampled frames are resized to; the limits hold for
    T x H x W. max_tokens: at most so many tokens a temporal patch, whatever the limits say.

    Raises MediaError above an aspect ratio of 200. From `smart_resize` of Hugging Face's Qwen3VLVideoProcessor.
    """
    factor, step = config.factor, config.temporal_patch_size
    n_frames = max(n_frames, step)  # the reference refuses a shorter clip; here its last frame is repeated
    picture = f"{width}x{height}"
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    _check_aspect(height, width, picture)
    # Python's round, as there: 5 frames count as 4, and 7 as 8.
    counted = round(n_frames / step) * step
    size = _fit(counted, n_frames, height, width, factor, config.video_min_pixels, config.video_max_pixels)
    return _cap_tokens(size, height, width, factor, max_tokens)


def _check_aspect(height: int, width: int, picture: str) -> None:
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise MediaError(
            f"A picture of {picture} pixels cannot be used: its longer side may be at most {MAX_ASPECT_RATIO} "
            "times its shorter one; crop it."
        )


def _fit(
    counted_frames: int, n_frames: int, height: int, width: int, factor: int, least: int, most: int
) -> tuple[int, int]:
    rows, columns = round(height / factor), round(width / factor)
    pixels = counted_frames * rows * columns * factor**2
    if pixels > most:
        shrink = math.sqrt(n_frames * height * width / most)
        rows, columns = math.floor(height / shrink / factor), math.floor(width / shrink / factor)
    elif pixels < least:
        grow = math.sqrt(least / (n_frames * height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return max(rows, 1) * factor, max(columns, 1) * factor


def _cap_tokens(size: tuple[int, int], height: int, width: int, factor: int, max_tokens: int | None) -> tuple[int, int]:
    rows, columns = size[0] // factor, size[1] // factor
    if max_tokens is None or rows * columns <= max_tokens:
        return size
    rows = min(max(math.floor(math.sqrt(max_tokens * height / width)), 1), max_tokens)
    columns = min(max(math.floor(math.sqrt(max_tokens * width / height)), 1), max_tokens // rows)
    return rows * factor, columns * factor


class Patches(NDArrayOperatorsMixin):
    """float32 (P, C * T * p * p) rows like an ndarray's, but held as the uint8 frames they are made from.

    A row is one patch, ordered (channel, time, height, width); rows come medium by medium, temporal patch by temporal
    patch, and within one in blocks of merge_size x merge_size patches, as the vision tower's merger takes them.
    A slice costs only the frames it touches; any NumPy function sees the whole array.

    clips: one uint8 (N, H, W, 3) per medium, an image being one frame; H and W are multiples of `config.factor`. The
    last frame is repeated until N is a multiple of temporal_patch_size.
    """

    dtype = np.dtype(np.float32)
    ndim = 2

    def __init__(self, clips: Sequence[np.ndarray], config: ProcessorConfig) -> None:
        for clip in clips:
            if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or not len(clip):
                raise ValueError(f"frames must be uint8 (N, H, W, 3), not {clip.dtype} {clip.shape}")
            if clip.shape[1] % config.factor or clip.shape[2] % config.factor:
                raise ValueError(f"{clip.shape[1]}x{clip.shape[2]} frames are no multiple of {config.factor}")
        self._clips = tuple(clips)
        self._config = config
        steps, p = config.temporal_patch_size, config.patch_size
        shapes = (clip.shape for clip in clips)
        grids = [(-(-n // steps), height // p, width // p) for n, height, width, _ in shapes]
        self.grid_thw = np.array(grids, np.int32).reshape(-1, 3)
        self._ends = np.cumsum(self.grid_thw.prod(axis=1, dtype=np.int64))
        scale = 255 * np.array((config.image_mean, config.image_std), np.float32)
        self._mean, self._std = np.broadcast_to(scale[:, :, None], (2, 3, steps * p * p)).reshape(2, config.patch_dim)

    @property
    def shape(self) -> tuple[int, int]:
        return (int(self._ends[-1]) if len(self._ends) else 0, self._config.patch_dim)

    @property
    def nbytes(self) -> int:
        """Bytes really held: those of the uint8 frames."""
        return sum(clip.nbytes for clip in self._clips)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | int) -> np.ndarray:
        if isinstance(rows, slice):
            wanted = range(len(self))[rows]
            if not wanted:
                return np.empty((0, self.shape[1]), np.float32)
            first, last = min(wanted[0], wanted[-1]), max(wanted[0], wanted[-1])
            made = self._rows(first, last + 1)
            return made if wanted.step == 1 else made[np.array(wanted) - first]
        row = operator.index(rows)
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} patches")
        return self._rows(row % len(self), row % len(self) + 1)[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("Patches are made on demand; an array of them is always a copy")
        return self[:].astype(dtype or np.float32, copy=False)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        arrays = (np.asarray(each) if isinstance(each, Patches) else each for each in inputs)
        return getattr(ufunc, method)(*arrays, **kwargs)

    def _rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop, normalised; made in bands, the merge_size rows of patches that span a frame's width."""
        out = np.empty((stop - start, self.shape[1]), np.float32)
        merge = self._config.merge_size
        for index in range(int(np.searchsorted(self._ends, start, side="right")), len(self._clips)):
            _, grid_height, grid_width = (int(each) for each in self.grid_thw[index])
            band, bands = merge * grid_width, grid_height // merge
            origin = 0 if index == 0 else int(self._ends[index - 1])
            if origin >= stop:
                break
            begin, end = max(start, origin) - origin, min(stop, int(self._ends[index])) - origin
            for step in range(begin // (band * bands), -(-end // (band * bands))):
                offset = step * band * bands
                low, high = max(begin - offset, 0) // band, min(-(-(end - offset) // band), bands)
                made = self._bands(index, step, low, high)
                at = offset + low * band  # row of the clip that made[0] is
                left, right = max(begin, at), min(end, at + len(made))
                out[origin + left - start : origin + right - start] = made[left - at : right - at]
        out -= self._mean
        out /= self._std
        return out

    def _bands(self, index: int, step: int, low: int, high: int) -> np.ndarray:
        """uint8 rows of the bands low..high of one temporal patch."""
        steps, p, merge = self._config.temporal_patch_size, self._config.patch_size, self._config.merge_size
        clip = self._clips[index]
        frames = clip[step * steps : (step + 1) * steps, low * merge * p : high * merge * p]
        if len(frames) < steps:
            frames = np.concatenate([frames, np.repeat(frames[-1:], steps - len(frames), axis=0)])
        blocks = frames.reshape(steps, high - low, merge, p, -1, merge, p, 3)
        return blocks.transpose(1, 4, 2, 5, 7, 0, 3, 6).reshape(-1, self._config.patch_dim)
