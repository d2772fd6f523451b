from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ivcore.errors import MediaError
from ivcore.video import Clip, decode, decode_at, probe, resize, sample_indices

MakeClip = Callable[..., Path]
EVERY_FRAME = {"fps": 1000.0, "max_frames": 100_000}


def sequential(path: Path) -> list[av.VideoFrame]:
    """Every frame, as PyAV gives them when a file is simply decoded."""
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def pictures(path: Path) -> np.ndarray:
    return np.stack([frame.to_ndarray(format="rgb24") for frame in sequential(path)])


def assert_frame_exact(clip: Clip, path: Path) -> None:
    whole = sequential(path)
    for frame, number, seconds in zip(clip.frames, clip.indices, clip.timestamps, strict=True):
        np.testing.assert_array_equal(frame, whole[number].to_ndarray(format="rgb24"))
        assert seconds == pytest.approx(float((whole[number].pts - whole[0].pts) * whole[number].time_base))


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    gop=st.integers(1, 20),
    bframes=st.integers(0, 4),
    open_gop=st.booleans(),
    fixed=st.booleans(),
    fps=st.sampled_from([5, 24, 30, Fraction(30000, 1001)]),
    suffix=st.sampled_from([".mp4", ".mkv", ".ts"]),
    wanted=st.integers(1, 40),
)
def test_sampled_frames_are_those_of_a_full_sequential_decode(
    write_clip: MakeClip,
    gop: int,
    bframes: int,
    open_gop: bool,
    fixed: bool,
    fps: Fraction,
    suffix: str,
    wanted: int,
) -> None:
    # Without adaptive placement every GOP is full of B-frames, leading ones of open GOPs included.
    options = {"b_strategy": "0", "b-pyramid": "normal"} if fixed else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip{suffix}"
        write_clip(path, frames=40, gop=gop, bframes=bframes, open_gop=open_gop, fps=fps, options=options)
        clip = decode(path, fps=1000, max_frames=wanted)
        assert clip.indices == tuple(np.linspace(0, 39, wanted).round().astype(int).tolist())
        assert_frame_exact(clip, path)
        assert clip.warnings == ()


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    start=st.floats(0, 7.9), length=st.floats(0.01, 9), fps=st.sampled_from([0.5, 2, 5, 30]), keyframes=st.booleans()
)
def test_a_span_gives_frames_that_are_on_the_screen_in_it(
    span_clip: Path, start: float, length: float, fps: float, keyframes: bool
) -> None:
    clip = decode(
        span_clip, fps=fps, span=(start, start + length), mode="keyframes" if keyframes else "uniform", min_frames=1
    )
    times, end = np.array(clip.timestamps), min(start + length, 8.0)
    assert_frame_exact(clip, span_clip)
    assert (times > start - 0.2).all() and (times < end).all()  # at five frames a second the first may be 0.2 s old
    if not keyframes:
        assert len(times) <= max(1, int((end - start + 0.4) * fps)) and times[0] == pytest.approx(start, abs=0.2)


def test_frames_are_found_again_by_their_times(span_clip: Path) -> None:
    clip = decode(span_clip, fps=2, span=(1.0, 7.3))
    again = decode_at(span_clip, clip.timestamps)
    assert again.indices == clip.indices and again.timestamps == clip.timestamps
    np.testing.assert_array_equal(again.frames, clip.frames)
    assert decode_at(span_clip, [7.99, 99.0]).indices == (39,)


def test_spans_outside_the_video_are_one_sentence(span_clip: Path) -> None:
    for span, message in (((9.0, 10.0), "lasts 8.0 s"), ((3.0, 2.0), "is no span"), ((-1.0, 2.0), "is no span")):
        with pytest.raises(MediaError, match=message):
            decode(span_clip, span=span)


@pytest.fixture(scope="module")
def span_clip(tmp_path_factory: pytest.TempPathFactory, write_clip: MakeClip) -> Path:
    path = tmp_path_factory.mktemp("span") / "clip.mp4"
    write_clip(path, frames=40, gop=8, fps=5)
    return path


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"),
    [
        ("a.mp4", "libx265", "yuv420p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.webm", "libvpx", "yuv420p"),
        ("a.gif", "gif", "rgb8"),
        ("a.ts", "mpeg2video", "yuv420p"),
        ("a.mov", "mjpeg", "yuvj420p"),
        ("a.h264", "libx264", "yuv420p"),
        ("a.mkv", "libsvtav1", "yuv420p"),
    ],
)
def test_other_codecs_and_containers_are_frame_exact_too(
    make_clip: MakeClip, name: str, codec: str, pixel_format: str
) -> None:
    options = {"bf": "2"} if codec in ("mpeg2video", "libx264") else {}
    # SVT-AV1, run by root, gives the thread that calls it a real-time priority for good, and so its children.
    with ThreadPoolExecutor(1) as thread:
        made = thread.submit(
            make_clip, name, codec=codec, pixel_format=pixel_format, frames=25, options=options, fps=25
        )
    path = made.result()
    whole = pictures(path)
    clip = decode(path, fps=1000, max_frames=7)
    assert clip.indices == (0, 4, 8, 12, 16, 20, 24)
    np.testing.assert_array_equal(clip.frames, whole[list(clip.indices)])
    np.testing.assert_allclose(clip.timestamps, [number / 25 for number in clip.indices], atol=0.006)
    assert probe(path).fps == 25
    assert clip.warnings == ()


