"""Video file -> sampled RGB frames with their times in seconds.

- Frames are chosen as Hugging Face's Qwen3VLVideoProcessor chooses them: evenly over the frames, not over the seconds.
- They are resized while decoding: memory holds the resized frames and a few decoded ones, whatever the video's length.
- What is damaged or cut off is left out and said in `warnings`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from ivcore.color import DynamicRange, Orientation, converter, dynamic_range, resize
from ivcore.demux import DAMAGE, PacketIndex, open_video, read_index
from ivcore.errors import MediaError
from ivcore.frames import read_frames, read_frames_in_order
from ivcore.image import load_image
from ivcore.media_file import readable_file

__all__ = [
    "Clip",
    "SizeRule",
    "VideoInfo",
    "checked_span",
    "decode",
    "decode_at",
    "load_image",
    "probe",
    "resize",
    "sample_indices",
]

SizeRule = Callable[[int, int, int], tuple[int, int]]  # (frames, height, width as displayed) -> (height, width)

# A pixel this many times wider than high, or the reverse, is a broken header, not a picture.
MAX_PIXEL_ASPECT = 16


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds, as far as it can be read.

    width, height: as displayed, after the pixels' aspect ratio and the rotation; stored_width, stored_height: before.
    duration: seconds. fps: frames / duration; the container's rate when it is constant. rotation: degrees
    counterclockwise from the stored picture to the displayed one. dynamic_range: HDR ("PQ", "HLG") is tone-mapped.
    """

    path: str
    width: int
    height: int
    duration: float
    frames: int
    fps: float
    codec: str
    rotation: int
    stored_width: int
    stored_height: int
    dynamic_range: DynamicRange


@dataclass(frozen=True)
class Clip:
    """Frames sampled from a video.

    frames: uint8 (N, H, W, 3), RGB. timestamps: seconds since the first frame of the video, one a frame, from its own
    pts. indices: their numbers among the video's frames. warnings: sentences for the user.
    """

    frames: np.ndarray
    timestamps: tuple[float, ...]
    indices: tuple[int, ...]
    info: VideoInfo
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Survey:
    info: VideoInfo
    index: PacketIndex
    orientation: Orientation
    frame_bytes: int


def probe(path: str | Path) -> VideoInfo:
    """Read a video's packets and decode its first frame; MediaError if it is no video or nothing can be decoded."""
    return _survey(readable_file(path)).info


def sample_indices(total_frames: int, video_fps: float, *, fps: float, min_frames: int, max_frames: int) -> np.ndarray:
    """Frame numbers, int64 (n,), to sample at `fps` per second; as Qwen3VLVideoProcessor.sample_frames.

    n = total_frames / video_fps * fps, rounded down, but from min_frames to max_frames and never more than there are.
    """
    count = int(total_frames / video_fps * fps)
    count = min(max(count, min_frames), max_frames, total_frames)
    return np.linspace(0, total_frames - 1, count).round().astype(np.int64)


def decode(
    path: str | Path,
    *,
    fps: float = 2.0,
    min_frames: int = 4,
    max_frames: int = 768,
    size: SizeRule | None = None,
    mode: Literal["uniform", "keyframes"] = "uniform",
    on_progress: Callable[[int, int], None] | None = None,
    span: tuple[float, float] | None = None,
) -> Clip:
    """Sample and resize frames of a video, or of a span of it: (start, end) in seconds, cut off at the video's end.

    mode: "uniform" takes `sample_indices`; "keyframes" takes keyframes only, at most max_frames, evenly spread: a quick
        look that decodes nothing else. size: the frames' size from their number and the displayed size; None keeps it.
    on_progress: called with (frames decoded, frames wanted).
    Raises MediaError if the file is no video, the span is not in it, or none of the wanted frames can be decoded.
    """
    if not (fps > 0 and max_frames > 0):
        raise MediaError(f"{path} cannot be sampled at {fps} frames per second and at most {max_frames}; ask for more.")
    survey = _survey(readable_file(path))
    index, keyframes_only = survey.index, mode == "keyframes"
    # An unseekable stream's frames are only known after decoding: if there were fewer than packets, sample those again.
    frames = index.frames
    while True:
        first, last = (0, frames - 1) if span is None else index.frames_in(*checked_span(span, index.seconds, path))
        last = max(min(last, frames - 1), 0)
        first = min(first, last)
        keyframes = index.keyframes[(first <= index.keyframes) & (index.keyframes <= last)]
        if keyframes_only and len(keyframes):
            evenly = np.linspace(0, len(keyframes) - 1, min(len(keyframes), max_frames))
            wanted = keyframes[evenly.round().astype(np.int64)]
        else:
            wanted = first + sample_indices(
                last + 1 - first, index.fps, fps=fps, min_frames=min_frames, max_frames=max_frames
            )
        clip, decoded = _decode_wanted(survey, wanted, size, keyframes_only, on_progress)
        if index.seekable or keyframes_only or decoded in (0, frames) or len(clip.indices) == len(wanted):
            break
        frames = decoded
    if not clip.indices:
        raise MediaError(f"{path} is damaged: none of its frames could be decoded; copy or download it again.")
    return clip


