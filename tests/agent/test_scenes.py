"""Shots: cuts are found where the films have them, and the spans cover a video without a gap; scenes of shots."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from agent.scenes import scenes
from agent.spans import Span
from ivcore.errors import BackendError, MediaError
from ivcore.video import decode, probe
from train.toyworld.compose import make_script
from train.toyworld.render import write_clip as write_film

scenedetect = pytest.importorskip("scenedetect")

MakeClip = Callable[..., Path]


def shots(path: Path, span: Span | None = None) -> list[Span]:
    """Those of all scenes, in order."""
    return [shot for scene in scenes(path, span) for shot in scene]


def two_colours(index: int, width: int, height: int) -> np.ndarray:
    """Red, from the eighth frame on blue."""
    return np.full((height, width, 3), (200, 30, 30) if index < 8 else (20, 60, 220), np.uint8)


def assert_covers(found: list[Span], start: float, end: float) -> None:
    assert (found[0][0], found[-1][1]) == (start, end)
    assert all(first < after for first, after in found)
    assert all(one[1] == other[0] for one, other in pairwise(found))


def test_the_cut_of_a_real_clip_is_found(shared_dir: Path) -> None:
    assert shots(shared_dir / "videos/dog.mp4") == [(0.0, 5.0), (5.0, 8.0)]
    assert shots(shared_dir / "videos/dog.mp4", (4.9, 6.0)) == [(4.9, 5.0), (5.0, 6.0)]


def test_two_shots_of_one_yard_are_a_scene(shared_dir: Path) -> None:
    assert scenes(shared_dir / "videos/dog.mp4") == [[(0.0, 5.0), (5.0, 8.0)]]


def test_the_sides_of_a_conversation_are_a_scene_and_what_follows_is_another(make_clip: MakeClip) -> None:
    red, blue, green = (200, 30, 30), (20, 60, 220), (30, 200, 60)
    order = (red, blue, red, blue, green)

    def sides(index: int, width: int, height: int) -> np.ndarray:
        return np.full((height, width, 3), order[index // 10], np.uint8)

    path = make_clip(frames=50, picture=sides)
    assert [len(scene) for scene in scenes(path)] == [4, 1]
    assert shots(path) == [pytest.approx((float(second), second + 1.0)) for second in range(5)]
    assert [len(scene) for scene in scenes(path, (1.5, 5.0))] == [3, 1]  # what is outside of the span links nothing


def test_a_real_clip_of_one_shot_has_one(shared_dir: Path) -> None:
    assert shots(shared_dir / "videos/pool.mp4") == [(0.0, 10.0)]


@pytest.mark.parametrize("seed", [1, 3, 5, 7])
def test_the_shots_of_a_film_are_its_scenes(tmp_path: Path, seed: int) -> None:
    script = make_script(seed, "shape", 20.0)
    write_film(tmp_path / "film.mp4", script)
    assert shots(tmp_path / "film.mp4") == [pytest.approx(scene.span) for scene in script.scenes]


def test_cuts_are_those_of_pyscenedetects_own_pipeline(tmp_path: Path) -> None:
    write_film(tmp_path / "film.mp4", make_script(9, "order", 30.0))
    detector = scenedetect.ContentDetector(min_scene_len=0.6)
    video = scenedetect.open_video(str(tmp_path / "film.mp4"), backend="pyav", suppress_output=True)
    manager = scenedetect.SceneManager()
    manager.add_detector(detector)
    manager.detect_scenes(video)
    expected = [(float(start.seconds), float(end.seconds)) for start, end in manager.get_scene_list()]
    assert len(expected) > 2
    assert shots(tmp_path / "film.mp4") == [pytest.approx(span) for span in expected]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts", "clip.h264", "clip.avi"])
@pytest.mark.parametrize("start", [0.0, 7.3])
def test_a_cut_is_at_the_first_frame_after_it_wherever_the_container_starts(
    make_clip: MakeClip, name: str, start: float
) -> None:
    path = make_clip(name, picture=two_colours, frames=20, bframes=2 * (name != "clip.avi"), gop=6, start=start)
    found = shots(path)
    assert found == [pytest.approx((0.0, 0.8)), pytest.approx((0.8, 2.0))]
    assert_covers(found, 0.0, probe(path).duration)


def test_with_a_variable_frame_rate_a_cut_has_its_frames_own_time(make_clip: MakeClip) -> None:
    times = [0.0, 0.1, 0.5, 0.6, 1.4, 3.0, 3.1, 3.2, 3.37, 5.0]
    path = make_clip(times=times, frames=10, picture=two_colours)
    (_, cut), *_ = shots(path)
    assert cut == decode(path, fps=1000, max_frames=10).timestamps[8] == pytest.approx(3.37, abs=1e-3)


def test_a_cover_is_not_the_video(make_clip: MakeClip) -> None:
    assert shots(make_clip(cover=True, picture=two_colours, frames=20)) == [(0.0, 0.8), (0.8, 2.0)]


@pytest.mark.parametrize(
    ("span", "cuts"),
    [
        ((0.75, 1.5), [0.8]),
        ((0.8, 1.5), []),
        ((0.0, 0.8), []),
        ((0.0, 0.85), [0.8]),
        ((1.93, 1.94), []),
        ((0, 99), [0.8]),
    ],
)
def test_a_span_has_the_cuts_in_it(make_clip: MakeClip, span: Span, cuts: list[float]) -> None:
    path = make_clip(picture=two_colours, frames=20, gop=6, bframes=2)
    found = shots(path, span)
    assert_covers(found, span[0], min(span[1], 2.0))
    assert [start for start, _ in found[1:]] == pytest.approx(cuts)


def test_damaged_frames_do_not_end_the_search(make_clip: MakeClip) -> None:
    path = make_clip(frames=40, gop=5, fps=10, picture=lambda index, *size: two_colours(index // 4, *size))
    content = bytearray(path.read_bytes())
    content[len(content) // 8 : len(content) // 8 + 40] = bytes(40)
    path.write_bytes(content)
    assert 3.2 in [pytest.approx(start) for start, _ in shots(path)]


@pytest.mark.parametrize("size", [(2, 400), (400, 2)])
def test_extreme_sizes_have_shots(make_clip: MakeClip, size: tuple[int, int]) -> None:
    assert len(shots(make_clip(size=size, frames=20, picture=two_colours))) == 2


def test_progress_counts_the_frames(make_clip: MakeClip) -> None:
    seen: list[tuple[int, int]] = []
    scenes(make_clip(frames=20), (0.6, 1.0), on_progress=lambda *at: seen.append(at))
    assert seen == [(done, 10) for done in range(1, 11)]


@pytest.mark.parametrize("span", [(-1.0, 2.0), (2.0, 2.0), (2.0, 1.0), (float("nan"), 1.0), (3.0, 4.0)])
def test_a_span_outside_the_video_is_one_sentence(make_clip: MakeClip, span: Span) -> None:
    with pytest.raises(MediaError, match=r"^[^\n]*\.$"):
        shots(make_clip(), span)


def test_what_is_no_video_is_one_sentence(make_clip: MakeClip, tmp_path: Path) -> None:
    path = make_clip()
    path.unlink()
    with pytest.raises(MediaError, match=r"^There is no file .*; check the path\.$"):
        shots(path)
    with pytest.raises(MediaError, match="is a folder"):
        shots(tmp_path)
    path.write_text("This is a letter, not a film.\n" * 100)
    with pytest.raises(MediaError, match="is not a video"):
        shots(path)


def test_without_pyscenedetect_one_sentence_says_what_to_install(
    make_clip: MakeClip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scenedetect.common", None)
    with pytest.raises(BackendError, match=r"^Finding scenes needs PySceneDetect: run pip install 'ivmlx\[agent\]'\.$"):
        shots(make_clip())
