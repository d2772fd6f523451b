"""Resizing rules and patches, against Hugging Face's processors where they are installed and against plain loops."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivcore.errors import ConfigError, MediaError
from ivcore.processor import ProcessorConfig
from ivcore.vision import Patches, smart_resize_image, smart_resize_video

REFERENCE = Path(__file__).resolve().parents[1] / "data" / "reference"

SIDES = st.integers(1, 3000)


def loop_rows(clip: np.ndarray, config: ProcessorConfig) -> np.ndarray:
    """The rows of one clip, each patch cut out and each value normalised by hand."""
    step, p, merge = config.temporal_patch_size, config.patch_size, config.merge_size
    clip = np.concatenate([clip, clip[-1:].repeat(-len(clip) % step, axis=0)])
    rows = []
    for time in range(0, len(clip), step):
        for block_y in range(0, clip.shape[1], p * merge):
            for block_x in range(0, clip.shape[2], p * merge):
                for y in range(block_y, block_y + p * merge, p):
                    for x in range(block_x, block_x + p * merge, p):
                        patch = clip[time : time + step, y : y + p, x : x + p].astype(np.float64) / 255
                        patch = (patch - config.image_mean) / config.image_std
                        rows.append(patch.transpose(3, 0, 1, 2).ravel())
    return np.array(rows)


@st.composite
def clips_and_config(draw: st.DrawFn) -> tuple[list[np.ndarray], ProcessorConfig]:
    config = ProcessorConfig(
        patch_size=draw(st.sampled_from([2, 3])),
        temporal_patch_size=draw(st.sampled_from([1, 2, 3])),
        merge_size=draw(st.sampled_from([1, 2, 3])),
        image_mean=(0.5, 0.25, 0.1),
        image_std=(0.5, 0.3, 0.2),
    )
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3))
    clips = [
        random.integers(0, 256, (frames, rows * config.factor, columns * config.factor, 3), dtype=np.uint8)
        for frames, rows, columns in shapes
    ]
    return clips, config


@settings(max_examples=60)
@given(clips_and_config(), st.data())
def test_any_slice_of_patches_is_the_slice_of_the_whole(case: tuple, data: st.DataObject) -> None:
    clips, config = case
    patches = Patches(clips, config)
    whole = np.concatenate([loop_rows(clip, config) for clip in clips])
    assert patches.shape == whole.shape
    assert len(patches) == patches.grid_thw.prod(axis=1).sum()
    bound = st.none() | st.integers(-len(whole) - 2, len(whole) + 2)
    rows = slice(data.draw(bound), data.draw(bound), data.draw(st.sampled_from([None, 1, 2, 7, -1, -3])))
    part = patches[rows]
    assert part.dtype == np.float32
    np.testing.assert_allclose(part, whole[rows], atol=1e-5)
    row = data.draw(st.integers(-len(whole), len(whole) - 1))
    np.testing.assert_allclose(patches[row], whole[row], atol=1e-5)


def test_patches_hold_the_uint8_frames_and_act_like_an_array() -> None:
    config = ProcessorConfig()
    clip = np.random.default_rng(0).integers(0, 256, (4, 64, 96, 3), dtype=np.uint8)
    patches = Patches([clip], config)
    whole = np.asarray(patches)
    assert patches.nbytes == clip.nbytes == whole.nbytes // 4
    assert patches.dtype == whole.dtype == np.float32
    assert np.abs(patches - whole).max() == 0
    assert np.abs(whole - patches).max() == 0
    assert np.asarray(patches, np.float64).dtype == np.float64
    with pytest.raises(IndexError):
        patches[len(patches)]


def test_an_image_fills_its_temporal_patch_with_itself() -> None:
    config = ProcessorConfig()
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    rows = np.asarray(Patches([image], config)).reshape(4, 3, 2, 16, 16)
    assert np.array_equal(rows[:, :, 0], rows[:, :, 1])


@pytest.mark.parametrize("name", ["smooth", "odd", "tiny"])
def test_clips_are_resized_as_the_reference_resizes_them(name: str) -> None:
    case = json.loads((REFERENCE / "processor" / "cases.json").read_text())[name]
    with np.load(REFERENCE / "processor" / f"{name}.npz") as expected:
        (_, grid_height, grid_width), frames = expected["video_grid_thw"][0], expected["frames"]
        n_frames = len(expected["frame_indices"])
    config = ProcessorConfig()
    if "size" in case:
        config = replace(
            config, video_min_pixels=case["size"]["shortest_edge"], video_max_pixels=case["size"]["longest_edge"]
        )
    size = smart_resize_video(n_frames, frames.shape[1], frames.shape[2], config)
    assert size == (grid_height * 16, grid_width * 16)


RANDOM_SIZES = [
    size
    for size in np.random.default_rng(1).integers([2, 1, 1], [80, 1500, 1500], (2000, 3)).tolist()
    if max(size[1:]) < 190 * min(size[1:])
]


def test_random_clips_are_resized_as_by_hugging_face() -> None:
    reference = pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl").smart_resize
    config = ProcessorConfig(video_max_pixels=2_000_000)
    for frames, height, width in RANDOM_SIZES:
        assert smart_resize_video(frames, height, width, config) == reference(
            frames, height, width, 2, 32, config.video_min_pixels, config.video_max_pixels
        )


def test_random_images_are_resized_as_by_hugging_face() -> None:
    pytest.importorskip("torchvision")  # its processor needs it
    reference = pytest.importorskip("transformers.models.qwen2_vl.image_processing_qwen2_vl").smart_resize
    config = ProcessorConfig(image_min_pixels=20_000, image_max_pixels=400_000)
    for _, height, width in RANDOM_SIZES:
        assert smart_resize_image(height, width, config) == reference(
            height, width, 32, config.image_min_pixels, config.image_max_pixels
        )


@settings(max_examples=300)
@given(SIDES, SIDES, st.integers(1, 900), st.integers(1, 400))
def test_a_cap_on_tokens_holds_for_every_size(height: int, width: int, frames: int, cap: int) -> None:
    config = ProcessorConfig()
    if max(height, width) > 150 * min(height, width):
        width = height
    image, video = (
        smart_resize_image(height, width, config, cap),
        smart_resize_video(frames, height, width, config, cap),
    )
    for size in (image, video):
        assert size[0] % 32 == size[1] % 32 == 0
        assert 1 <= size[0] * size[1] // 32**2 <= cap


def test_a_single_pixel_and_a_single_frame_can_be_used() -> None:
    assert smart_resize_image(1, 1, ProcessorConfig()) == (256, 256)  # 65,536 pixels
    assert smart_resize_video(1, 1, 1, ProcessorConfig()) == (64, 64)  # two frames of at least 4,096 / 2, on a 32 grid


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1)])
def test_a_picture_far_longer_than_wide_is_refused_in_one_sentence(size: tuple[int, int]) -> None:
    with pytest.raises(MediaError, match="at most 200 times"):
        smart_resize_image(*size, ProcessorConfig())
    with pytest.raises(MediaError, match="at most 200 times"):
        smart_resize_video(4, *size, ProcessorConfig())


def test_the_release_is_what_missing_processor_configs_mean(tmp_path: Path) -> None:
    config = ProcessorConfig.from_dir(tmp_path)
    assert (config.image_min_pixels, config.image_max_pixels) == (65_536, 16_777_216)
    assert (config.video_min_pixels, config.video_max_pixels) == (4_096, 25_165_824)
    assert (config.fps, config.min_frames, config.max_frames, config.factor) == (2, 4, 768, 32)


def test_the_combined_config_of_transformers_5_is_read(tmp_path: Path) -> None:
    combined = {"image_processor": {"merge_size": 2, "size": {"shortest_edge": 1024, "longest_edge": 4096}},
                "video_processor": {"merge_size": 2, "fps": 3, "max_frames": 9}}  # fmt: skip
    (tmp_path / "processor_config.json").write_text(json.dumps(combined))
    config = ProcessorConfig.from_dir(tmp_path)
    assert (config.image_min_pixels, config.image_max_pixels, config.fps, config.max_frames) == (1024, 4096, 3.0, 9)
    (tmp_path / "video_preprocessor_config.json").write_text('{"fps": 5}')
    assert ProcessorConfig.from_dir(tmp_path).fps == 5.0
    combined["image_processor"]["merge_size"] = 0
    (tmp_path / "processor_config.json").write_text(json.dumps(combined))
    with pytest.raises(ConfigError, match=r"processor_config\.json: merge_size"):
        ProcessorConfig.from_dir(tmp_path)


def test_a_checkpoint_s_processor_configs_are_read() -> None:
    config = ProcessorConfig.from_dir(REFERENCE / "iv3-micro")
    assert (config.image_min_pixels, config.image_max_pixels) == (4_096, 262_144)
    assert (config.video_min_pixels, config.video_max_pixels) == (4_096, 1_048_576)


@pytest.mark.parametrize(
    "content", [{"size": {"shortest_edge": 1000, "longest_edge": 9000}}, {"min_pixels": 1000, "max_pixels": 9000}]
)
def test_both_spellings_of_the_size_limits_are_read(tmp_path: Path, content: dict) -> None:
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(content))
    config = ProcessorConfig.from_dir(tmp_path)
    assert (config.video_min_pixels, config.video_max_pixels) == (1000, 9000)


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({"patch_size": "16"}, "patch_size is '16'"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"merge_size": True}, "merge_size is True"),
        ({"image_mean": 0.5}, "image_mean"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"size": 5}, "size is 5"),
        ({"size": {"shortest_edge": "a"}}, "size.shortest_edge is 'a'"),
        ({"size": {"shortest_edge": 900, "longest_edge": 100}}, "size"),
        ({"fps": -1}, "fps is -1"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"min_frames": 9, "max_frames": 8}, "min_frames is 9"),
        ({"max_frames": 2.5}, "max_frames is 2.5"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_file_and_field(tmp_path: Path, content: dict, field: str) -> None:
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"video_preprocessor_config\.json") as error:
        ProcessorConfig.from_dir(tmp_path)
    assert field in str(error.value)


def test_images_and_videos_must_be_cut_into_the_same_patches(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"patch_size": 14}')
    (tmp_path / "video_preprocessor_config.json").write_text('{"patch_size": 16}')
    with pytest.raises(ConfigError, match=r"patch_size is 16, but preprocessor_config\.json beside it says 14"):
        ProcessorConfig.from_dir(tmp_path)
