"""Thumbnails: the frame on the screen at each time, upright, small, whatever the video is."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agent.thumbnails import thumbnails
from ivcore.errors import MediaError
from ivcore.video import decode

MakeClip = Callable[..., Path]


def opened(jpeg: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(jpeg))
    assert image.format == "JPEG"
    return np.asarray(image.convert("RGB"), np.float64)


@pytest.mark.parametrize(
    "options",
    [{}, {"bframes": 2, "open_gop": True}, {"rotation": 90}, {"name": "clip.mkv", "codec": "libvpx", "bframes": 0}],
    ids=["h264", "open gop", "rotated", "vp8, which cannot be seeked"],
)
def test_a_thumbnail_is_the_frame_on_the_screen_at_its_time(make_clip: MakeClip, options: dict[str, object]) -> None:
    path = make_clip(frames=30, fps=10, **options)
    clip = decode(path, fps=10.0)
    assert len(clip.timestamps) == 30
    found = thumbnails(path, [0.0, 0.05, 1.3, 1.39, 2.9, 99.0, -1.0], side=500)
    numbers = {0.0: 0, 0.05: 0, 1.3: 13, 1.39: 13, 2.9: 29, 99.0: 29, -1.0: 0}
    assert found.keys() == numbers.keys()
    for time, number in numbers.items():
        picture = opened(found[time])
        assert picture.shape == clip.frames.shape[1:]
        distances = [np.abs(picture - frame).mean() for frame in clip.frames]
        assert np.argmin(distances) == number


def test_a_thumbnail_is_small_and_keeps_its_shape(make_clip: MakeClip) -> None:
    path = make_clip(frames=3, size=(320, 160))
    assert opened(thumbnails(path, [0.0], side=100)[0.0]).shape == (50, 100, 3)
    assert opened(thumbnails(path, [0.0], side=1000)[0.0]).shape == (160, 320, 3)
    assert thumbnails(path, [], side=100) == {}


def test_a_file_that_is_no_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"not a film")
    for path in (tmp_path / "film.mp4", tmp_path / "none.mp4"):
        with pytest.raises(MediaError):
            thumbnails(path, [0.0], side=100)
