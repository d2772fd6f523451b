"""iv3-tiny's base: what it begins with, its tower's training, and the steps of `make tiny-base`, made small."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivcore.backend import load
from ivcore.checkpoint import manifest
from ivcore.config import ModelConfig
from ivcore.inputs import ModelInputs
from ivcore.shards import Checkpoint
from ivcore.tokenizer import Tokenizer
from ivcore.vision import Patches
from train.tiny import base
from train.tiny.start import write_start
from train.tiny.tower import HEADS, PATCHES, batch_of, train_tower
from train.toyworld.dataset import BASE_SHARES
from train.toyworld.script import seeds


class Stopped(BaseException):
    pass


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_start(tmp_path_factory.mktemp("tiny") / "start")


def tensors(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = Checkpoint(folder)
    return {name: np.array(checkpoint.read(name)) for name in checkpoint.shapes()}


def test_the_start_is_a_plain_qwen3_vl_of_4_to_8_million_weights_that_both_backends_read_alike(start: Path) -> None:
    config = ModelConfig.from_dir(start)
    assert config.model_type == "qwen3_vl"
    assert 4e6 < sum(int(np.prod(shape)) for shape in manifest(config).values()) < 8e6
    ids = np.arange(20, 60, dtype=np.int32)
    torch, mlx = (load(start, backend).logits(ModelInputs(ids, None, None)) for backend in ("torch", "mlx"))  # type: ignore[arg-type]
    np.testing.assert_allclose(torch, mlx, atol=1e-4)


def test_the_start_follows_from_its_seed(start: Path, tmp_path: Path) -> None:
    first, same, other = tensors(start), tensors(write_start(tmp_path / "a")), tensors(write_start(tmp_path / "b", 1))
    assert all(np.array_equal(first[name], same[name]) for name in first)
    assert not np.array_equal(first["model.visual.pos_embed.weight"], other["model.visual.pos_embed.weight"])


def test_a_fresh_tower_keeps_activations_at_unit_scale(start: Path) -> None:
    model = load(start, "torch")
    pictures, _ = batch_of(seeds("train", 0, 2), "train")
    patches = Patches(pictures, Tokenizer.from_dir(start).processor)
    embeds, deepstack = model.encode_vision(np.asarray(patches), patches.grid_thw)
    for feature in (embeds, *deepstack):
        assert 0.05 < float(np.std(feature)) < 5


def test_labels_of_the_tower_s_clips_say_what_their_scripts_show() -> None:
    clips = seeds("train", 0, 24)
    pictures, labels = batch_of(clips, "train")
    assert [len(each) for each in pictures] == [2 * PATCHES] * len(clips) and len(labels) == PATCHES * len(clips)
    for name, classes in HEADS.items():
        found = {getattr(label, name) for label in labels} - {None}
        assert found <= set(classes) and len(found) > 1
    # A patch in which nothing is seen has a picture without bright pixels.
    for index, label in enumerate(labels):
        clip, patch = divmod(index, PATCHES)
        bright = pictures[clip][2 * patch : 2 * patch + 2].max(axis=(1, 2, 3)) > 150
        assert bright.tolist() == list(label.visible)


def test_a_stopped_tower_goes_on_to_the_weights_of_one_that_was_not(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.tiny.tower.CLIPS", 2)
    monkeypatch.setattr("train.tiny.tower._SAVE_EVERY", 2)
    monkeypatch.setattr("train.tiny.tower._MEASURED", 4)
    whole = train_tower(start, tmp_path / "whole", steps=4)

    def stop(step: int, steps: int, metrics: Mapping[str, float]) -> None:
        if step == 3:
            raise Stopped

    with pytest.raises(Stopped):
        train_tower(start, tmp_path / "halved", steps=4, on_progress=stop)
    assert train_tower(start, tmp_path / "halved", steps=4) == whole
    first, second, before = tensors(tmp_path / "whole"), tensors(tmp_path / "halved"), tensors(start)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    changed = {name for name in first if not np.array_equal(first[name], before[name])}
    assert changed and all(name.startswith("model.visual.") for name in changed)
    assert not list(tmp_path.glob("*.part"))


def test_tiny_base_goes_from_nothing_to_a_measured_model_and_does_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small: dict[str, Any] = {
        "TRAIN_CLIPS": 24,
        "HELDOUT_CLIPS": 8,
        "TOWER_STEPS": 1,
        "ECHOES": 8,
        "PAIRS": 8,
        "TEXTS": 8,
    }
    for name, value in small.items():
        monkeypatch.setattr(base, name, value)
    monkeypatch.setattr("train.tiny.tower.CLIPS", 2)
    monkeypatch.setattr("train.tiny.tower._MEASURED", 4)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    overrides = ['phases=[{name="all", steps=2}]', "data.max_tokens=400", "data.window=2"]
    model = base.make_base(tmp_path, overrides)
    found = json.loads((tmp_path / "base.json").read_text())
    rows = (tmp_path / "data/heldout.jsonl").read_text().splitlines()
    assert sum(kind["rows"] for kind in found["kinds"].values()) == len(rows) > small["HELDOUT_CLIPS"]
    assert load(model, "torch").dtype == "bfloat16"
    assert len((tmp_path / "sft/metrics.jsonl").read_text().splitlines()) == 2
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "sft").rglob("*")}
    assert base.make_base(tmp_path, overrides) == model
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "sft").rglob("*")}
    assert "goal" in capsys.readouterr().out
    for folder in (model, tmp_path / "sft/model"):  # as a kill leaves them
        (folder / "model.safetensors").unlink()
    (tmp_path / "base.json").unlink()
    whole = before[tmp_path / "sft/checkpoints"]
    assert base.make_base(tmp_path, overrides) == model
    assert tensors(model) and (tmp_path / "sft/checkpoints").stat().st_mtime_ns == whole


def test_held_out_clips_answer_every_kind_the_base_learns() -> None:
    assert set(base.HELDOUT_SHARES) == set(BASE_SHARES) and set(base.GOALS) < set(BASE_SHARES)