def decode_at(path: str | Path, times: Sequence[float], *, size: SizeRule | None = None) -> Clip:
    """The frames that are on the screen at the times, in seconds, ascending; as `decode`."""
    survey = _survey(readable_file(path))
    wanted = sorted({min(survey.index.frames_in(time, time)[0], survey.index.frames - 1) for time in times})
    clip, _ = _decode_wanted(survey, np.array(wanted, np.int64), size, False, None)
    if not clip.indices:
        raise MediaError(f"{path} is damaged: none of its frames could be decoded; copy or download it again.")
    return clip


def checked_span(span: tuple[float, float] | None, seconds: float, path: str | Path) -> tuple[float, float]:
    """`span` cut off at the end of a video of that many seconds, the whole for None; MediaError for one outside it."""
    if span is None:
        return 0.0, seconds
    start, end = float(span[0]), float(span[1])
    if not 0 <= start < end:
        raise MediaError(f"{start:g} to {end:g} s is no span; give a start of at least 0 and an end after it.")
    if start >= seconds:
        raise MediaError(f"{path} lasts {seconds:.1f} s, so it has nothing from {start:g} to {end:g} s; ask for less.")
    return start, min(end, seconds)


def _decode_wanted(
    survey: _Survey,
    wanted: np.ndarray,
    size: SizeRule | None,
    keyframes_only: bool,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[Clip, int]:
    """The clip of the frames `wanted`, and how many frames of the video were met on the way."""
    info, index = survey.info, survey.index
    height, width = size(len(wanted), info.height, info.width) if size else (info.height, info.width)
    rows = {int(number): row for row, number in enumerate(wanted)}
    try:
        pictures = np.empty((len(wanted), height, width, 3), dtype=np.uint8)
    except MemoryError:
        raise MediaError(
            f"{info.path}: {len(wanted)} frames of {width}x{height} do not fit in memory; sample fewer or smaller ones."
        ) from None
    found = np.zeros(len(wanted), dtype=bool)
    met = 0

    def make_converter() -> Callable[[VideoFrame], np.ndarray]:
        return converter(survey.orientation, height, width)

    results: Iterator[tuple[int, np.ndarray | None]]
    if index.seekable:
        results = read_frames(Path(info.path), index, wanted, make_converter, survey.frame_bytes)
    else:
        results = read_frames_in_order(Path(info.path), index, wanted, make_converter(), keyframes_only=keyframes_only)
    try:
        for number, picture in results:
            met += 1
            if picture is None:
                continue
            pictures[rows[number]] = picture
            found[rows[number]] = True
            if on_progress is not None:
                on_progress(int(found.sum()), len(wanted))
    except (av.FFmpegError, ValueError) as error:
        raise MediaError(
            f"{info.path} has frames that cannot be converted to RGB ({error}); convert it to H.264."
        ) from None

    warnings = []
    if index.cut_off:
        whole = f" of {index.declared_seconds:.1f} s" if index.declared_seconds else ""
        warnings.append(f"{info.path} is cut off: {index.seconds:.1f} s{whole} could be decoded.")
    if not found.all():
        missing = int((~found).sum())
        if index.seekable:
            warnings.append(f"{info.path} is damaged: {missing} of {len(wanted)} sampled frames could not be decoded.")
        pictures, wanted = pictures[found], wanted[found]
    indices = tuple(wanted.tolist())
    times = tuple(index.seconds_at(number) for number in indices)
    return Clip(pictures, times, indices, info, tuple(warnings)), met


def _survey(path: Path) -> _Survey:
    status = path.stat()
    return _read_survey(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _read_survey(path: Path, _modified: int, _size: int) -> _Survey:
    # Cached, because a prompt probes a file before it decodes it, and the index of a long film takes reading all of it.
    index = read_index(path)
    container, stream = open_video(path)
    with container:
        frame = _first_frame(container, stream, path)
        aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
        codec = stream.codec_context.name
    if not Fraction(1, MAX_PIXEL_ASPECT) <= aspect <= MAX_PIXEL_ASPECT:
        aspect = Fraction(1)
    orientation = Orientation.of(frame)
    width, height = max(1, round(frame.width * aspect)), frame.height
    if orientation.swap_axes:
        width, height = height, width
    info = VideoInfo(
        path=str(path),
        width=width,
        height=height,
        duration=index.seconds,
        frames=index.frames,
        fps=index.fps,
        codec=codec,
        rotation=orientation.degrees,
        stored_width=frame.width,
        stored_height=frame.height,
        dynamic_range=dynamic_range(frame),
    )
    frame_bytes = sum(plane.buffer_size for plane in frame.planes)
    return _Survey(info, index, orientation, frame_bytes)


def _first_frame(container: InputContainer, stream: VideoStream, path: Path) -> VideoFrame:
    with suppress(*DAMAGE):
        for packet in container.demux(stream):
            with suppress(*DAMAGE):
                for frame in stream.codec_context.decode(packet if packet.size else None):
                    return frame
    raise MediaError(f"{path} is damaged: none of its frames could be decoded; copy or download it again.")
