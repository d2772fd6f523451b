"""Decoded frame -> upright uint8 RGB of the wanted size.

- SDR of any depth: swscale's RGB conversion with the matrix and range that the file is tagged with (untagged: BT.601,
  limited), which is what PyAV's `frame.to_ndarray(format="rgb24")` gives, then antialiased bicubic.
- HDR (PQ or HLG): resized in 16 bits, then light in cd/m2, the tone curve of ITU-R BT.2390 on the largest component,
  BT.2020 -> BT.709 primaries and the BT.1886 display curve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from av.buffer import Buffer
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, ColorTrc, VideoReformatter
from PIL import Image

DynamicRange = Literal["SDR", "PQ", "HLG"]

# SDR white of HDR programmes, ITU-R BT.2408: what becomes full white here is this bright there.
REFERENCE_WHITE_NITS = 203.0
# The peak that HDR programmes are graded for in practice, and HLG's nominal one (BT.2100).
PEAK_NITS = 1000.0
# BT.2020 -> BT.709 primaries, linear light, ITU-R BT.2087.
BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], dtype=np.float32
)
UNSPECIFIED = 2  # AVColorSpace's value for a file that does not say


@dataclass(frozen=True)
class Orientation:
    """How a stored frame becomes upright: first the axes swap, then the mirrors.

    From the 2x2 part of the display matrix, rounded to right angles (ISO/IEC 14496-12, 6.2.2).
    """

    swap_axes: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    @classmethod
    def of(cls, frame: VideoFrame) -> Orientation:
        """The orientation in the frame's display matrix; upright where it has none."""
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return cls()
        # x' = ax + cy, y' = bx + dy
        a, b, _, c, d = np.frombuffer(bytes(cast(Buffer, matrix)), dtype=np.int32)[:5].tolist()
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(True, c < 0, b < 0)
        return cls(False, a < 0, d < 0)

    @property
    def degrees(self) -> int:
        """The counterclockwise turn, leaving out a mirror image: 0, 90, 180 or 270."""
        if self.swap_axes:
            return 270 if self.mirror_x else 90
        return 180 if self.mirror_y else 0

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """`picture` (H, W, C) upright; a view."""
        if self.swap_axes:
            picture = picture.swapaxes(0, 1)
        if self.mirror_x:
            picture = picture[:, ::-1]
        if self.mirror_y:
            picture = picture[::-1]
        return picture


def resize(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """`frame` uint8 (H, W, 3) as uint8 (height, width, 3), by Pillow's antialiased bicubic.

    Within 1/255 of torchvision's antialiased bicubic on uint8, which the Hugging Face processors use.
    """
    if frame.shape[:2] == (height, width):
        return frame
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


def dynamic_range(frame: VideoFrame) -> DynamicRange:
    """What the frame's transfer characteristic says."""
    if frame.color_trc == ColorTrc.SMPTE2084:
        return "PQ"
    return "HLG" if frame.color_trc == ColorTrc.ARIB_STD_B67 else "SDR"


def converter(orientation: Orientation, height: int, width: int) -> Callable[[VideoFrame], np.ndarray]:
    """A function from a decoded frame to upright uint8 RGB (height, width, 3); for one thread only."""
    reformatter = VideoReformatter()
    stored = (width, height) if orientation.swap_axes else (height, width)

    def convert(frame: VideoFrame) -> np.ndarray:
        curve = dynamic_range(frame)
        if curve == "SDR":
            rgb = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
            return orientation.apply(resize(rgb, *stored))
        matrix = Colorspace.BT2020 if frame.colorspace == UNSPECIFIED else None
        deep = reformatter.reformat(frame, format="rgb48le", src_colorspace=matrix, threads=1).to_ndarray()
        return orientation.apply(tone_map(_resize_deep(deep, *stored), curve))

    return convert


def _resize_deep(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint16 (H, W, 3) -> float32 (height, width, 3) in 0..1, with the same filter as `resize`."""
    planes = [Image.fromarray(frame[..., channel].astype(np.float32)) for channel in range(3)]
    if frame.shape[:2] != (height, width):
        planes = [plane.resize((width, height), Image.Resampling.BICUBIC) for plane in planes]
    return np.clip(np.stack([np.asarray(plane) for plane in planes], axis=-1) / 65535, 0, 1)


def tone_map(signal: np.ndarray, curve: Literal["PQ", "HLG"]) -> np.ndarray:
    """HDR signal float32 (..., 3) in 0..1, BT.2020 primaries -> SDR uint8 (..., 3), BT.709 primaries.

    ITU-R BT.2100 for the light, BT.2390-10 section 5.4.1 for the tone curve, BT.1886 for the display.
    """
    nits = pq_to_nits(signal) if curve == "PQ" else hlg_to_nits(signal)
    brightest = np.maximum(nits.max(axis=-1, keepdims=True), 1e-4)
    light = nits * (_compress(brightest) / brightest) / REFERENCE_WHITE_NITS
    display = np.clip(light @ BT2020_TO_BT709.T, 0, 1) ** (1 / 2.4)
    return np.round(display * 255).astype(np.uint8)


# The constants of SMPTE ST 2084, as BT.2100 writes them.
_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32


def pq_to_nits(signal: np.ndarray) -> np.ndarray:
    """The PQ signal's light in cd/m2 (BT.2100, table 4)."""
    power = signal ** (1 / _M2)
    return 10000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)


def nits_to_pq(nits: np.ndarray) -> np.ndarray:
    """The inverse of `pq_to_nits`."""
    power = (nits / 10000) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2


def hlg_to_nits(signal: np.ndarray) -> np.ndarray:
    """The HLG signal's light in cd/m2 on a display of PEAK_NITS (BT.2100, table 5; system gamma 1.2)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    luminance = scene @ np.array([0.2627, 0.6780, 0.0593], dtype=np.float32)
    return PEAK_NITS * scene * np.maximum(luminance, 1e-6)[..., None] ** 0.2


def _compress(nits: np.ndarray) -> np.ndarray:
    """Bring 0..PEAK_NITS into 0..REFERENCE_WHITE_NITS by BT.2390's curve, which changes nothing below its knee."""
    peak = float(nits_to_pq(np.array(PEAK_NITS)))
    target = float(nits_to_pq(np.array(REFERENCE_WHITE_NITS))) / peak
    knee = 1.5 * target - 0.5
    level = np.minimum(nits_to_pq(nits) / peak, 1)
    t = np.maximum(level - knee, 0) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * target
    return pq_to_nits(np.where(level < knee, level, spline) * peak)
