"""Pictures and mp4 files: shapes have their areas and places, and what was drawn is what a decoder gives back."""

from __future__ import annotations

import math
import re
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from ivcore.video import decode
from train.toyworld import render
from train.toyworld.compose import make_script
from train.toyworld.questions import ask
from train.toyworld.render import frames, write_clip
from train.toyworld.script import Figure, Scene, Script
from train.toyworld.subtitles import write_srt
from train.toyworld.words import COLOURS, SHAPES, Name

# Areas in squared radii: pi; a side of 1.72; base 2 and height 1.8; two bars of 0.6 x 2 that share a square.
AREAS = {"circle": math.pi, "square": 1.72**2, "triangle": 1.8, "cross": 2 * 0.6 * 2 - 0.6**2}


def one_figure(shape: str, radius: float = 12.3, colour: str = "white") -> Script:
    """A figure on black that goes right for two seconds out of four."""
    figure = Figure(Name(colour, shape), "right", radius, (1.0, 3.0), ((20.3, 31.7), (43.1, 31.7)))
    return Script(0, "shape", 4.0, (Scene((0.0, 4.0), (0, 0, 0), (0, 0, 0)),), (figure,), (figure,), ())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("size", "tolerance"), [(64, 0.02), (160, 0.01)])
def test_a_shape_covers_its_area_wherever_it_is(shape: str, size: int, tolerance: float) -> None:
    pictures = frames(one_figure(shape), np.array([1.0, 1.37, 2.21, 2.99]), size)
    assert pictures.shape == (4, size, size, 3) and pictures.dtype == np.uint8
    covered = pictures[..., 0].sum(axis=(1, 2)) / COLOURS["white"][0]
    assert covered == pytest.approx(AREAS[shape] * (12.3 * size / 64) ** 2, rel=tolerance)


@pytest.mark.parametrize("time", [1.0, 1.55, 2.9])
def test_a_figure_is_where_its_path_says(time: float) -> None:
    script = one_figure("circle")
    weights = frames(script, np.array([time]))[0, :, :, 1].astype(float)
    y, x = np.mgrid[0:64, 0:64] + 0.5
    assert (x * weights).sum() / weights.sum() == pytest.approx(20.3 + (time - 1) / 2 * 22.8, abs=0.05)
    assert (y * weights).sum() / weights.sum() == pytest.approx(31.7, abs=0.05)


def test_a_figure_is_there_from_its_start_until_just_before_its_end() -> None:
    times = np.array([0.9, 1.0 - 1e-9, 1.0, 2.9, 3.0 - 1e-9, 3.0, 3.9])  # a decoder's seconds may be off by a rounding
    assert frames(one_figure("cross"), times).any(axis=(1, 2, 3)).tolist() == [
        False,
        True,
        True,
        True,
        False,
        False,
        False,
    ]


def test_a_frame_does_not_depend_on_those_drawn_with_it() -> None:
    script = make_script(3, "order", 16.0)
    times = np.array([15.3, 0.0, 7.7, 7.7, 2.04, 11.9])
    alone = np.concatenate([frames(script, np.array([time])) for time in times])
    np.testing.assert_array_equal(frames(script, times), alone)


def subsampled(picture: np.ndarray) -> np.ndarray:
    """The picture as 4:2:0 can hold it, before any compression."""
    return av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p").to_ndarray(format="rgb24")


@pytest.mark.parametrize("kind", ["colour", "count", "order"])
def test_an_mp4_shows_what_was_drawn_at_the_same_times(kind: str, tmp_path: Path) -> None:
    for seed in range(4):
        script = make_script(seed, kind)
        write_clip(tmp_path / "clip.mp4", script)
        clip = decode(tmp_path / "clip.mp4", fps=10)
        assert clip.info.fps == 10 and clip.info.duration == 4.0 and clip.info.codec == "h264"
        assert clip.frames.shape == (40, 64, 64, 3) and not clip.warnings
        np.testing.assert_allclose(clip.timestamps, script.frame_times(), atol=1e-6)
        drawn = np.stack([subsampled(picture) for picture in frames(script, script.frame_times())]).astype(int)
        difference = np.abs(clip.frames - drawn)
        assert difference.mean() < 2.5 and np.quantile(difference, 0.99) < 20
        for time, picture in zip(clip.timestamps, clip.frames, strict=True):
            for figure in script.visible_at(time):
                column, row = figure.centre(np.array([time]))[0].astype(int)
                distances = {
                    name: np.abs(picture[row, column].astype(int) - rgb).max() for name, rgb in COLOURS.items()
                }
                assert min(distances, key=distances.__getitem__) == figure.name.colour
                assert distances[figure.name.colour] < 16


