"""The trials of `make tiny-adapters`, made small: every stage runs as it will, on a model that knows nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from train.tiny import adapters
from train.tiny.start import write_start
from train.toyworld.dataset import write_dataset


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-base")
    write_start(folder / "model")
    write_dataset(folder / "data", "heldout", 0, 2)
    return folder


@pytest.mark.parametrize("trial", list(adapters.SHARES))
def test_a_trial_measures_before_and_after_with_every_seed_and_does_nothing_twice(
    trial: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(adapters, "SEEDS", (0, 1))
    monkeypatch.setattr(adapters, "TRAIN", dict.fromkeys(adapters.SHARES, 4))
    small = {name: (2, shares) for name, (_, shares) in adapters.HELDOUT.items()}
    monkeypatch.setattr(adapters, "HELDOUT", small)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    overrides = ["steps=1", "batch=2", "data.max_tokens=400"]
    overrides += [] if trial == "sft" else ["rollout.rollouts=2", "rollout.max_tokens=3"]
    found = adapters.make_adapters(base, tmp_path, [trial], overrides)
    assert found == json.loads((tmp_path / "adapters.json").read_text())
    after = found[trial]["after"]
    assert len(after) == 2 and all(each.keys() == found[trial]["before"].keys() for each in after)
    assert ("teacher" in found[trial]) == (trial == "distill")
    assert (trial == "sft") == (adapters.NEW_KIND in found[trial]["before"])
    assert all((tmp_path / f"{trial}-{seed}" / "adapter/adapter_config.json").exists() for seed in (0, 1))
    assert "| after | spread |" in capsys.readouterr().out
    made = {file: file.stat().st_mtime_ns for file in tmp_path.glob(f"{trial}-*/**/*")}
    assert adapters.make_adapters(base, tmp_path, [trial], overrides) == found
    assert made == {file: file.stat().st_mtime_ns for file in tmp_path.glob(f"{trial}-*/**/*")}
