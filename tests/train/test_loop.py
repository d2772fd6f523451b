"""A short run of cpt and sft: it learns, and its folder has what the documentation says."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivcore.adapter import Adapter
from ivcore.backend import load
from train.recipe_file import read_recipe

KEYS = {
    "step", "phase", "loss", "rows", "tokens", "epoch", "learning_rate", "gradient_norm", "seconds",
    "tokens_per_second", "peak_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tools: Any) -> Any:
    return tools.neighbour("train", "runs")


@pytest.fixture(scope="module")
def data(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, an image, two clips; a line that is no row."""
    folder = tmp_path_factory.mktemp("data")
    return runs.write_rows(folder / "rows.jsonl", [*runs.text_rows(3), "no row", *runs.media_rows(folder)])


@pytest.fixture(scope="module")
def texts(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_rows(tmp_path_factory.mktemp("texts") / "rows.jsonl", runs.text_rows(4))


@pytest.mark.parametrize("stage", ["cpt", "sft"])
def test_the_loss_of_a_repeated_row_falls(runs: Any, data: Path, tmp_path: Path, backend: str, stage: str) -> None:
    row = runs.media_rows(data.parent)[1 if stage == "cpt" else 0]
    one = runs.write_rows(data.parent / f"{stage}-{backend}.jsonl", [row])
    runs.run(runs.job(tmp_path / "run", one, backend, stage=stage, steps=12, batch=1, data={"window": 1}))
    losses = [each["loss"] for each in runs.metrics(tmp_path / "run")]
    assert losses[0] > 4 and losses[-1] < losses[0] / 4
    assert [each["epoch"] for each in runs.metrics(tmp_path / "run")] == list(range(1, 13))


@pytest.mark.parametrize(("weighting", "exponent"), [("token", 0.0), ("square", 0.5), ("sample", 1.0)])
def test_the_first_loss_is_the_weighted_cross_entropy_of_the_rows_answers(
    runs: Any, data: Path, tmp_path: Path, backend: str, weighting: str, exponent: float
) -> None:
    """Of a LoRA that changes nothing yet, in a step with each row once; inference gives the logits, row by row."""
    rows = [json.loads(line) for line in data.read_text().splitlines() if line != "no row"]
    runs.run(
        runs.job(tmp_path / "run", data, backend, weighting=weighting, steps=1, batch=1,
                 data={"window": len(rows), "max_tokens": 2048}, lora={"dropout": 0.5})
    )  # fmt: skip
    (found,) = runs.metrics(tmp_path / "run")
    model = load(runs.MICRO, backend)  # type: ignore[arg-type]
    loss, weight, tokens = 0.0, 0.0, 0
    for row in rows:
        inputs, start = runs.inputs_of(row, data.parent, max_frames=4)
        tokens += len(inputs.token_ids)
        scores = np.asarray(model.logits(inputs), np.float64)
        end = int(np.flatnonzero(inputs.token_ids == runs.END)[-1])
        scores -= np.log(np.exp(scores).sum(axis=-1, keepdims=True))
        each = -scores[np.arange(start - 1, end), inputs.token_ids[start : end + 1]]
        loss += each.sum() * len(each) ** -exponent
        weight += len(each) ** (1 - exponent)
    assert (found["rows"], found["tokens"]) == (len(rows), tokens)
    assert found["loss"] == pytest.approx(loss / weight, rel=1e-4)


def test_the_folder_of_a_run_has_what_the_documentation_says(
    runs: Any, data: Path, tmp_path: Path, backend: str
) -> None:
    out, seen = tmp_path / "run", []
    job = runs.job(out, data, backend, steps=5)
    folder = runs.train.loop.train(job, on_progress=lambda *given: seen.append(given))
    assert folder.path == out
    assert {file.name for file in out.iterdir()} == {
        "recipe.toml", "run.json", "metrics.jsonl", "rejected.jsonl", "checkpoints", "adapter", "clips"
    }  # fmt: skip
    assert read_recipe(out / "recipe.toml") == job.recipe
    about = json.loads((out / "run.json").read_text())
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    read = {"model": str(runs.MICRO), "data": f"{data}, sha256 {digest}"}
    assert about | {"stage": "sft", "backend": backend, **read} == about
    logged = runs.lines(out / "metrics.jsonl")
    assert [each["step"] for each in logged] == [1, 2, 3, 4, 5] and all(set(each) == KEYS for each in logged)
    assert all(each["phase"] == "all" and each["gradient_norm"] > 0 and each["seconds"] > 0 for each in logged)
    assert [(step, steps) for step, steps, _ in seen] == [(step, 5) for step in range(1, 6)]
    assert [each[2]["loss"] for each in seen] == [each["loss"] for each in logged]
    (rejected,) = runs.lines(out / "rejected.jsonl")
    assert (rejected["file"], rejected["line"], rejected["reason"]) == (str(data), 4, "broken JSON")
    # Two stay, that of the last step among them; each can be loaded as an adapter.
    assert {file.name for file in (out / "checkpoints").iterdir()} == {"step-000004", "step-000005"}
    for step in (4, 5):
        kept = out / "checkpoints" / f"step-{step:06d}"
        assert {file.name for file in kept.iterdir()} == {"state.safetensors", "position.json", "adapter"}
        assert json.loads((kept / "position.json").read_text())["step"] == step
    runs.same(runs.files(out / "adapter"), runs.files(out / "checkpoints" / "step-000005" / "adapter"))


def test_an_adapter_gives_the_trained_model_s_logits_on_both_backends(
    runs: Any, data: Path, tmp_path: Path, backend: str, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = runs.trainers(monkeypatch)
    runs.run(runs.job(tmp_path / "run", data, backend, **runs.LORA))
    adapter = tmp_path / "run" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_dropout"]) == ("LORA", 3, 0.25)
    assert Adapter.load(adapter).modules
    inputs, _ = runs.inputs_of(runs.media_rows(data.parent)[1], data.parent, max_frames=4)
    trained = np.asarray(made[0].model.logits(inputs), np.float32)
    np.testing.assert_allclose(runs.logits(runs.MICRO, backend, inputs, adapter), trained, atol=1e-6)
    for other in tools.BACKENDS:
        np.testing.assert_allclose(runs.logits(runs.MICRO, other, inputs, adapter), trained, rtol=1e-4, atol=1e-4)
    assert np.abs(runs.logits(runs.MICRO, backend, inputs) - trained).max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_fine_tuning_leaves_a_checkpoint_with_the_trained_model_s_logits(
    runs: Any, data: Path, tmp_path: Path, backend: str, tools: Any, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    made = runs.trainers(monkeypatch)
    out = tmp_path / "run"
    runs.run(runs.job(out, data, backend, full=True, steps=2, dtype=dtype, learning_rate={"peak": 1e-3}))
    assert not (out / "adapter").exists()
    inputs, _ = runs.inputs_of(runs.media_rows(data.parent)[1], data.parent, max_frames=4)
    again, _ = runs.inputs_of(runs.media_rows(data.parent)[1], data.parent, max_frames=4, model=out / "model")
    assert again.token_ids.tolist() == inputs.token_ids.tolist()
    trained = np.asarray(made[0].model.logits(inputs), np.float32)
    model = load(out / "model", backend)  # type: ignore[arg-type]
    assert model.dtype == dtype
    np.testing.assert_allclose(np.asarray(model.logits(inputs), np.float32), trained, atol=1e-6)
    assert np.abs(runs.logits(runs.MICRO, backend, inputs) - trained).max() > 0.1
    if dtype == "float32":
        for other in tools.BACKENDS:
            np.testing.assert_allclose(runs.logits(out / "model", other, inputs), trained, rtol=1e-4, atol=1e-4)


def test_both_backends_log_the_same_run(runs: Any, data: Path, tmp_path: Path, tools: Any) -> None:
    first, second = (
        runs.metrics(runs.run(runs.job(tmp_path / name, data, name, steps=3)).path) for name in tools.BACKENDS
    )
    for ours, theirs in zip(first, second, strict=True):
        assert [ours[key] for key in ("step", "rows", "tokens", "epoch", "learning_rate")] == [
            theirs[key] for key in ("step", "rows", "tokens", "epoch", "learning_rate")
        ]
    # Before the first update; after it, AdamW turns rounding into signs.
    assert first[0]["loss"] == pytest.approx(second[0]["loss"], rel=1e-5)
    assert first[0]["gradient_norm"] == pytest.approx(second[0]["gradient_norm"], rel=1e-4)


def test_phases_have_their_own_frames_and_lengths_and_share_one_schedule(
    runs: Any, data: Path, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def watch(trainer: Any) -> None:
        accumulate = trainer.accumulate

        def recorded(batch: Any, loss: Any) -> Any:
            seen.append(batch)
            return accumulate(batch, loss)

        trainer.accumulate = recorded

    runs.trainers(monkeypatch, watch)
    out = tmp_path / "run"
    phases = [
        {"name": "short", "steps": 4, "data": {"max_frames": 4, "max_tokens": 200}},
        {"name": "long", "steps": 6, "batch": 1, "data": {"max_frames": 8, "max_tokens": 900, "window": 6}},
    ]
    rate = {"peak": 4e-3, "floor": 1e-3, "warmup": 0.2}
    runs.run(runs.job(out, data, backend, phases=phases, learning_rate=rate, save_every=0))
    logged = runs.metrics(out)
    assert [each["phase"] for each in logged] == ["short"] * 4 + ["long"] * 6
    cosine = [1e-3 + 3e-3 * (1 + math.cos(math.pi * done / 8)) / 2 for done in range(1, 9)]
    assert [each["learning_rate"] for each in logged] == pytest.approx([2e-3, 4e-3, *cosine])
    assert len(seen) == 4 * 2 + 6 * 1
    videos = [max(batch.grid_thw[:, 0], default=0) if batch.grid_thw is not None else 0 for batch in seen]
    assert max(videos[:8]) == 2 and max(videos[8:]) == 4
    lengths = [len(batch.token_ids) for batch in seen]
    assert max(lengths[:8]) <= 200 < max(lengths[8:]) <= 900
    assert {len(batch.lengths) for batch in seen[8:]} == {6}  # the window holds each row of an epoch


def test_what_is_too_long_for_the_first_phase_is_learned_from_in_the_second(runs: Any, tmp_path: Path) -> None:
    rows = runs.write_rows(tmp_path / "rows.jsonl", [*runs.text_rows(3), runs.said("Count.", "and one " * 30)])
    short, long = ({"name": name, "steps": 3, "data": {"max_tokens": most}} for name, most in (("s", 60), ("l", 512)))
    out = tmp_path / "run"
    runs.run(runs.job(out, rows, phases=[short, long], batch=1, data={"window": 4}))
    first, second = runs.metrics(out)[:3], runs.metrics(out)[3:]
    assert max(each["tokens"] for each in first) <= 60
    # Each step of the second phase has all four rows, one of them longer than 60 tokens.
    assert len({each["tokens"] for each in second}) == 1 and second[0]["tokens"] > 3 * 20 + 60
    assert [each["epoch"] for each in second] == [1, 2, 3]


def test_the_last_step_is_saved_whatever_the_interval(runs: Any, texts: Path, tmp_path: Path) -> None:
    for every, expected in ((0, ["step-000003"]), (2, ["step-000002", "step-000003"]), (9, ["step-000003"])):
        out = tmp_path / str(every)
        runs.run(runs.job(out, texts, steps=3, save_every=every, keep=5))
        assert sorted(file.name for file in (out / "checkpoints").iterdir()) == expected


@pytest.mark.parametrize("how", ["LORA", "FULL"])
def test_resuming_after_the_end_changes_nothing(runs: Any, data: Path, tmp_path: Path, backend: str, how: str) -> None:
    out = tmp_path / "run"
    job = runs.job(out, data, backend, steps=2, **getattr(runs, how))
    runs.run(job)
    before = runs.files(out)
    for _ in range(2):
        runs.run(job, resume=True)
        runs.same(runs.files(out), before)


def test_a_mix_shows_only_what_it_names(runs: Any, tmp_path: Path) -> None:
    for name, count in (("a", 2), ("b", 3)):
        runs.write_rows(tmp_path / f"{name}.jsonl", [runs.said(f"{name}{number}", name * 5) for number in range(count)])
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({name: {"annotation": f"{name}.jsonl"} for name in "ab"}))
    out = tmp_path / "run"
    phases = [{"name": name, "steps": 2, "batch": 1, "data": {"mix": {name: 1.0}}} for name in "ab"]
    runs.run(runs.job(out, meta, phases=phases, data={"window": 1, "max_tokens": 40}))
    assert [each["epoch"] for each in runs.metrics(out)] == pytest.approx([1 / 2, 1, 1 / 3, 2 / 3], abs=1e-6)


def test_memory_does_not_grow_with_the_steps(runs: Any, data: Path, tmp_path: Path, backend: str) -> None:
    """What the packer holds between planning and use stays a window's worth, and rows are not remembered twice."""
    import train.packing as packing

    held: list[int] = []
    step = packing.Packer.step

    def count(self: Any) -> Any:
        packs = step(self)
        held.append(len(self._held))
        return packs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing.Packer, "step", count)
        runs.run(runs.job(tmp_path / "run", data, backend, steps=8))
    assert max(held) <= 2 * 3 + 6