@settings(max_examples=200)
@given(
    total=st.integers(1, 5000),
    video_fps=st.sampled_from([1.0, 5.0, 23.976, 30000 / 1001, 60.0]),
    fps=st.floats(0.1, 60),
    bounds=st.tuples(st.integers(1, 64), st.integers(1, 800)).map(sorted),
)
def test_sampled_indices_are_distinct_frames_from_the_first_to_the_last(
    total: int, video_fps: float, fps: float, bounds: list[int]
) -> None:
    indices = sample_indices(total, video_fps, fps=fps, min_frames=bounds[0], max_frames=bounds[1])
    assert min(bounds[0], total) <= len(indices) <= min(bounds[1], total)
    assert indices[0] == 0 and (np.diff(indices) > 0).all()
    assert len(indices) == 1 or indices[-1] == total - 1


def test_sampled_indices_are_those_of_the_hugging_face_processor() -> None:
    video_processing = pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl")
    utils = pytest.importorskip("transformers.video_utils")
    processor = video_processing.Qwen3VLVideoProcessor()
    for total, rate, fps in itertools.product([1, 3, 21, 40, 300, 4000], [5.0, 7.0, 29.97, 60.0], [0.5, 1.0, 2.0, 7.3]):
        metadata = utils.VideoMetadata(total_num_frames=total, fps=rate)
        expected = processor.sample_frames(metadata, fps=fps)
        np.testing.assert_array_equal(sample_indices(total, rate, fps=fps, min_frames=4, max_frames=768), expected)


@pytest.mark.parametrize("name", ["dog", "pool"])
def test_real_clips_match_the_hugging_face_processor(shared_dir: Path, name: str) -> None:
    case = json.loads((shared_dir / "reference/processor/cases.json").read_text())[name]
    expected = np.load(shared_dir / f"reference/processor/{name}.npz")
    steps, rows, columns = expected["video_grid_thw"].reshape(3).tolist()
    path = shared_dir / f"videos/{name}.mp4"
    clip = decode(path, fps=case["fps"], size=lambda *_: (rows * 16, columns * 16))
    assert clip.info.fps == case["video_fps"] and clip.info.frames == case["total_frames"]
    np.testing.assert_array_equal(clip.indices, expected["frame_indices"].reshape(-1))
    patches = expected["pixel_values_videos"].astype(np.float32) * 0.5 + 0.5
    # (T, H/32, W/32, 2, 2, C, 2, 16, 16): time, merge blocks, place in the block, channel, frame of the pair, patch
    patches = patches.reshape(steps, rows // 2, columns // 2, 2, 2, 3, 2, 16, 16)
    frames = patches.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(steps * 2, rows * 16, columns * 16, 3)
    error = np.abs(clip.frames / 255 - frames[: len(clip.frames)])
    assert error.max() <= 6 / 255
    assert (error <= 2 / 255).mean() >= 0.999


def test_resize_matches_torchs_antialiased_bicubic_on_uint8() -> None:
    functional = pytest.importorskip("torch.nn.functional")
    torch = pytest.importorskip("torch")
    frame = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    planes = torch.from_numpy(frame).permute(2, 0, 1)[None]
    for height, width in ((32, 64), (90, 40), (131, 200)):
        expected = functional.interpolate(planes, (height, width), mode="bicubic", antialias=True)
        error = resize(frame, height, width).astype(int) - expected[0].permute(1, 2, 0).numpy()
        assert np.abs(error).max() <= 1


def test_the_size_rule_sees_the_frame_count_and_the_displayed_size(make_clip: MakeClip) -> None:
    path = make_clip(frames=30, size=(64, 48), rotation=90, sar=Fraction(3, 2))
    seen = []

    def rule(frames: int, height: int, width: int) -> tuple[int, int]:
        seen.append((frames, height, width))
        return 32, 16

    clip = decode(path, fps=2, size=rule)
    assert seen == [(6, 96, 48)]
    assert clip.frames.shape == (6, 32, 16, 3) and clip.frames.dtype == np.uint8


def test_variable_frame_rate_keeps_the_frames_own_times(make_clip: MakeClip) -> None:
    times = [0.0, 0.1, 0.5, 0.6, 1.4, 3.0, 3.1, 3.2, 3.3, 5.0]
    path = make_clip(times=times, frames=10, bframes=2)
    clip = decode(path, **EVERY_FRAME)
    assert clip.indices == tuple(range(10))
    np.testing.assert_allclose(clip.timestamps, times, atol=1e-3)
    assert decode(path, min_frames=2, max_frames=2).timestamps == pytest.approx((0.0, 5.0))


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts"])
def test_times_count_from_the_first_frame_wherever_the_container_starts(make_clip: MakeClip, name: str) -> None:
    path = make_clip(name, start=7.3, fps=10, frames=20, bframes=2)
    clip = decode(path, **EVERY_FRAME)
    np.testing.assert_allclose(clip.timestamps, np.arange(20) / 10, atol=1e-3)
    assert probe(path).duration == pytest.approx(2.0)
    assert probe(path).fps == 10


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (-90, 3)])
def test_rotation_metadata_turns_the_picture(make_clip: MakeClip, degrees: int, turns: int) -> None:
    path = make_clip(rotation=degrees, frames=4)
    clip = decode(path, **EVERY_FRAME)
    np.testing.assert_array_equal(clip.frames, np.rot90(pictures(path), turns, axes=(1, 2)))
    assert probe(path).rotation == degrees % 360
    assert (probe(path).height, probe(path).width) == clip.frames.shape[1:3]


