"""Small JPEGs of chosen moments of a video: the frame that was on the screen at each of them."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ivcore.video import decode_at

JPEG_QUALITY = 78
ROUNDING = 1e-3  # seconds by which a time may miss its frame's own, as a trace edited by hand has it


def thumbnails(path: str | Path, times: Sequence[float], side: int) -> dict[float, bytes]:
    """JPEGs by the times (seconds) that they were asked for, their longer side at most `side` pixels.

    A time after the end gets the last frame; a frame that cannot be decoded is left out.
    Raises MediaError if the file is no video or none of the frames can be decoded.
    """
    if not times:
        return {}

    def size(_frames: int, height: int, width: int) -> tuple[int, int]:
        scale = min(1.0, side / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    clip = decode_at(path, sorted({max(time, 0.0) + ROUNDING for time in times}), size=size)
    pictures = [_jpeg(Image.fromarray(frame)) for frame in clip.frames]
    # Where a frame is missing, the one before it is another moment's.
    longest = 2 / clip.info.fps if clip.warnings else float("inf")
    found = {}
    for time in times:
        place = bisect_right(clip.timestamps, max(time, 0.0) + ROUNDING) - 1
        if place >= 0 and (min(time, clip.info.duration) - clip.timestamps[place]) < longest:
            found[time] = pictures[place]
    return found


def _jpeg(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return stream.getvalue()
