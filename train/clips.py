"""Decoded clips on disk, so that an epoch decodes nothing that an earlier one has: as frames, resized, before patches.

- `ClipCache.probe`, `.decode` and `.decode_at` take what those of `ivcore.video` take and give the same.
- A clip is known by its file (path, size, time of the last change), by how it was sampled, and by its frames' size,
  which is all that a processor adds. A checksum tells a damaged entry, which is decoded anew.
- Entries are written beside and renamed, so processes may share a folder. Beyond the limit the least recently used go;
  the time of an entry's last change is that of its last use.
- The bytes of all entries are counted in the lock's file, so that a write need not look at every other entry. The count
  may be too high, where an entry was written twice or removed; the folder is then looked through too early, no more.
- A cache never stops a run: what cannot be written, as on a full disk, is not kept.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ivcore.media import Mode
from ivcore.media_file import readable_file
from ivcore.video import Clip, SizeRule, VideoInfo, decode, decode_at, probe, sample_indices

FORMAT = 1
SUFFIX = ".clip"
ABANDONED_SECONDS = 3600.0
"""A file still being written this long after its last change was left by a process that is gone."""
SPARE = 1 / 16
"""Of the limit, what is free after entries had to go: else every write to a full cache would look through it."""
_NO_FRAMES = np.empty(0, np.uint8)


class ClipCache:
    """A folder of decoded clips of at most `limit` bytes. hits, misses: of this process's clips."""

    def __init__(self, folder: str | Path, limit: int) -> None:
        self.folder = Path(folder)
        self.limit = limit
        self.hits = self.misses = 0
        self._looked = False
        self.folder.mkdir(parents=True, exist_ok=True)

    def probe(self, path: str | Path) -> VideoInfo:
        """As `ivcore.video.probe`, which reads all packets of a file."""
        path = readable_file(path)
        entry = self._entry(path, ["info"])
        found = _read(entry)
        if found is not None:
            return VideoInfo(**found[0])
        info = probe(path)
        self._write(entry, asdict(info), b"")
        return info

    def decode(
        self,
        path: str | Path,
        *,
        fps: float = 2.0,
        min_frames: int = 4,
        max_frames: int = 768,
        size: SizeRule | None = None,
        mode: Mode = "uniform",
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Clip:
        """As `ivcore.video.decode`; keyframes are decoded every time."""
        sampling = {"fps": fps, "min_frames": min_frames, "max_frames": max_frames}

        def fresh() -> Clip:
            return decode(path, **sampling, size=size, mode=mode, on_progress=on_progress)  # type: ignore[arg-type]

        if mode != "uniform":
            return fresh()
        info = self.probe(path)
        count = len(sample_indices(info.frames, info.fps, fps=fps, min_frames=min_frames, max_frames=max_frames))
        height_width = size(count, info.height, info.width) if size else (info.height, info.width)
        entry = self._entry(path, [sampling, count, height_width])
        found = _read(entry)
        if found is not None:
            self.hits += 1
            return _to_clip(*found)
        self.misses += 1
        return self._keep(entry, fresh())

    def decode_at(self, path: str | Path, times: Sequence[float], *, size: SizeRule | None = None) -> Clip:
        """As `ivcore.video.decode_at`."""
        info = self.probe(path)
        height_width = size(len(times), info.height, info.width) if size else (info.height, info.width)
        entry = self._entry(path, [list(times), height_width])
        found = _read(entry)
        if found is not None:
            self.hits += 1
            return _to_clip(*found)
        self.misses += 1
        return self._keep(entry, decode_at(path, times, size=size))

    def _keep(self, entry: Path, clip: Clip) -> Clip:
        header = {**asdict(replace(clip, frames=_NO_FRAMES)), "frames": clip.frames.shape}
        self._write(entry, header, np.ascontiguousarray(clip.frames).data.cast("B"))
        return clip

    def _entry(self, path: str | Path, settings: list) -> Path:
        """Where the result of these settings is kept, for a file as it is now."""
        file = Path(path).resolve()
        status = file.stat()
        said = json.dumps([FORMAT, str(file), status.st_size, status.st_mtime_ns, *settings], sort_keys=True)
        return self.folder / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}{SUFFIX}"

    def _write(self, entry: Path, header: Mapping[str, Any], frames: bytes | memoryview) -> None:
        """Keep an entry: a CRC-32 of all that follows, the length of the JSON header, the header, the frames."""
        text = json.dumps(header).encode()
        head = len(text).to_bytes(4, "little") + text
        head = zlib.crc32(frames, zlib.crc32(head)).to_bytes(4, "little") + head
        if len(head) + len(frames) > self.limit:
            return
        part = None
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".part", delete=False) as stream:
                part = Path(stream.name)
                stream.write(head)
                stream.write(frames)
            os.replace(part, entry)
            self._count(len(head) + len(frames))
        except OSError:
            if part is not None:
                part.unlink(missing_ok=True)

    def _count(self, nbytes: int) -> None:
        """Add an entry to the count, and look through the folder where that is beyond the limit or not known."""
        with (self.folder / "lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            counted = lock.read().strip()
            total = int(counted) + nbytes if counted.isdecimal() and self._looked else self.limit + 1
            if total > self.limit:
                total, self._looked = self._shrink(), True
            lock.truncate(0)
            lock.write(str(total))

    def _shrink(self) -> int:
        """Remove what was left half-written and, beyond the limit, the least recently used entries; the bytes left."""
        entries = []
        for file in self.folder.iterdir():
            with suppress(FileNotFoundError):
                status = file.stat()
                if file.suffix == SUFFIX:
                    entries.append((status.st_mtime_ns, status.st_size, file))
                elif file.suffix == ".part" and time.time() - status.st_mtime > ABANDONED_SECONDS:
                    file.unlink()
        total = sum(nbytes for _, nbytes, _ in entries)
        most = self.limit if total <= self.limit else int((1 - SPARE) * self.limit)
        for _, nbytes, file in sorted(entries):
            if total <= most:
                break
            file.unlink(missing_ok=True)
            total -= nbytes
        return total


def _read(entry: Path) -> tuple[dict[str, Any], memoryview] | None:
    """An entry's header and frames, marked as used; None where there is none, or it is damaged and was removed."""
    try:
        content = memoryview(entry.read_bytes())
    except OSError:
        return None
    if len(content) < 8 or zlib.crc32(content[4:]) != int.from_bytes(content[:4], "little"):
        entry.unlink(missing_ok=True)
        return None
    with suppress(OSError):
        os.utime(entry)
    end = 8 + int.from_bytes(content[4:8], "little")
    return json.loads(bytes(content[8:end])), content[end:]


def _to_clip(header: Mapping[str, Any], frames: memoryview) -> Clip:
    return Clip(
        frames=np.frombuffer(frames, np.uint8).reshape(header["frames"]),
        timestamps=tuple(header["timestamps"]),
        indices=tuple(header["indices"]),
        info=VideoInfo(**header["info"]),
        warnings=tuple(header["warnings"]),
    )
