"""`iv3 convert --attention m2la`: what a user sees of a plan, a conversion, and of what cannot be done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.calibration import mixture
from convert.m2la.run import convert_attention
from ivcore.config import ModelConfig
from train.toyworld.script import split_of

MICRO = Path(__file__).resolve().parents[1] / "data/reference/qwen3vl-micro"
M2LA = MICRO.with_name("iv3-micro")
Run = Callable[..., tuple[int, str, str]]
Failure = Callable[..., str]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    pytest.importorskip("torch").set_num_threads(1)


def test_a_conversion_shows_every_layer_and_what_it_cost(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code, out, err = run(
        "convert", MICRO, tmp_path / "out", "--attention", "m2la", "--cache-ratio", 2, "--samples", 8,
        "--backend", "torch", "--plot", tmp_path / "cost.png",
    )  # fmt: skip
    assert (code, err) == (0, "")
    text = ModelConfig.from_dir(tmp_path / "out").text
    record = json.loads((tmp_path / "out/conversion.json").read_text())
    lines = out.splitlines()
    for layer in range(text.num_hidden_layers):
        words = lines[1 + layer].split()
        assert words[:3] == [str(layer), str(text.geometry.latent_ranks[layer]), str(text.geometry.rope_heads[layer])]
        assert words[4] == f"{record['report']['layers'][layer]['output_error']['text']:.2%}"
    cache = record["report"]["cache_bytes_per_token"]
    assert cache["converted"] <= cache["source"] / 2
    assert any(line.startswith("Cache: ") for line in lines)
    for kind in ("text", "visual"):
        assert any(f"{kind} positions: KL {record['report']['model'][kind]['kl']:.3g} nats" in line for line in lines)
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "cost.png"}
    assert (record["calibration"]["prompts"], record["held_out"]["prompts"]) == (8, 2)


def test_every_option_reaches_the_record(run: Run, make_clip: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A bright disc moves from left to right. " * 9)
    code, _, err = run(
        "convert", MICRO, tmp_path / "out", "--attention", "m2la", "--rank", 24, "--layout", "release",
        "--calibrate", make_clip(), "--calibrate", tmp_path / "a.txt", "--backend", "mlx", "--shard-size", "1MB",
    )  # fmt: skip
    assert (code, err) == (0, "")
    record = json.loads((tmp_path / "out/conversion.json").read_text())
    said = record["options"]
    assert (said["rank"], said["layout"], said["backend"], said["shard_bytes"]) == (24, "release", "mlx", 10**6)
    assert record["calibration"]["visual_tokens"] > 0 and record["held_out"]["visual_tokens"] == 0
    assert ModelConfig.from_dir(tmp_path / "out").text.geometry.layout == "release"


def test_a_dry_run_says_what_the_cache_becomes_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    code, out, err = run("convert", MICRO, tmp_path / "out", "--attention", "m2la", "--cache-ratio", 2, "--dry-run")
    assert (code, err) == (0, "") and list(tmp_path.iterdir()) == []
    text = ModelConfig.from_dir(MICRO).text
    width = text.geometry.gqa_cache_width
    assert f"{width} numbers a token and layer become {width // 2} on average" in out and "nothing was written" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--attention", "mla", "--cache-ratio", 2], "--attention mla is not known"),
        (["--attention", "m2la", "--cache-ratio", 2, "--bits", 4], "--bits cannot go with --attention"),
        (["--attention", "m2la", "--cache-ratio", 2, "--keep", "lm_head"], "--keep cannot go with --attention"),
        (["--attention", "m2la", "--cache-ratio", 2, "--adapter", "a"], "--adapter cannot go with --attention"),
        (["--cache-ratio", 2], "--cache-ratio goes with --attention m2la"),
        (["--bits", 4, "--calibrate", "a.mp4"], "--calibrate goes with --attention m2la"),
    ],
)
def test_options_of_another_job_are_bad_usage(run: Run, tmp_path: Path, options: list[Any], words: str) -> None:
    code, out, err = run("convert", MICRO, tmp_path / "out", *options)
    assert (code, out) == (2, "") and words in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (M2LA, ["--cache-ratio", 2], "M2LA already"),
        (MICRO, [], "--rank and --cache-ratio"),
        (MICRO, ["--cache-ratio", 99], "no rank is left"),
        (MICRO, ["--cache-ratio", 2, "--layout", "other"], "--layout other"),
        (MICRO, ["--cache-ratio", 2, "--calibrate", "absent.mp4"], "absent.mp4"),
        (MICRO, ["--cache-ratio", 2, "--samples", 2, "--backend", "jax"], "jax"),
        (MICRO, ["--cache-ratio", 2, "--plot", "absent/a.png"], "absent is no folder"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_writes_nothing(
    failure: Failure, tmp_path: Path, source: Path, options: list[Any], words: str
) -> None:
    assert words in failure("convert", source, tmp_path / "deep" / "out", "--attention", "m2la", *options)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_says_how_to_go_on_and_going_on_ends_in_the_same(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, on_progress: Any, **options: Any) -> Any:
        def interrupt(words: str, done: int, total: int) -> None:
            if words == "writing":
                raise KeyboardInterrupt
            on_progress(words, done, total)

        return convert_attention(*arguments, on_progress=interrupt, **options)

    options = ["--attention", "m2la", "--cache-ratio", 2, "--samples", 4, "--backend", "torch"]
    assert run("convert", MICRO, tmp_path / "undisturbed", *options)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("agent.convert_attention.convert_checkpoint", interrupted)
        code, out, err = run("convert", MICRO, tmp_path / "out", *options)
    assert (code, out) == (130, "") and "out.part; --resume goes on" in err
    assert run("convert", MICRO, tmp_path / "out", *options, "--resume")[0] == 0
    for file in (tmp_path / "undisturbed").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_built_in_mixture_has_clips_with_answers_and_texts_and_measures_on_other_seeds() -> None:
    calibration, held_out = mixture(MICRO, 8)
    assert (len(calibration), len(held_out)) == (8, 2)
    assert [len(each.media) for each in calibration] == [1, 1, 1, 0] * 2
    paths = [Path(medium.source).stem for each in (*calibration, *held_out) for medium in each.media]
    assert [split_of(int(path)) for path in paths] == ["train"] * 6 + ["heldout"] * 2
    again, _ = mixture(MICRO, 8)
    for one, other in zip(calibration, again, strict=True):
        assert np.array_equal(one.token_ids, other.token_ids)
