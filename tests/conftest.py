"""Fixtures every room's tests share: small clips written on the spot, and the reference data beside the clone."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

# Matrices this small are slower on several threads; set before torch or a BLAS is loaded, and for subprocesses as well.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# The same examples in every run, none of hypothesis's folders in the clone, and no failure for a machine that is busy.
settings.register_profile(
    "repeatable", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")
_hypothesis_home = tempfile.mkdtemp()
set_hypothesis_home_dir(_hypothesis_home)

MakeClip = Callable[..., Path]


def pytest_unconfigure() -> None:
    """Take hypothesis's folder away."""
    shutil.rmtree(_hypothesis_home, ignore_errors=True)


def moving_picture(index: int, width: int, height: int) -> np.ndarray:
    """RGB uint8 (height, width, 3): a gradient with a bright block whose place and colours are its frame's own."""
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 // width, y * 255 // height, (x + y + 9 * index) % 256], axis=-1).astype(np.uint8)
    left, top = (7 * index) % max(width - 8, 1), (5 * index) % max(height - 8, 1)
    base[top : top + 8, left : left + 8] = (255, (40 * index) % 256, 255 - (40 * index) % 256)
    return base


def write_clip(
    path: Path,
    *,
    frames: int = 30,
    size: tuple[int, int] = (64, 48),
    fps: Fraction | int | str = 10,
    gop: int = 12,
    bframes: int = 0,
    open_gop: bool = False,
    rotation: float = 0,
    mirror: bool = False,
    sar: Fraction | None = None,
    times: Sequence[float] | None = None,
    start: float = 0.0,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    colors: dict[str, int] | None = None,
    audio: bool = False,
    cover: bool = False,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    picture: Callable[[int, int, int], np.ndarray] = moving_picture,
    yuv: tuple[int, int, int] | None = None,
) -> Path:
    """Write a video of `frames` pictures and return its path; the container follows the suffix.

    size: (width, height) as stored. fps: a number or a fraction like "30000/1001". gop: frames between keyframes.
    times: seconds of each frame, for a variable frame rate. start: seconds added to every timestamp. rotation: degrees
    counterclockwise that a player turns the picture, after `mirror` swaps left and right. sar: a pixel's width/height.
    pixel_format: "yuv420p10le" for 10 bits. colors: attributes of the codec context, such as {"color_trc": 16}.
    audio: add silence. cover: add an attached picture. options, container_options: FFmpeg's.
    picture: (index, width, height) -> RGB uint8. yuv: the stored (Y, Cb, Cr) of every pixel, instead of a picture.
    """
    width, height = size
    rate = Fraction(fps)
    with av.open(str(path), "w", options=container_options or {}) as container:
        art: Any = container.add_stream("mjpeg", rate=1) if cover else None
        if art is not None:
            art.width, art.height, art.pix_fmt = 32, 32, "yuvj420p"
            art.disposition = av.stream.Disposition.attached_pic
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        context = stream.codec_context
        context.time_base = Fraction(1, 1000) if times is not None else 1 / rate
        if codec == "libx264":
            extra = f"open-gop={int(open_gop)}:scenecut=0"
            stream.options = {"g": str(gop), "bf": str(bframes), "preset": "veryfast", "x264-params": extra}
        elif codec == "libx265":
            extra = f"keyint={gop}:bframes={bframes}:open-gop={int(open_gop)}:log-level=none:pools=1"
            stream.options = {"preset": "ultrafast", "x265-params": extra}
        stream.options = {**stream.options, **(options or {})}
        if sar is not None:
            context.sample_aspect_ratio = sar
        if rotation or mirror:
            stream.set_display_rotation(rotation, hflip=mirror)
        for name, value in (colors or {}).items():
            setattr(context, name, value)
        sound = container.add_stream("aac", rate=8000, layout="mono") if audio else None
        if art is not None:
            still = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 200, np.uint8), format="rgb24")
            container.mux(art.encode(still.reformat(format="yuvj420p")))
        if sound is not None:
            container.mux(sound.encode(_silence(round(8000 * frames / float(rate)))))
            container.mux(sound.encode(None))
        container.start_encoding()
        for index in range(frames):
            if yuv is None:
                image = av.VideoFrame.from_ndarray(picture(index, width, height), format="rgb24")
            else:
                image = _plain(width, height, pixel_format, yuv)
            image.time_base = context.time_base
            second = times[index] if times is not None else float(index / rate)
            image.pts = round((second + start) / float(context.time_base))
            container.mux(stream.encode(image))
        container.mux(stream.encode(None))
    return path


def _plain(width: int, height: int, pixel_format: str, yuv: tuple[int, int, int]) -> av.VideoFrame:
    image = av.VideoFrame(width, height, pixel_format)
    for plane, value in zip(image.planes, yuv, strict=True):
        sample = np.array([value], "<u2" if "10le" in pixel_format else "u1").tobytes()
        plane.update(sample * (plane.buffer_size // len(sample)))
    return image


def _silence(samples: int) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, max(samples, 1024)), np.float32), format="fltp", layout="mono")
    frame.sample_rate = 8000
    frame.pts = 0
    return frame


@pytest.fixture(scope="session", name="write_clip")
def write_clip_fixture() -> MakeClip:
    """The function `write_clip` itself: (path, **options)."""
    return write_clip


@pytest.fixture
def make_clip(tmp_path: Path) -> MakeClip:
    """Function (name="clip.mp4", **options of write_clip) that writes a clip into tmp_path and returns its path."""

    def make(name: str = "clip.mp4", **options: object) -> Path:
        return write_clip(tmp_path / name, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of reference data and real clips beside the clone; tests that need it are skipped without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "reference").is_dir():
        pytest.skip("needs the reference data in ../shared")
    return folder