def test_a_mirror_in_the_display_matrix_is_applied(write_clip: MakeClip, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "selfie.mp4", frames=2, mirror=True)
    np.testing.assert_array_equal(decode(path, **EVERY_FRAME).frames, pictures(path)[:, :, ::-1])


def test_non_square_pixels_are_resampled_to_the_displayed_shape(make_clip: MakeClip) -> None:
    path = make_clip(size=(64, 48), sar=Fraction(4, 3), frames=3)
    info = probe(path)
    assert (info.width, info.height, info.stored_width, info.stored_height) == (85, 48, 64, 48)
    assert decode(path, **EVERY_FRAME).frames.shape == (3, 48, 85, 3)


def test_cover_art_is_not_the_video(make_clip: MakeClip) -> None:
    path = make_clip(cover=True, audio=True)
    info = probe(path)
    assert (info.codec, info.width, info.height, info.frames) == ("h264", 64, 48, 30)


def test_an_edit_list_hides_the_frames_it_cuts(make_clip: MakeClip) -> None:
    path = make_clip(frames=30, gop=30, bframes=2, fps=10)
    data = bytearray(path.read_bytes())
    entry = data.find(b"elst") + 12  # after version, flags and the number of entries: duration, media time, rate
    media_time = int.from_bytes(data[entry + 4 : entry + 8], "big")
    data[entry + 4 : entry + 8] = (media_time + 5 * 1024).to_bytes(4, "big")  # start five frames later
    path.write_bytes(data)
    whole = pictures(path)
    clip = decode(path, **EVERY_FRAME)
    assert len(whole) == 25
    np.testing.assert_array_equal(clip.frames, whole)
    assert clip.timestamps[:3] == pytest.approx((0.0, 0.1, 0.2))


def test_a_truncated_file_gives_what_decodes_and_says_how_much(make_clip: MakeClip) -> None:
    path = make_clip(frames=100, fps=10, gop=10, container_options={"movflags": "faststart"})
    whole = pictures(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 5])
    clip = decode(path, fps=2)
    assert clip.warnings == (f"{path} is cut off: {clip.info.duration:.1f} s of 10.0 s could be decoded.",)
    assert 2.0 < clip.info.duration < 6.0
    assert clip.indices[-1] == clip.info.frames - 1
    np.testing.assert_array_equal(clip.frames, whole[list(clip.indices)])


def test_a_truncated_matroska_file_is_noticed_too(make_clip: MakeClip) -> None:
    path = make_clip("clip.mkv", frames=100, fps=10, gop=10)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 5])
    (warning,) = decode(path, fps=2).warnings
    assert warning.startswith(f"{path} is cut off: ") and warning.endswith(" s of 10.0 s could be decoded.")


def test_damaged_frames_are_left_out_and_counted(make_clip: MakeClip) -> None:
    path = make_clip(frames=60, gop=10)
    whole = pictures(path)
    with av.open(str(path)) as container:
        spans = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for number in range(20, 24):
        position, size = spans[number]
        data[position : position + size] = os.urandom(size)
    path.write_bytes(data)
    clip = decode(path, **EVERY_FRAME)
    (warning,) = clip.warnings
    missing = 60 - len(clip.indices)
    assert warning == f"{path} is damaged: {missing} of 60 sampled frames could not be decoded."
    assert set(range(20)) | set(range(30, 60)) <= set(clip.indices)
    intact = [row for row, number in enumerate(clip.indices) if not 20 <= number < 30]
    np.testing.assert_array_equal(clip.frames[intact], whole[[clip.indices[row] for row in intact]])