def test_a_script_makes_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("one.mp4", "other.mp4"):
        write_clip(tmp_path / name, make_script(2, "said"))
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "other.mp4").read_bytes()


@pytest.mark.parametrize("duration", [4.0, 16.0])
def test_a_clip_carries_its_lines_as_a_subtitle_track(duration: float, tmp_path: Path) -> None:
    script = make_script(8, "said", duration)
    write_clip(tmp_path / "clip.mp4", script)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        packets = [packet for packet in container.demux(subtitles=0) if packet.size > 2]  # a gap is an empty text
        spans = [
            (float(packet.pts * packet.time_base), float(packet.duration * packet.time_base)) for packet in packets
        ]
        texts = [subtitle.dialogue.decode() for packet in packets for subtitle in packet.decode()]
    assert texts == [line.text for line in script.lines]
    np.testing.assert_allclose(
        [(start, start + length) for start, length in spans], [line.span for line in script.lines]
    )
    write_clip(tmp_path / "silent.mp4", script, subtitles=False)
    with av.open(str(tmp_path / "silent.mp4")) as container:
        assert not container.streams.subtitles


def test_a_sidecar_is_srt(tmp_path: Path) -> None:
    script = make_script(8, "said", 70.0)
    write_srt(tmp_path / "clip.srt", script.lines)
    with av.open(str(tmp_path / "clip.srt")) as container:
        packets = [packet for packet in container.demux(subtitles=0) if packet.size]
        found = [(float(packet.pts * packet.time_base), bytes(packet).decode()) for packet in packets]
    assert found == [(pytest.approx(line.span[0]), line.text) for line in script.lines]
    assert re.match(r"1\n00:00:0\d,\d00 --> 00:00:\d\d,\d00\n", (tmp_path / "clip.srt").read_text())


def test_cuts_change_the_picture_more_than_figures_that_come_and_go() -> None:
    """By the measure of PySceneDetect's ContentDetector: the mean change of hue (of 180), saturation and value."""
    for seed in range(2):
        script = make_script(seed, "rare", 60.0)
        pictures = frames(script, script.frame_times())
        hsv = np.stack([np.asarray(Image.fromarray(picture).convert("HSV")) for picture in pictures]).astype(float)
        change = np.abs(np.diff(hsv * (180 / 256, 1, 1), axis=0)).mean(axis=(1, 2, 3))
        cuts = [round(scene.span[0] * 10) - 1 for scene in script.scenes[1:]]
        assert change[cuts].min() > 36 > np.delete(change, cuts).max()


def test_memory_does_not_grow_with_the_length_of_a_clip(tmp_path: Path) -> None:
    def peak(duration: float) -> int:
        script = make_script(1, "rare", duration)
        tracemalloc.start()
        write_clip(tmp_path / "film.mp4", script)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    assert peak(100.0) < 1.3 * peak(20.0)


def test_a_clip_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip(tmp_path / "clip.mp4", make_script(0, "colour"))
    before = (tmp_path / "clip.mp4").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(render, "frames", fail)
    with pytest.raises(OSError, match="disk full"):
        write_clip(tmp_path / "clip.mp4", make_script(2, "colour"))
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"] and (tmp_path / "clip.mp4").read_bytes() == before


def test_a_ten_minute_film_is_a_real_video_with_its_event_in_it(tmp_path: Path) -> None:
    script = make_script(1, "rare", 600.0)
    write_clip(tmp_path / "film.mp4", script)
    assert (tmp_path / "film.mp4").stat().st_size < 2_000_000
    clip = decode(tmp_path / "film.mp4", fps=2, max_frames=768)
    assert clip.info.frames == 6000 and clip.info.duration == 600.0 and not clip.warnings
    span = ask(script).span
    assert span is not None
    shown = [index for index, time in enumerate(clip.timestamps) if span[0] <= time < span[1]]
    expected = frames(script, np.array(clip.timestamps)[shown]).astype(int)
    assert len(shown) >= 3 and np.abs(clip.frames[shown] - expected).mean() < 2
