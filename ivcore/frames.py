"""Decoding chosen frames of a video, exactly, and as little else as the codec allows.

- Frames are grouped by the keyframe they need; a group is decoded from there up to its last wanted frame.
- On the way, frames that no other frame refers to are skipped unless they are wanted themselves.
- Groups are shared out to workers, each with its own container and decoder: FFmpeg releases the GIL.
- Streams that cannot be seeked are decoded once, from the start, and their frames counted.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame

from ivcore.demux import DAMAGE, PacketIndex, open_video

Convert = Callable[[VideoFrame], np.ndarray]

# Codecs whose "non-reference" mark means that no frame refers to it. Not HEVC: there it holds within a temporal layer.
SKIPPABLE_CODECS = frozenset({"h264", "mpeg1video", "mpeg2video"})
MAX_WORKERS = 8
# A decoder holds up to about 20 frames (16 references and those being written); all workers together stay below this.
DECODER_BYTES = 1 << 30
FRAMES_PER_DECODER = 20
# Reading on is cheaper than seeking over fewer packets than this.
NEAR_PACKETS = 32


@dataclass(frozen=True)
class _Group:
    """Wanted frames (frame numbers) that are decoded together, from key number `key` of the index."""

    key: int
    frames: tuple[int, ...]


def read_frames(
    path: Path, index: PacketIndex, wanted: np.ndarray, converter: Callable[[], Convert], frame_bytes: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Decode the frames `wanted` of a seekable video; yields (frame number, converted frame) in any order.

    converter: makes a worker's own function from a decoded frame to an array. frame_bytes: bytes of a decoded frame.
    A frame that cannot be decoded cleanly is left out.
    """
    by_key: dict[int, list[int]] = {}
    for frame in wanted.tolist():
        by_key.setdefault(index.entry_key(frame), []).append(frame)
    groups: queue.SimpleQueue[_Group] = queue.SimpleQueue()
    for key, frames in by_key.items():
        groups.put(_Group(key, tuple(frames)))
    processors = _processors()
    fitting = max(1, DECODER_BYTES // (FRAMES_PER_DECODER * frame_bytes))
    workers = min(len(by_key), processors, MAX_WORKERS, fitting)
    threads = max(1, processors // workers)
    # Bounded, so that converted frames never pile up: the reader stores them as fast as they come.
    results: queue.Queue[tuple[int, np.ndarray] | BaseException | None] = queue.Queue(maxsize=4 * workers)
    stop = threading.Event()

    def work() -> None:
        try:
            convert = converter()
            with SeekingReader(path, index, threads) as reader:
                while not stop.is_set():
                    group = groups.get_nowait()
                    for number, frame in _decode_group(reader, index, group):
                        _put(results, (number, convert(frame)), stop)
                        if stop.is_set():
                            return
        except queue.Empty:
            pass
        except BaseException as error:  # handed to the caller's thread, which raises it
            _put(results, error, stop)
        finally:
            _put(results, None, stop)

    pool = [threading.Thread(target=work, name=f"decode-{n}", daemon=True) for n in range(workers)]
    for thread in pool:
        thread.start()
    try:
        while workers:
            result = results.get()
            if result is None:
                workers -= 1
            elif isinstance(result, BaseException):
                raise result
            else:
                yield result
    finally:
        stop.set()
        for thread in pool:
            thread.join()


def _put(results: queue.Queue, item: object, stop: threading.Event) -> None:
    while not stop.is_set():
        with suppress(queue.Full):
            results.put(item, timeout=0.1)
            return


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _decode_group(reader: SeekingReader, index: PacketIndex, group: _Group) -> Iterator[tuple[int, VideoFrame]]:
    """The group's frames; what does not come out clean is tried again from further back, skipping nothing."""
    missing = {int(index.frame_pts[frame]): frame for frame in group.frames}
    # With intra refresh the picture is only whole some "keyframes" later, so one keyframe back may not be enough.
    for back, skip in ((0, True), (1, False), (8, False)):
        if not missing:
            return
        start = int(index.key_positions[max(group.key - back, 0)])
        last = max(int(index.frame_positions[frame]) for frame in missing.values())
        for frame in reader.read(start, last, frozenset(missing), skip=skip):
            if frame.pts in missing and not frame.is_corrupt:
                yield missing.pop(frame.pts), frame


class SeekingReader:
    """One open container and decoder that reads runs of packets by their position in decoding order."""

    def __init__(self, path: Path, index: PacketIndex, threads: int) -> None:
        self._path, self._index, self._threads = path, index, threads
        self._order = np.argsort(index.packet_pts)
        self._sorted_pts = index.packet_pts[self._order]
        self._open()

    def _open(self) -> None:
        self._container, self._stream = open_video(self._path)
        self._context = self._stream.codec_context
        self._context.thread_count = self._threads
        self._context.thread_type = "AUTO" if self._threads > 1 else "NONE"
        self._can_skip = self._context.name in SKIPPABLE_CODECS
        self._restart()

    def _restart(self) -> None:
        self._packets = self._container.demux(self._stream)
        self._advance()

    def __enter__(self) -> SeekingReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def read(self, start: int, last: int, wanted: frozenset[int], *, skip: bool) -> Iterator[VideoFrame]:
        """Decode the packets from position `start` to `last`; yields at least the frames whose pts is wanted.

        skip: leave out unwanted frames that no other frame needs.
        """
        self._go_to(start)
        while self._packet is not None and self._position <= last:
            if self._can_skip:
                droppable = skip and self._packet.pts not in wanted
                self._context.skip_frame = "NONREF" if droppable else "DEFAULT"
            yield from self._decode(self._packet)
            self._advance()
        yield from self._decode(None)
        self._context.flush_buffers()

    def _decode(self, packet: Packet | None) -> list[VideoFrame]:
        try:
            return self._context.decode(packet)
        except DAMAGE:
            return []  # a damaged packet: the frames it should have given are reported missing

    def _advance(self) -> None:
        """Read the next packet with a known pts and find its position; None at the end of the file."""
        self._packet: Packet | None = None
        with suppress(*DAMAGE):
            for packet in self._packets:
                if packet.size == 0 or packet.pts is None:
                    continue
                place = int(np.searchsorted(self._sorted_pts, packet.pts))
                if place < len(self._order) and self._sorted_pts[place] == packet.pts:
                    self._packet, self._position = packet, int(self._order[place])
                    return

    def _go_to(self, start: int) -> None:
        """Make the packet at position `start` the next one, by reading on or by seeking."""
        if not (self._packet is not None and 0 <= start - self._position <= NEAR_PACKETS):
            self._seek(start)
        while self._packet is not None and self._position < start:
            self._advance()

    def _seek(self, start: int) -> None:
        # Containers search by pts, by dts or by byte, so a seek may land behind; then aim at earlier keyframes.
        keys = self._index.key_positions
        keys = keys[: np.searchsorted(keys, start, side="right")]
        for aim in self._index.packet_pts[keys][:-5:-1].tolist():
            try:
                self._container.seek(aim, stream=self._stream)
            except (*DAMAGE, OSError):
                break
            self._restart()
            if self._packet is not None and self._position <= start:
                return
        self._container.close()
        self._open()


def read_frames_in_order(
    path: Path, index: PacketIndex, wanted: np.ndarray, convert: Convert, *, keyframes_only: bool
) -> Iterator[tuple[int, np.ndarray | None]]:
    """Decode a video from its start; yields (frame number, converted frame, or None where it is not wanted).

    keyframes_only: decode and yield no other frames.
    """
    container, stream = open_video(path)
    chosen = frozenset(wanted.tolist())
    with container:
        context = stream.codec_context
        context.thread_type = "AUTO"
        if keyframes_only:
            context.skip_frame = "NONKEY"
        numbers = iter(index.keyframes.tolist()) if keyframes_only else itertools.count()
        for packet in _packets_then_flush(container.demux(stream)):
            frames: list[VideoFrame] = []
            with suppress(*DAMAGE):
                frames = context.decode(packet)
            for frame, number in zip(frames, numbers, strict=False):
                yield number, convert(frame) if number in chosen else None


def _packets_then_flush(packets: Iterator[Packet]) -> Iterator[Packet | None]:
    with suppress(*DAMAGE):
        for packet in packets:
            if packet.size:
                yield packet
    yield None