def test_keyframe_mode_gives_keyframes_evenly_spread_with_their_times(make_clip: MakeClip) -> None:
    path = make_clip(frames=60, gop=6, bframes=2, fps=10)
    keys = [number for number, frame in enumerate(sequential(path)) if frame.key_frame]
    clip = decode(path, mode="keyframes")
    assert list(clip.indices) == keys
    assert_frame_exact(clip, path)
    few = decode(path, mode="keyframes", max_frames=4)
    assert len(few.indices) == 4 and set(few.indices) <= set(keys) and few.indices[::3] == (keys[0], keys[-1])


def test_keyframe_mode_works_where_nothing_has_a_timestamp(make_clip: MakeClip) -> None:
    path = make_clip("raw.h264", frames=30, gop=6, fps=10)
    clip = decode(path, mode="keyframes")
    assert clip.indices == (0, 6, 12, 18, 24)
    np.testing.assert_array_equal(clip.frames, pictures(path)[::6])
    assert clip.timestamps == pytest.approx((0.0, 0.6, 1.2, 1.8, 2.4))


def test_progress_counts_up_to_the_frames_wanted(make_clip: MakeClip) -> None:
    seen: list[tuple[int, int]] = []
    decode(make_clip(frames=30, gop=5), fps=5, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 15) for done in range(1, 16)]


def test_an_error_in_the_callers_code_comes_through(make_clip: MakeClip) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode(make_clip(frames=30, gop=5), on_progress=stop)


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1)])
def test_extreme_sizes_decode(make_clip: MakeClip, size: tuple[int, int]) -> None:
    path = make_clip("clip.mov", codec="png", pixel_format="rgb24", size=size, frames=4)
    assert (probe(path).width, probe(path).height) == size
    assert decode(path, size=lambda *_: (32, 32)).frames.shape == (4, 32, 32, 3)


def test_a_single_frame_is_a_video_too(make_clip: MakeClip) -> None:
    clip = decode(make_clip(frames=1))
    assert clip.indices == (0,) and clip.timestamps == (0.0,)


def bad_file(folder: Path, kind: str, make_clip: MakeClip) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("This is a letter, not a film.\n" * 100)
    elif kind == "headless":
        make_clip("headless.mp4")
        path.write_bytes(path.read_bytes()[:1500])
    elif kind == "zero-length":
        make_clip("zero-length.mp4", frames=0)
    elif kind == "audio":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    elif kind == "pipe":
        os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "There is no file {}; check the path."),
        ("folder", "{} is a folder; give a video or an image file inside it."),
        ("empty", "{} is empty (0 bytes); copy or download it again."),
        ("pipe", "{} is not a regular file; save it to disk first."),
        (
            "text",
            "{} is not a video that FFmpeg can read (damaged, cut off before its header, or another kind of file);"
            " check that it plays, or download it again.",
        ),
        (
            "headless",
            "{} is not a video that FFmpeg can read (damaged, cut off before its header, or another kind of file);"
            " check that it plays, or download it again.",
        ),
        ("zero-length", "{} holds no video frames; record or export it again."),
        ("audio", "{} has no video in it, only audio; give a file with a video stream."),
    ],
)
def test_bad_files_are_one_sentence(
    tmp_path: Path, make_clip: MakeClip, capfd: pytest.CaptureFixture[str], kind: str, says: str
) -> None:
    if kind == "pipe" and not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    path = bad_file(tmp_path, kind, make_clip)
    capfd.readouterr()
    for job in (probe, decode):
        with pytest.raises(MediaError) as caught:
            job(path)
        assert str(caught.value) == says.format(path)
    assert capfd.readouterr() == ("", "")


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_damage_ends_in_a_clip_or_in_a_sentence(write_clip: MakeClip, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / data.draw(st.sampled_from(["clip.mp4", "clip.mkv", "clip.ts", "clip.avi", "clip.h264"]))
        write_clip(path, frames=12, gop=5, bframes=1, size=(32, 32))
        content = bytearray(path.read_bytes())
        # A muxer's random ids make the file's length vary from run to run, so what is drawn must not depend on it.
        anywhere = st.integers(0, (1 << 16) - 1)
        for _ in range(data.draw(st.integers(1, 12))):
            content[data.draw(anywhere) % len(content)] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: 1 + data.draw(anywhere) % len(content)])
        try:
            clip = decode(path, size=lambda *_: (16, 16))
        except MediaError as error:
            assert str(error).count(str(path)) == 1
        else:
            assert len(clip.frames) == len(clip.timestamps) == len(clip.indices) > 0
