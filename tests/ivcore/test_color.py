from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ivcore.video import decode, probe

MakeClip = Callable[..., Path]
EVERY_FRAME = {"fps": 1000.0, "max_frames": 100_000}


def patches_of(colors: list[tuple[int, int, int]]) -> Callable[[int, int, int], np.ndarray]:
    def picture(index: int, width: int, height: int) -> np.ndarray:
        return np.repeat(np.repeat(np.array(colors, np.uint8), width // len(colors), axis=0)[None], height, axis=0)

    return picture


@pytest.mark.parametrize(
    ("tags", "luma", "expected"),
    [
        # (Y, Cb, Cr) of a saturated red in each system, from ITU-R BT.601/709/2020; range 1 is limited, 2 is full.
        ({}, (81, 90, 240), (255, 0, 0)),
        ({"colorspace": 1, "color_range": 1}, (63, 102, 240), (255, 0, 0)),
        ({"colorspace": 1, "color_range": 2}, (54, 99, 255), (255, 0, 0)),
        ({"colorspace": 5, "color_range": 2}, (76, 85, 255), (255, 0, 0)),
        ({"colorspace": 9, "color_range": 1}, (74, 97, 240), (255, 0, 0)),
    ],
)
def test_tagged_matrix_and_range_are_honoured(
    make_clip: MakeClip, tags: dict[str, int], luma: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    path = make_clip(frames=1, colors=tags, pixel_format="yuv444p", yuv=luma, options={"crf": "0"})
    np.testing.assert_allclose(decode(path, **EVERY_FRAME).frames[0, 24, 32].astype(int), expected, atol=3)


def test_ten_bit_video_has_the_colours_of_its_source(make_clip: MakeClip) -> None:
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)]
    picture = patches_of(colors)
    path = make_clip(frames=1, codec="libx265", pixel_format="yuv444p10le", picture=picture, options={"crf": "1"})
    np.testing.assert_allclose(decode(path, **EVERY_FRAME).frames[0, 24, 8::16].astype(int), colors, atol=8)


@pytest.mark.parametrize(
    ("transfer", "name", "signal", "nits"),
    [
        # Signal levels of ITU-R BT.2408, table 1, and of BT.2100's curves: HLG of 26 nits is 38 %, of 203 nits 75 %.
        (16, "PQ", 0.0, 0.0),
        (16, "PQ", 0.38, 26.0),
        (16, "PQ", 0.4403, 50.0),
        (18, "HLG", 0.38, 26.0),
    ],
)
def test_hdr_grays_below_the_knee_keep_their_light(
    make_clip: MakeClip, transfer: int, name: str, signal: float, nits: float
) -> None:
    code = round(64 + 876 * signal)
    tags = {"color_trc": transfer, "colorspace": 9, "color_primaries": 9, "color_range": 1}
    path = make_clip(frames=1, codec="libx265", pixel_format="yuv420p10le", colors=tags, yuv=(code, 512, 512))
    assert probe(path).dynamic_range == name
    expected = 255 * (nits / 203) ** (1 / 2.4)
    np.testing.assert_allclose(decode(path, **EVERY_FRAME).frames[0].mean(axis=(0, 1)), expected, atol=4)


def test_hdr_highlights_rise_to_white_and_do_not_clip_early(make_clip: MakeClip) -> None:
    tags = {"color_trc": 16, "colorspace": 9, "color_primaries": 9, "color_range": 1}
    levels = []
    for signal in (0.508, 0.581, 0.65, 0.70, 0.7518):  # 100, 203, about 390, 620 and 1000 nits
        code = round(64 + 876 * signal)
        path = make_clip(frames=1, codec="libx265", pixel_format="yuv420p10le", colors=tags, yuv=(code, 512, 512))
        levels.append(decode(path, **EVERY_FRAME).frames.mean())
    assert levels == sorted(set(levels)) and levels[-1] == 255
    assert 180 < levels[0] < 195 and 215 < levels[1] < 245


def test_hdr_colours_are_saturated_as_on_an_sdr_display(make_clip: MakeClip) -> None:
    # BT.709 red at 30 nits: BT.2087 gives its BT.2020 components; PQ codes by BT.2100, matrix by BT.2020.
    linear = 30 * np.array([0.6274, 0.0691, 0.0164]) / 10000
    power = linear**0.1593017578125
    red, green, blue = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    luma = 0.2627 * red + 0.6780 * green + 0.0593 * blue
    yuv = (64 + 876 * luma, 512 + 896 * (blue - luma) / 1.8814, 512 + 896 * (red - luma) / 1.4746)
    tags = {"color_trc": 16, "colorspace": 9, "color_primaries": 9, "color_range": 1}
    path = make_clip(frames=1, codec="libx265", pixel_format="yuv444p10le", colors=tags, yuv=tuple(map(round, yuv)))
    red, green, blue = decode(path, **EVERY_FRAME).frames[0].mean(axis=(0, 1))
    assert red == pytest.approx(255 * (30 / 203) ** (1 / 2.4), abs=5)
    assert green < 40 and blue < 40
