"""What cannot be converted is refused in one sentence, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.m2la.files import prompts_of_files
from convert.m2la.options import Options
from convert.m2la.run import convert_attention
from ivcore.errors import ConfigError, IvError, MediaError, PromptError
from ivcore.inputs import ModelInputs

REFERENCE = Path(__file__).resolve().parents[2] / "data" / "reference"


@pytest.fixture
def refused(tmp_path: Path, prompts: list[ModelInputs]) -> Callable[..., str]:
    """Function (source, options, calibration, held_out) that converts and gives the sentence it was refused with."""

    def refuse(
        source: Path, options: Options, given: list[ModelInputs] | None = None, held_out: Any = None,
        kind: type[IvError] = ConfigError,
    ) -> str:  # fmt: skip
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(kind) as caught:
            convert_attention(
                source, tmp_path / "deep" / "out", options, prompts if given is None else given, held_out,
                backend="torch",
            )  # fmt: skip
        assert sorted(tmp_path.rglob("*")) == before
        message = str(caught.value)
        assert message.endswith(".") and "\n" not in message
        return message

    return refuse


@pytest.mark.parametrize("layout", ["norm", "release"])
def test_a_source_with_m2la(checkpoints: Any, refused: Any, tmp_path: Path, layout: str) -> None:
    message = refused(checkpoints.make(tmp_path / "in", layout), Options(cache_ratio=2))
    assert "M2LA already" in message and layout in message


def test_a_quantised_source(checkpoints: Any, refused: Any, tmp_path: Path) -> None:
    from convert.plan import Options as PackOptions
    from convert.run import convert

    source = checkpoints.make(tmp_path / "in", "gqa")
    convert(source, tmp_path / "packed", PackOptions(bits=4, group_size=32))
    assert "quantised" in refused(tmp_path / "packed", Options(cache_ratio=2))


@pytest.mark.parametrize("ratio", [4.0, 8.0, 1e9])
def test_a_ratio_that_leaves_no_rank(sources: Any, refused: Any, tmp_path: Path, ratio: float) -> None:
    message = refused(sources.make(tmp_path / "in"), Options(cache_ratio=ratio))
    assert "no rank" in message and "below 4" in message  # 2 heads: keys and values are 4 times a RoPE key


def test_a_rank_that_saves_nothing(sources: Any, refused: Any, tmp_path: Path) -> None:
    assert "--rank 24" in refused(sources.make(tmp_path / "in"), Options(rank=25))


def test_more_rope_keys_than_there_are_heads(sources: Any, refused: Any, tmp_path: Path) -> None:
    assert "2 key heads" in refused(sources.make(tmp_path / "in"), Options(cache_ratio=1, rope_heads=3))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "--rank and --cache-ratio"),
        ({"rank": 8, "cache_ratio": 2}, "--rank and --cache-ratio"),
        ({"rank": 0}, "--rank 0"),
        ({"cache_ratio": 0.5}, "--cache-ratio 0.5"),
        ({"cache_ratio": float("nan")}, "--cache-ratio nan"),
        ({"cache_ratio": 2, "layout": "other"}, "--layout other"),
        ({"cache_ratio": 2, "layout": "release", "rope_heads": 2}, "release layout"),
        ({"cache_ratio": 2, "rope_heads": 0}, "rope_heads"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Options(**options)


def test_head_counts_that_do_not_divide(sources: Any, refused: Any, tmp_path: Path) -> None:
    shape = sources.Shape(kv_heads=2)
    config = shape.config()
    config["text_config"]["num_attention_heads"] = 5
    source = sources.write(tmp_path / "in", shape, sources.random(shape), **config)
    message = refused(source, Options(cache_ratio=2))
    assert "num_attention_heads" in message and "multiple" in message


@pytest.mark.parametrize("change", [{"rope_type": "yarn", "factor": 4.0}, {"mrope_interleaved": False}])
def test_a_rotary_type_that_is_not_supported(
    sources: Any, refused: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    shape = sources.Shape()
    config = shape.config()
    config["text_config"]["rope_scaling"] |= change
    source = sources.write(tmp_path / "in", shape, sources.random(shape), **config)
    assert "rope_scaling" in refused(source, Options(cache_ratio=2))


def test_a_source_whose_rotary_pairs_are_neighbours(sources: Any, refused: Any, tmp_path: Path) -> None:
    shape = sources.Shape()
    config = shape.config()
    config["text_config"]["rope_interleave"] = True
    source = sources.write(tmp_path / "in", shape, sources.random(shape), **config)
    assert "rope_interleave" in refused(source, Options(cache_ratio=2))


def test_too_few_prompts(sources: Any, refused: Any, prompts: list[ModelInputs], tmp_path: Path) -> None:
    source = sources.make(tmp_path / "in")
    assert "at least 2 prompts" in refused(source, Options(cache_ratio=2), prompts[:1])
    assert "prompts to measure on" in refused(source, Options(cache_ratio=2), prompts, [])


def test_prompts_that_are_not_the_models(sources: Any, refused: Any, tmp_path: Path) -> None:
    source = sources.make(tmp_path / "in")
    foreign = [ModelInputs(np.array([1, 2, 99], np.int32), None, None)] * 2
    assert "vocabulary" in refused(source, Options(cache_ratio=2), foreign, kind=PromptError)


def test_calibration_files_that_cannot_be_read(tmp_path: Path) -> None:
    model = REFERENCE / "qwen3vl-micro"
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "folder").mkdir()
    for name, kind in (
        ("absent.mp4", MediaError), ("absent.txt", PromptError), ("empty.txt", PromptError),
        ("bytes.txt", PromptError), ("broken.mp4", MediaError), ("folder", PromptError),
    ):  # fmt: skip
        with pytest.raises(kind) as caught:
            prompts_of_files(model, [tmp_path / name])
        assert name in str(caught.value)


def test_texts_images_and_videos_become_prompts(make_clip: Any, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("A bright disc moves. " * 40)
    found = prompts_of_files(
        REFERENCE / "qwen3vl-micro", [make_clip(), tmp_path / "a.png", tmp_path / "a.txt"], max_tokens=50
    )
    media = [[medium.kind for medium in inputs.media] for inputs in found]
    assert media[:2] == [["video"], ["image"]] and len(media) > 3 and all(kind == [] for kind in media[2:])
    assert all(len(inputs.token_ids) <= 50 for inputs in found[2:])
