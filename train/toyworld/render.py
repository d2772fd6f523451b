"""Script -> pictures at any time, and a real mp4 of them.

Shapes are drawn by their signed distance: edges are one pixel soft wherever a centre lies. Clips are H.264 in 4:2:0, at
a quality where the shapes of 64x64 pictures stay what they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from train.toyworld.script import ROUNDING, SIZE, TICKS, Figure, Scene, Script
from train.toyworld.subtitles import TIME_BASE, packets
from train.toyworld.words import COLOURS

# x264: constant quality, a keyframe every two seconds and at cuts; one thread, so that a script makes the same bytes.
_ENCODER = {"crf": "12", "preset": "veryfast", "g": str(2 * TICKS), "bf": "0", "threads": "1"}
_CHUNK = 128  # frames drawn at once, whatever the clip's length


def frames(script: Script, times: np.ndarray, size: int = SIZE) -> np.ndarray:
    """uint8 (N, size, size, 3), RGB: the pictures at the times (N,) in seconds."""
    times = np.asarray(times, np.float64)
    ends = np.array([scene.span[1] for scene in script.scenes[:-1]])
    which = np.searchsorted(ends - ROUNDING, times, side="right")
    pictures = np.stack([_background(scene, size) for scene in script.scenes])[which]
    for figure in script.figures:
        start, end = figure.span
        seen = np.flatnonzero((start - ROUNDING <= times) & (times < end - ROUNDING))
        if len(seen):
            columns, rows = _reach(figure, size)
            part = pictures[seen, rows, columns]  # (n, h, w, 3)
            cover = _coverage(figure, times[seen], columns, rows, size / SIZE)[..., None]
            pictures[seen, rows, columns] = part + cover * (np.array(COLOURS[figure.name.colour], np.float32) - part)
    return np.rint(pictures).astype(np.uint8)


def write_clip(path: str | Path, script: Script, *, size: int = SIZE, subtitles: bool = True) -> None:
    """Write the script as an mp4 of TICKS frames a second; whole or not at all.

    subtitles: with the script's lines as a text track (mov_text). Memory does not grow with the clip's length.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        _encode(partial, script, size, subtitles)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _encode(path: Path, script: Script, size: int, subtitles: bool) -> None:
    times = script.frame_times()
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=Fraction(TICKS), options=_ENCODER)
        video.width = video.height = size
        video.pix_fmt = "yuv420p"
        if subtitles and script.lines:
            track = container.add_mux_stream("mov_text")
            track.time_base = TIME_BASE
            container.start_encoding()
            for packet in packets(script.lines):
                packet.stream = track
                container.mux(packet)
        for first in range(0, len(times), _CHUNK):
            for picture in frames(script, times[first : first + _CHUNK], size):
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))


def _background(scene: Scene, size: int) -> np.ndarray:
    """float32 (size, size, 3)."""
    ramp = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    top, bottom = np.array([scene.top, scene.bottom], np.float32)
    return np.repeat(top + ramp * (bottom - top), size, axis=1)


def _reach(figure: Figure, size: int) -> list[slice]:
    """The columns and the rows of pixels that the figure comes to touch."""
    path = np.array(figure.path)
    low, high = path.min(axis=0) - figure.radius - 1, path.max(axis=0) + figure.radius + 1
    edges = np.clip(np.stack([np.floor(low * size / SIZE), np.ceil(high * size / SIZE)]), 0, size).astype(int)
    return [slice(first, last) for first, last in edges.T.tolist()]


def _coverage(figure: Figure, times: np.ndarray, columns: slice, rows: slice, scale: float) -> np.ndarray:
    """float32 (N, rows, columns): the share of every pixel that the figure covers."""
    centre = figure.centre(times).astype(np.float32)[:, :, None, None] * scale  # (N, 2, 1, 1)
    x = np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5 - centre[:, 0]  # (N, 1, columns)
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + 0.5 - centre[:, 1]  # (N, rows, 1)
    return np.clip(0.5 - _DISTANCE[figure.name.shape](x, y, np.float32(figure.radius * scale)), 0, 1)


def _circle(x: np.ndarray, y: np.ndarray, radius: np.float32) -> np.ndarray:
    return np.hypot(x, y) - radius


def _square(x: np.ndarray, y: np.ndarray, radius: np.float32) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius


def _triangle(x: np.ndarray, y: np.ndarray, radius: np.float32) -> np.ndarray:
    # Its tip is at (0, -radius), its base 1.8 radii below and 2 radii wide.
    side = (1.8 * np.abs(x) - (y + radius)) / np.hypot(1.8, 1.0)
    return np.maximum(side, y - 0.8 * radius)


def _cross(x: np.ndarray, y: np.ndarray, radius: np.float32) -> np.ndarray:
    across, along = np.abs(x), np.abs(y)
    thin, far = 0.3 * radius, radius
    return np.minimum(np.maximum(across - thin, along - far), np.maximum(across - far, along - thin))


_DISTANCE: dict[str, Callable[[np.ndarray, np.ndarray, np.float32], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}
