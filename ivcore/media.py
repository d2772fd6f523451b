"""The media of a prompt, sampled and resized, with a check on their tokens before anything much is decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from ivcore import video
from ivcore.errors import MediaError
from ivcore.image import load_image
from ivcore.inputs import Media
from ivcore.messages import MediaItem
from ivcore.processor import ProcessorConfig
from ivcore.video import Clip, SizeRule, VideoInfo, resize, sample_indices
from ivcore.vision import smart_resize_image, smart_resize_video

Mode = Literal["uniform", "keyframes"]
Progress = Callable[[int, int], None]

# The reference's assumption, too, where nobody says how fast an array of frames plays.
DEFAULT_ARRAY_FPS = 24.0


class Videos(Protocol):
    """Who opens video files: `ivcore.video`, or a cache in front of it; see its functions."""

    def probe(self, path: str | Path, /) -> VideoInfo: ...
    def decode(
        self,
        path: str | Path,
        /,
        *,
        fps: float,
        min_frames: int,
        max_frames: int,
        size: SizeRule | None,
        mode: Mode,
        on_progress: Progress | None,
    ) -> Clip: ...
    def decode_at(self, path: str | Path, times: Sequence[float], /, *, size: SizeRule | None) -> Clip: ...


@dataclass(frozen=True)
class LoadedMedia:
    """A medium's resized frames, uint8 (N, H, W, 3), one for an image, and what to say about it."""

    frames: np.ndarray
    media: Media


@dataclass(frozen=True)
class _Survey:
    """What is known of a medium before it is decoded; `fps` is the video's own rate."""

    frames: int
    fps: float
    height: int
    width: int


class MediaLoader:
    """Loads media with one sampling; `frame_tokens`: the most tokens of a temporal patch or an image."""

    def __init__(
        self,
        config: ProcessorConfig,
        *,
        frame_tokens: int | None = None,
        mode: Mode = "uniform",
        on_progress: Progress | None = None,
        videos: Videos | None = None,
    ) -> None:
        self._videos: Videos = videos or video
        self._config = config
        self._frame_tokens = frame_tokens
        self._mode = mode
        self._on_progress = on_progress

    def load(self, items: Sequence[MediaItem], check: Callable[[int], None]) -> list[LoadedMedia]:
        """The media of `items`, in order; MediaError for one that cannot be used.

        check: called with the number of visual tokens known so far, whenever it grows; it raises to stop.
        """
        surveys = [self._survey(item) for item in items]
        tokens = [self._planned_tokens(item, survey) for item, survey in zip(items, surveys, strict=True)]
        check(sum(tokens))
        loaded = []
        for index, (item, survey) in enumerate(zip(items, surveys, strict=True)):

            def size(n_frames: int, height: int, width: int, index: int = index) -> tuple[int, int]:
                resized = self._size(items[index], n_frames, height, width)
                tokens[index] = self._tokens(n_frames, resized)
                check(sum(tokens))
                return resized

            loaded.append(self._load_image(item, size) if survey is None else self._load_video(item, survey, size))
        return loaded

    def _planned_tokens(self, item: MediaItem, survey: _Survey | None) -> int:
        """Tokens of a medium, 0 where they are not known before it is opened (images) or decoded (keyframes)."""
        if survey is None or (self._mode == "keyframes" and isinstance(item.source, Path)):
            return 0
        n_frames = len(item.times) if item.times is not None else len(self._indices(survey))
        return self._tokens(n_frames, self._size(item, n_frames, survey.height, survey.width))

    def _indices(self, survey: _Survey) -> np.ndarray:
        how = self._config
        return sample_indices(
            survey.frames, survey.fps, fps=how.fps, min_frames=how.min_frames, max_frames=how.max_frames
        )

    def _size(self, item: MediaItem, n_frames: int, height: int, width: int) -> tuple[int, int]:
        try:
            if item.kind == "image":
                return smart_resize_image(height, width, self._config, self._frame_tokens)
            return smart_resize_video(n_frames, height, width, self._config, self._frame_tokens)
        except MediaError as error:
            raise MediaError(f"{item.name}: {error}") from None

    def _tokens(self, n_frames: int, size: tuple[int, int]) -> int:
        return -(-n_frames // self._config.temporal_patch_size) * (size[0] * size[1] // self._config.factor**2)

    def _load_image(self, item: MediaItem, size: Callable[[int, int, int], tuple[int, int]]) -> LoadedMedia:
        pixels = item.source if isinstance(item.source, np.ndarray) else load_image(item.source)
        return LoadedMedia(resize(pixels, *size(1, *pixels.shape[:2]))[None], Media("image", item.name))

    def _load_video(
        self, item: MediaItem, survey: _Survey, size: Callable[[int, int, int], tuple[int, int]]
    ) -> LoadedMedia:
        if isinstance(item.source, np.ndarray):
            indices = np.arange(survey.frames) if item.times is not None else self._indices(survey)
            height, width = size(len(indices), survey.height, survey.width)
            frames = np.stack([resize(item.source[index], height, width) for index in indices])
            if item.times is not None:
                return LoadedMedia(frames, Media("video", item.name, _from_origin(item.times, item)))
            times = tuple(float(index / survey.fps) for index in indices)
            unsaid = f"{item.name} does not say its fps; taken as {survey.fps:g} frames per second."
            return LoadedMedia(frames, Media("video", item.name, times, () if item.fps else (unsaid,)))
        if item.times is not None:
            clip = self._videos.decode_at(
                _file(item), item.times, size=lambda n, _height, _width: size(n, survey.height, survey.width)
            )
            times = _from_origin(clip.timestamps, item)
            return LoadedMedia(clip.frames, Media("video", item.name, times, clip.warnings))
        clip = self._videos.decode(
            _file(item),
            fps=self._config.fps,
            min_frames=self._config.min_frames,
            max_frames=self._config.max_frames,
            # The reference fits the stored pixels, whatever their shape, and so does this: Qwen3-VL is used to it.
            size=lambda n_frames, _height, _width: size(n_frames, survey.height, survey.width),
            mode=self._mode,
            on_progress=self._on_progress,
        )
        return LoadedMedia(clip.frames, Media("video", item.name, clip.timestamps, clip.warnings))

    def _survey(self, item: MediaItem) -> _Survey | None:
        """A video's numbers, None for an image; nothing but a file's index and first frame is read."""
        if item.kind == "image":
            return None
        if isinstance(item.source, np.ndarray):
            frames, height, width, _ = item.source.shape
            return _Survey(frames, item.fps or DEFAULT_ARRAY_FPS, height, width)
        info = self._videos.probe(_file(item))
        height, width = info.stored_height, info.stored_width
        if info.rotation % 180:
            height, width = width, height
        return _Survey(info.frames, info.fps, height, width)


def _from_origin(times: Sequence[float], item: MediaItem) -> tuple[float, ...]:
    """The times to show; a frame that came on just before the origin is at 0."""
    return tuple(max(time - item.origin, 0.0) for time in times)


def _file(item: MediaItem) -> Path:
    assert isinstance(item.source, Path)  # `read_messages` lets no other source of a video through
    return item.source
