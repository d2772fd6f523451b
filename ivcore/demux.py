"""The packet index: every frame's time and the keyframes of a video, found by demuxing alone, without decoding.

- A frame is known by its presentation timestamp (pts), so seeking is verified instead of trusted.
- Packets that an edit list discards, and those that no keyframe precedes, are no frames.
- A stream whose pts are missing, repeated or jump back is marked unseekable: its frames are counted by decoding.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.stream import Discard, Disposition
from av.video.stream import VideoStream

from ivcore.errors import MediaError

# VP8's invisible reference frames are packets of their own, so its packets are not its frames.
UNCOUNTABLE_CODECS = frozenset({"vp8"})
# What PyAV raises for damaged data; the last two where a header contradicts itself.
DAMAGE = (av.FFmpegError, EOFError, ValueError, IndexError)
# The deepest reordering H.264 and HEVC allow is 16 frames; a packet further from its place in time has a broken pts.
MAX_REORDER = 64
ROUNDING = 1e-4  # seconds by which a time computed from a frame's number may miss the frame's own


@dataclass(frozen=True)
class PacketIndex:
    """What demuxing tells of one video stream.

    packet_pts: int64 (P,), all packets in decoding order; key_positions: where the keyframes stand among them.
    frame_pts: int64 (N,), ascending; frame_positions: int64 (N,), where each frame's packet stands in decoding order.
    keyframes: int64 (K,), frame numbers of the keyframes, ascending; an edit list may hide some of key_positions.
    seconds: from the first frame's start to the last one's end; declared_seconds: the same as the header states it, or
        None. cut_off: the file ends before the frames that its header promises.
    fps: frames per second, on average. When unseekable, the four arrays of pts and positions are empty.
    """

    frames: int
    packet_pts: np.ndarray
    key_positions: np.ndarray
    frame_pts: np.ndarray
    frame_positions: np.ndarray
    keyframes: np.ndarray
    time_base: Fraction
    fps: float
    seconds: float
    declared_seconds: float | None
    cut_off: bool
    seekable: bool

    def seconds_at(self, frame: int) -> float:
        """When a frame is shown, in seconds since the first frame."""
        if not self.seekable:
            return frame / self.fps
        return float(int(self.frame_pts[frame] - self.frame_pts[0]) * self.time_base)

    def frames_in(self, start: float, end: float) -> tuple[int, int]:
        """The frame on the screen at `start` and the last one that is shown before `end`, both in seconds."""
        if self.seekable:
            times = (self.frame_pts - self.frame_pts[0]) * float(self.time_base)
            first = int(np.searchsorted(times, start + ROUNDING, side="right")) - 1
            after = int(np.searchsorted(times, end - ROUNDING))
        else:
            first, after = int((start + ROUNDING) * self.fps), math.ceil((end - ROUNDING) * self.fps)
        return first, max(after - 1, first)

    def entry_key(self, frame: int) -> int:
        """The keyframe (an index into `key_positions`) from which decoding reaches `frame` exactly.

        It is the last one that comes no later than the frame in decoding order and in time: a leading picture of an
        open GOP is decoded after a keyframe but refers to pictures before it.
        """
        key = int(np.searchsorted(self.key_positions, self.frame_positions[frame], side="right")) - 1
        while key > 0 and self.packet_pts[self.key_positions[key]] > self.frame_pts[frame]:
            key -= 1
        return key


def open_video(path: Path) -> tuple[InputContainer, VideoStream]:
    """The container and its main video stream, every other stream switched off; MediaError if there is none."""
    try:
        # The explicit protocol keeps a name like "a:b.mp4" a file and forbids a playlist to reach the network.
        container = av.open(f"file:{path}", metadata_errors="ignore", options={"protocol_whitelist": "file"})
    except (*DAMAGE, OSError):
        raise MediaError(
            f"{path} is not a video that FFmpeg can read (damaged, cut off before its header, or another kind of file);"
            " check that it plays, or download it again."
        ) from None
    try:
        stream = _main_stream(container, path)
    except MediaError:
        container.close()
        raise
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all
    return container, stream


def _main_stream(container: InputContainer, path: Path) -> VideoStream:
    covers = Disposition.attached_pic | Disposition.timed_thumbnails
    videos = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not videos and container.streams.audio:
        raise MediaError(f"{path} has no video in it, only audio; give a file with a video stream.")
    if not videos:
        raise MediaError(f"{path} holds no video frames; record or export it again.")
    stream = next((video for video in videos if video.disposition & Disposition.default), videos[0])
    if stream.codec_context is None:
        raise MediaError(f"{path} uses a video codec that this FFmpeg cannot decode; convert it to H.264.")
    return stream


def read_index(path: Path) -> PacketIndex:
    """Index `path` by reading all packets of its main video stream; MediaError if it holds no frame."""
    container, stream = open_video(path)
    pts: list[int | None] = []
    sizes: list[int] = []
    keys: list[bool] = []
    usable: list[bool] = []
    last_duration = 0
    with container:
        with suppress(*DAMAGE):  # what was read before the damage counts
            for packet in container.demux(stream):
                if packet.size == 0:
                    continue
                pts.append(packet.pts)
                sizes.append(packet.size)
                keys.append(packet.is_keyframe)
                usable.append(not (packet.is_discard or packet.is_corrupt))
                last_duration = packet.duration or last_duration
        if not any(usable):
            raise MediaError(f"{path} holds no video frames; record or export it again.")
        rates = [stream.average_rate, stream.codec_context.framerate, stream.guessed_rate]
        if all(value is None for value in pts):
            del rates[0]  # without timestamps it is the demuxer's guess; the codec's own may be written
        nominal = float(next((rate for rate in rates if rate), Fraction(0)))
        time_base = stream.time_base or Fraction(1, 90000)
        promised = len(stream.index_entries)
        declared = _declared_seconds(container, stream)
        name = stream.codec_context.name

    is_key, is_usable = np.array(keys), np.array(usable)
    if not is_key.any():
        is_key[0] = True
    times = np.array([value for value in pts if value is not None], dtype=np.int64)
    seekable = name not in UNCOUNTABLE_CODECS and len(times) == len(pts) and _ordered(times)
    if not seekable:
        frames, fps = len(pts), nominal or 25.0
        return PacketIndex(
            frames=frames, keyframes=np.flatnonzero(is_key), time_base=time_base, fps=fps, seconds=frames / fps,
            packet_pts=times[:0], key_positions=times[:0], frame_pts=times[:0], frame_positions=times[:0],
            declared_seconds=declared, cut_off=False, seekable=False,
        )  # fmt: skip

    first_key = int(np.flatnonzero(is_key)[0])
    shown = is_usable & (np.arange(len(times)) >= first_key) & (times >= times[first_key])
    positions = np.flatnonzero(shown)
    if len(positions) == 0:
        raise MediaError(f"{path} holds no complete video frame; record or export it again.")
    positions = positions[np.argsort(times[positions], kind="stable")]
    frame_pts = times[positions]
    frames = len(positions)
    if last_duration <= 0 and frames > 1:
        last_duration = int(np.median(np.diff(frame_pts)))
    seconds = float((int(frame_pts[-1] - frame_pts[0]) + last_duration) * time_base)
    fps = frames / seconds if seconds > 0 else nominal or 1.0
    # A container that stores coarse times (Matroska: milliseconds) still states a constant rate exactly.
    if nominal and abs(frames / nominal - seconds) < 0.5 / nominal:
        fps, seconds = nominal, frames / nominal
    if promised >= len(pts):  # the header lists every packet (mp4)
        cut_off = promised > len(pts) or not usable[-1]
    else:
        cut_off = declared is not None and declared - seconds > max(0.2, 2 / fps)
    return PacketIndex(
        frames=frames, keyframes=np.flatnonzero(is_key[positions]), time_base=time_base, fps=fps, seconds=seconds,
        packet_pts=times, key_positions=np.flatnonzero(is_key), frame_pts=frame_pts, frame_positions=positions,
        declared_seconds=declared, cut_off=cut_off, seekable=True,
    )  # fmt: skip


def _ordered(pts: np.ndarray) -> bool:
    """Whether every pts is unique and near its place in decoding order."""
    order = np.argsort(pts, kind="stable")
    unique = bool((np.diff(pts[order]) > 0).all())
    return unique and bool((np.abs(order - np.arange(len(order))) <= MAX_REORDER).all())


def _declared_seconds(container: InputContainer, stream: VideoStream) -> float | None:
    """The stream's length according to the header; the container's where no other stream could be the longer one."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    tag = stream.metadata.get("DURATION", "")  # Matroska, "00:00:03.000000000"
    with suppress(ValueError):
        hours, minutes, seconds = tag.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    if container.duration and len(container.streams) == 1:
        return container.duration / av.time_base
    return None
