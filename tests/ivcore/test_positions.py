"""M-RoPE positions against the reference's numbers and against a plain walk over the tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivcore.errors import PromptError
from ivcore.positions import next_position, position_ids

REFERENCE = Path(__file__).resolve().parents[1] / "data" / "reference"
IMAGE, VIDEO, OPEN, CLOSE = 505, 506, 502, 503


def positions_of(token_ids: object, grid_thw: object, merge_size: int = 2, start: int = 0) -> np.ndarray:
    grid = None if grid_thw is None else np.array(grid_thw)
    return position_ids(
        np.array(token_ids), grid, image_token_id=IMAGE, video_token_id=VIDEO, merge_size=merge_size, start=start
    )


@pytest.mark.parametrize("name", ["iv3-micro", "qwen3vl-micro"])
def test_the_reference_s_positions_come_out(name: str) -> None:
    with np.load(REFERENCE / name / "expected.npz") as expected:
        grid = np.concatenate([expected["video_grid_thw"], expected["image_grid_thw"]])
        positions = positions_of(expected["input_ids"], grid)
        np.testing.assert_array_equal(positions, expected["position_ids"])
        assert next_position(positions) - len(expected["input_ids"]) == expected["rope_delta"]
    assert positions.dtype == np.int32


MEDIA = st.tuples(st.sampled_from(["image", "video"]), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))


@settings(max_examples=150)
@given(st.lists(st.one_of(st.integers(0, 5), MEDIA), max_size=6), st.sampled_from([1, 2, 3]), st.integers(0, 100))
def test_mixed_text_images_and_videos_follow_the_rule(parts: list, merge: int, start: int) -> None:
    ids: list[int] = []
    grids: list[tuple[int, int, int]] = []
    expected: list[tuple[int, int, int]] = []
    now = start

    def text(token: int) -> None:
        nonlocal now
        ids.append(token)
        expected.append((now, now, now))
        now += 1

    for part in parts:
        if isinstance(part, int):
            for _ in range(part):
                text(7)
            continue
        kind, frames, height, width = part
        frames = 1 if kind == "image" else frames
        grids.append((frames, height * merge, width * merge))
        for _ in range(frames):
            text(OPEN)
            for row in range(height):
                for column in range(width):
                    ids.append(IMAGE if kind == "image" else VIDEO)
                    expected.append((now, now + row, now + column))
            now += max(height, width)
            text(CLOSE)
    positions = positions_of(np.array(ids, np.int32), grids if grids else None, merge, start)
    np.testing.assert_array_equal(positions, np.array(expected, np.int32).reshape(-1, 3).T)
    assert next_position(positions) == (now if ids else 0)


def test_a_whole_context_of_video_is_placed() -> None:
    frame = [1, 2, OPEN, *[VIDEO] * 124, CLOSE]
    positions = positions_of(frame * 2048, [[2048, 8, 62]])
    assert positions.shape == (3, 262_144)
    assert next_position(positions) == 2048 * (4 + 31)


FRAME = [OPEN, VIDEO, VIDEO, CLOSE]


@pytest.mark.parametrize(
    ("ids", "grid", "message"),
    [
        (FRAME, None, "1 runs of visual placeholders but the 0 grids of its media have 0 frames"),
        ([1, 2], [[1, 2, 4]], "0 runs of visual placeholders but the 1 grids of its media have 1 frames"),
        (FRAME, [[2, 2, 4]], "1 runs of visual placeholders but the 1 grids of its media have 2 frames"),
        (
            FRAME + FRAME[:2],
            [[2, 2, 4]],
            "Run 2 of visual placeholders has 1 tokens but its medium's grid [2, 2, 4] needs 2",
        ),
        ([VIDEO, VIDEO, VIDEO, VIDEO], [[2, 2, 4]], "1 runs"),
        (
            [*FRAME, OPEN, IMAGE, IMAGE],
            [[2, 2, 4]],
            "Medium 1 with grid [2, 2, 4] has image and video placeholders mixed",
        ),
        ([IMAGE, 1, IMAGE], [[2, 2, 2]], "several frames but its placeholders are an image's"),
        (FRAME, [[1, 3, 4]], "not a positive multiple of the merge size 2"),
        (FRAME, [[0, 2, 4]], "not a positive multiple"),
    ],
)
def test_placeholders_that_do_not_fit_the_grids_are_an_error_with_counts(ids: list, grid: object, message: str) -> None:
    with pytest.raises(PromptError) as error:
        positions_of(ids, grid)
    assert message in str(error.value)


def test_a_prompt_without_media_counts_up() -> None:
    np.testing.assert_array_equal(positions_of([5, 6, 7], None, start=4), np.full((3, 3), [4, 5, 6]))
