"""Scenes of a video and their shots: where PySceneDetect finds cuts, in the seconds that ivcore.video counts.

- PySceneDetect judges the pictures; ivcore demuxes and decodes them with PyAV. PySceneDetect's own PyAV backend takes a
  cover for the video, puts every frame without a timestamp at 0, and gives up at eight damaged frames.
- Pictures are decoded once, in order, and made small on the way; of what they show, only colours are kept.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame

from agent.scene_grouping import Colours, group
from agent.spans import Span
from ivcore.demux import ROUNDING, PacketIndex, read_index
from ivcore.errors import BackendError, MediaError
from ivcore.frames import SeekingReader, read_frames_in_order
from ivcore.media_file import readable_file
from ivcore.video import checked_span

# PySceneDetect's own defaults: the side it makes pictures small to, the shortest shot, and the score of a cut.
PICTURE_SIDE = 256
SHORTEST_SHOT = 0.6
CUT_SCORE = 27.0

MAX_THREADS = 8


def scenes(
    path: str | Path, span: Span | None = None, *, on_progress: Callable[[int, int], None] | None = None
) -> list[list[Span]]:
    """The scenes of a video, or of a span of it, each a list of its shots: (start, end) in seconds.

    Every shot begins where the last one ends; the first begins at 0 or at the span's start, the last ends with the
    video or the span; a cut is at the time of the first frame after it. on_progress: called with (frames judged, frames
    to judge).
    Method: PySceneDetect's content detector (the mean change of hue, saturation and brightness from frame to frame) for
    the shots, `agent.scene_grouping` for the scenes.
    Raises MediaError if the file is no video, the span is not in it or no frame of it can be decoded, BackendError
    without PySceneDetect.
    """
    try:
        from scenedetect.common import FrameTimecode, Timecode
        from scenedetect.detectors import ContentDetector
    except ImportError:
        raise BackendError("Finding scenes needs PySceneDetect: run pip install 'ivmlx[agent]'.") from None
    path = readable_file(path)
    index = read_index(path)
    start, end = checked_span(span, index.seconds, path)
    # A cut this close after the first picture is not told from a flash, so judging begins before the span.
    first, last = index.frames_in(max(start - SHORTEST_SHOT, 0.0), end)
    detector = ContentDetector(threshold=CUT_SCORE, min_scene_len=SHORTEST_SHOT)
    cuts: list[float] = []
    colours = Colours()
    judged = 0
    try:
        for number, picture in _pictures(path, index, first, last):
            # Whole numbers of a time base, so that a cut comes back as exactly the frame's own time.
            ticks, base = _ticks(index, number)
            timecode = FrameTimecode(Timecode(ticks, base), fps=index.fps)
            cuts.extend(float(cut.seconds) for cut in detector.process_frame(timecode, picture))
            if (time := float(ticks * base)) >= start:
                colours.add(time, picture)
            judged += 1
            if on_progress is not None:
                on_progress(judged, last + 1 - first)
    except (av.FFmpegError, ValueError) as error:
        raise MediaError(f"{path} has frames that cannot be converted to RGB ({error}); convert it to H.264.") from None
    if not judged:
        where = "" if span is None else f" from {start:g} to {end:g} s"
        raise MediaError(f"{path} is damaged: no frame{where} could be decoded; copy or download it again.")
    edges = [start, *(cut for cut in cuts if start + ROUNDING < cut < end - ROUNDING), end]
    return group(list(itertools.pairwise(edges)), colours)


def _ticks(index: PacketIndex, number: int) -> tuple[int, Fraction]:
    """A frame's time since the first frame as (count, time base in seconds)."""
    if index.seekable:
        return int(index.frame_pts[number] - index.frame_pts[0]), index.time_base
    return number, 1 / Fraction(index.fps).limit_denominator(1001)


def _pictures(path: Path, index: PacketIndex, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
    """(frame number, BGR uint8 (h, w, 3), at most PICTURE_SIDE a side) of the frames that decode, in order."""
    convert = _Shrink()
    if not index.seekable:
        for number, picture in read_frames_in_order(
            path, index, np.arange(first, last + 1), convert, keyframes_only=False
        ):
            if picture is not None:
                yield number, picture
            if number >= last:
                return
        return
    numbers = {int(pts): number for number, pts in enumerate(index.frame_pts[first : last + 1].tolist(), first)}
    entry = int(index.key_positions[index.entry_key(first)])
    end = int(index.frame_positions[first : last + 1].max())
    with SeekingReader(path, index, min(os.cpu_count() or 1, MAX_THREADS)) as reader:
        for frame in reader.read(entry, end, frozenset(numbers), skip=True):
            if frame.pts in numbers and not frame.is_corrupt:
                yield numbers.pop(frame.pts), convert(frame)


class _Shrink:
    """Frame -> small BGR picture, all of the first frame's shape: a stream may change its size on the way."""

    def __init__(self) -> None:
        self._shape: tuple[int, int] | None = None

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        if self._shape is None:
            scale = min(1.0, PICTURE_SIDE / max(frame.width, frame.height))
            self._shape = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
        width, height = self._shape
        return frame.reformat(width=width, height=height, format="bgr24", interpolation="AREA").to_ndarray()
