"""The event files of a run, as TensorBoard itself reads them, also of a run that was stopped and went on."""

from __future__ import annotations

import errno
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ivcore.errors import TrainingError
from train.tensorboard import TensorBoard


@pytest.fixture(scope="module")
def runs(tools: Any) -> Any:
    return tools.neighbour("train", "runs")


def shown(run: Path) -> dict[str, dict[int, float]]:
    """Step -> value by tag, as TensorBoard shows it."""
    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    found = {tag: [(each.step, each.value) for each in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    for tag, values in found.items():
        assert len(dict(values)) == len(values), f"a step of {tag} is there twice"
    return {tag: dict(values) for tag, values in found.items()}


def train(runs: Any, job: Any, board: TensorBoard, *, resume: bool = False, stop: int | None = None) -> None:
    import train.loop

    def progress(step: int, steps: int, metrics: Any) -> None:
        board.add(step, metrics)
        if step == stop:
            raise runs.Stopped

    train.loop.train(job, resume=resume, on_progress=progress)


def test_a_run_that_was_stopped_and_went_on_shows_every_step_once(runs: Any, tmp_path: Path) -> None:
    """Stopped after step 5, it goes on from the checkpoint of step 4; stopped before the first, from nothing."""
    question = {"role": "user", "content": "Red or blue?"}
    rows = [runs.said("What?", "This.") | {"choices": ["red", "blue"], "answer": 0, "kind": kind} for kind in "ab"]
    held_out = runs.write_rows(tmp_path / "held_out.jsonl", [row | {"messages": [question]} for row in rows])
    data = runs.write_rows(tmp_path / "rows.jsonl", runs.text_rows(5))
    job = replace(runs.job(tmp_path / "run", data, steps=7, evaluate_every=1), held_out=str(held_out))
    for resume, stop in ((False, 1), (True, 5)):
        with pytest.raises(runs.Stopped):
            train(runs, job, TensorBoard(job.out), resume=resume, stop=stop)
    train(runs, job, TensorBoard(job.out), resume=True)
    found, logged = shown(job.out), runs.lines(job.out / "metrics.jsonl")
    for key in ("loss", "gradient_norm", "learning_rate", "tokens", "peak_bytes"):
        assert found[f"train/{key}"] == pytest.approx({each["step"]: each[key] for each in logged}, rel=1e-6), key
    judged = runs.lines(job.out / "evaluations.jsonl")
    assert found["held_out/mean"] == pytest.approx({each["step"]: each["mean"] for each in judged})
    assert found["held_out/b"] == pytest.approx({each["step"]: each["kinds"]["b"]["value"] for each in judged})
    assert [each["step"] for each in logged] == [each["step"] for each in judged] == list(range(1, 8))
    assert not {"train/phase", "train/step"} & set(found)


def test_an_evaluation_is_shown_at_its_own_step_only(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    for step in range(1, 7):
        if step % 3 == 0:
            with (tmp_path / "evaluations.jsonl").open("a") as stream:
                kinds = {"span": {"rows": 2, "measure": "mean IoU", "value": step / 8}}
                stream.write(json.dumps({"step": step, "mean": step / 8, "kinds": kinds}) + "\n")
        board.add(step, {"loss": 1.0})
    assert shown(tmp_path)["held_out/span"] == {3: 3 / 8, 6: 6 / 8}


def test_values_beyond_float32_are_its_largest_and_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.add(1, {"loss": 1e300, "reward": -1e300, "gradient_norm": None, "phase": "all"})
    found = shown(tmp_path)
    assert set(found) == {"train/loss", "train/reward"}
    assert found["train/loss"][1] == -found["train/reward"][1] == 3.4028234663852886e38


def test_a_full_disk_is_one_sentence(runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = TensorBoard(tmp_path)

    def refuse(*given: Any, **how: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(TrainingError) as caught:
        board.add(1, {"loss": 1.0})
    assert "No space left on device" in runs.one_sentence(str(caught.value)) and str(tmp_path) in str(caught.value)


def test_without_the_library_it_is_one_sentence(runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer", None)
    with pytest.raises(TrainingError) as caught:
        TensorBoard(tmp_path)
    assert "pip install" in runs.one_sentence(str(caught.value))
