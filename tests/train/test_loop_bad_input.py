"""What is wrong with the data, the model, the recipe or a step is told in one sentence, and spoils nothing."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.plan import Options
from convert.run import convert
from ivcore.errors import ConfigError, TrainingError
from ivcore.shards import Checkpoint, write_checkpoint
from train.loop import train
from train.recipe_file import read_recipe

RECIPE = 'stage = "sft"\nsteps = 4\n[learning_rate]\npeak = 1e-4\n[lora]\nrank = 3\n'


@pytest.fixture(scope="module")
def runs(tools: Any) -> Any:
    return tools.neighbour("train", "runs")


@pytest.fixture(scope="module")
def texts(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_rows(tmp_path_factory.mktemp("texts") / "rows.jsonl", runs.text_rows(4))


def video(name: str) -> list[dict[str, Any]]:
    return [{"type": "video", "video": name}, {"type": "text", "text": "When?"}]


def bad_rows(runs: Any, folder: Path) -> dict[int, tuple[Any, str, str]]:
    """Line -> row, the reason for which it is unusable, and a word of the detail; with the files they need."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "broken.mp4").write_bytes(b"no clip")
    clip = runs.media_rows(folder)[1]["messages"][0]["content"][0]["video"]
    return {
        1: ({"messages": [{"role": "user", "content": "Well?"}]}, "no answer", "assistant"),
        3: (runs.said(video("absent.mp4"), "Never."), "missing clip", "absent.mp4"),
        4: (runs.said(video(clip), "1 to 99 s.") | {"span": [1, 99], "duration": 4.0}, "span outside its clip", "99"),
        6: (runs.said("Count.", "and one " * 90), "longer than the budget", "202"),
        7: ("{", "broken JSON", ""),
        9: (runs.said(video("broken.mp4"), "Now."), "unusable clip", "broken.mp4"),
    }


def with_good(runs: Any, bad: dict[int, tuple[Any, str, str]]) -> list[Any]:
    good = iter(runs.text_rows(9))
    return [bad[line][0] if line in bad else next(good) for line in range(1, 10)]


# Rows.


def test_rows_that_cannot_be_used_are_listed_with_their_reason_and_the_run_goes_on(
    runs: Any, tmp_path: Path, backend: str
) -> None:
    bad = bad_rows(runs, tmp_path)
    data = runs.write_rows(tmp_path / "rows.jsonl", with_good(runs, bad))
    out = tmp_path / "run"
    runs.run(runs.job(out, data, backend, data={"max_tokens": 150}))
    assert [each["step"] for each in runs.metrics(out)] == [1, 2, 3, 4]
    found = {each["line"]: each for each in runs.lines(out / "rejected.jsonl")}
    assert len(found) == len(runs.lines(out / "rejected.jsonl")), "a row is listed twice"
    assert sorted(found) == sorted(bad)
    for line, (_, reason, word) in bad.items():
        assert found[line]["file"] == str(data)
        assert (line, found[line]["reason"]) == (line, reason)
        assert word in found[line]["detail"]


def test_rejected_rows_are_listed_once_however_often_a_run_is_stopped(runs: Any, tmp_path: Path, backend: str) -> None:
    bad = bad_rows(runs, tmp_path)
    data = runs.write_rows(tmp_path / "rows.jsonl", with_good(runs, bad))
    job = runs.job(tmp_path / "run", data, backend, save_every=1, data={"max_tokens": 150, "window": 9})
    for stop in (1, 3):
        with pytest.raises(runs.Stopped):
            runs.run(job, stop=stop, resume=stop > 1)
        # All rows have been looked at in the first step: what is wrong with them is known, and to be read.
        assert sorted(each["line"] for each in runs.lines(job.out / "rejected.jsonl")) == sorted(bad)
    runs.run(job, resume=True)
    assert sorted(each["line"] for each in runs.lines(job.out / "rejected.jsonl")) == sorted(bad)


def test_a_row_rejected_before_the_checkpoint_is_still_listed_at_the_end(runs: Any, tmp_path: Path) -> None:
    """It belongs to a data set that only the first phase shows, so nothing comes across it again."""
    (tmp_path / "broken.mp4").write_bytes(b"no clip")
    for name, rows in (("a", [runs.said(video("broken.mp4"), "Now."), *runs.text_rows(2)]), ("b", runs.text_rows(2))):
        runs.write_rows(tmp_path / f"{name}.jsonl", rows)
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({name: {"annotation": f"{name}.jsonl"} for name in "ab"}))
    phases = [{"name": name, "steps": 2, "data": {"mix": {name: 1.0}}} for name in "ab"]
    job = runs.job(tmp_path / "run", meta, phases=phases)
    with pytest.raises(runs.Stopped):
        runs.run(job, stop=2)
    runs.run(job, resume=True)
    assert [(Path(each["file"]).name, each["line"]) for each in runs.lines(job.out / "rejected.jsonl")] == [
        ("a.jsonl", 1)
    ]


@pytest.mark.parametrize("kind", ["when read", "when used", "too long", "none"])
def test_data_of_which_nothing_is_usable_is_told_with_what_is_wrong(runs: Any, tmp_path: Path, kind: str) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no clip")
    rows, word = {
        "when read": ([{"messages": [{"role": "user", "content": "?"}]}] * 3, "no answer (3"),
        "when used": ([runs.said(video("broken.mp4"), "Now.")] * 2, "unusable clip (2"),
        "too long": ([runs.said("Count.", "and one " * 90)] * 2, "longer than the budget (2"),
        "none": ([], "no row"),
    }[kind]
    data = runs.write_rows(tmp_path / "rows.jsonl", rows)
    sentence = runs.refused(runs.job(tmp_path / "run", data, data={"max_tokens": 100}))
    assert word in sentence and str(data) in sentence


@pytest.mark.parametrize("name", ["absent.jsonl", "folder", "a.json"])
def test_data_that_cannot_be_read_begins_no_run(runs: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.json").write_text("{")
    assert name in runs.refused(runs.job(tmp_path / "run", tmp_path / name))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("gone", ["file", "row"])
def test_a_clip_or_the_rows_gone_while_training_is_one_sentence(runs: Any, tmp_path: Path, gone: str) -> None:
    rows = runs.media_rows(tmp_path)[1:]
    data = runs.write_rows(tmp_path / "rows.jsonl", rows)
    job = runs.job(tmp_path / "run", data, data={"cache_gib": 0.0})
    with pytest.raises(runs.Stopped):
        runs.run(job, stop=2)
    if gone == "file":
        for clip in (tmp_path / "clips").iterdir():
            clip.unlink()
    else:
        data.unlink()
    runs.refused(job, resume=True)


# Steps.


def spoiled(runs: Any, folder: Path, name: str, value: float) -> Path:
    """The micro checkpoint with one number of a tensor spoiled."""
    runs.copy(runs.MICRO, folder)
    checkpoint = Checkpoint(folder)
    tensors = {each: np.array(checkpoint.read(each)) for each in checkpoint.specs}
    tensors[name].reshape(-1)[7] = value
    config = json.loads((folder / "config.json").read_text())
    write_checkpoint(folder, config, checkpoint.specs, tensors.items())
    return folder


@pytest.mark.parametrize("how", [{}, {"full": True}])
def test_nan_in_the_weights_stops_the_first_step_with_its_rows(
    runs: Any, texts: Path, tmp_path: Path, backend: str, how: dict[str, Any]
) -> None:
    model = spoiled(runs, tmp_path / "model", "model.language_model.layers.2.mlp.up_proj.weight", math.nan)
    sentence = runs.refused(runs.job(tmp_path / "run", texts, backend, model=model, **how))
    assert "nan" in sentence and ("tep 1 " in sentence or "up_proj" in sentence)
    assert not (tmp_path / "run" / "adapter").exists() and not (tmp_path / "run" / "model").exists()


def change_call(trainer: Any, method: str, number: int, change: Any) -> None:
    """Let a trainer's method give something else at its call of that number."""
    original, calls = getattr(trainer, method), [0]

    def changed(*given: Any) -> Any:
        calls[0] += 1
        found = original(*given)
        return change(found) if calls[0] == number else found

    setattr(trainer, method, changed)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_no_number_stops_the_run_naming_step_and_rows(
    runs: Any, tmp_path: Path, backend: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = runs.write_rows(tmp_path / "rows.jsonl", ["{", "", *runs.text_rows(1)])  # the only row is on line 3
    job = runs.job(tmp_path / "run", data, backend, batch=1, data={"window": 1})
    with monkeypatch.context() as patch:
        runs.trainers(patch, lambda trainer: change_call(trainer, "accumulate", 3, lambda found: {"loss": value}))
        sentence = runs.refused(job)
    assert "tep 3 " in sentence and f"{data}:3" in sentence and str(value) in sentence
    assert "step 2" in sentence  # the last good checkpoint
    assert [each["step"] for each in runs.metrics(job.out)] == [1, 2]
    assert sorted(file.name for file in (job.out / "checkpoints").iterdir()) == ["step-000002"]
    assert not (job.out / "adapter").exists()
    # With what was wrong gone, it goes on to where it would have come.
    runs.run(job, resume=True)
    undisturbed = runs.job(tmp_path / "undisturbed", data, backend, batch=1, data={"window": 1})
    runs.run(undisturbed)
    runs.same(runs.outcome(job.out), runs.outcome(undisturbed.out))


def test_a_gradient_that_is_no_number_stops_the_run_naming_step_and_rows(
    runs: Any, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = runs.write_rows(tmp_path / "rows.jsonl", ["{", *runs.text_rows(1)])
    job = runs.job(tmp_path / "run", data, backend, batch=1, data={"window": 1})

    def spoil(trainer: Any) -> None:
        def put(found: Any) -> Any:
            trainer.set_gradients({name: array * np.nan for name, array in trainer.gradients().items()})
            return found

        change_call(trainer, "accumulate", 3, put)

    runs.trainers(monkeypatch, spoil)
    sentence = runs.refused(job)
    assert "tep 3 " in sentence and f"{data}:2" in sentence and "nan" in sentence and "step 2" in sentence


@pytest.mark.parametrize("resumed", [False, True])
def test_an_exploding_gradient_stops_the_run_before_it_is_saved(
    runs: Any, tmp_path: Path, resumed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a norm of about 1 and then 1000, at step 24; in the second case what is usual was seen before a restart."""
    data = runs.write_rows(tmp_path / "rows.jsonl", ["{", *runs.text_rows(1)])
    job = runs.job(tmp_path / "run", data, batch=1, steps=26, save_every=6, data={"window": 1}, lora={"rank": 1})
    last = 24 - 18 if resumed else 24  # of its own calls
    if resumed:
        with pytest.raises(runs.Stopped):
            runs.run(job, stop=22)
    with monkeypatch.context() as patch:
        runs.trainers(patch, lambda trainer: change_call(trainer, "apply", last, lambda norm: 1e6))
        sentence = runs.refused(job, resume=resumed)
    assert "tep 24 " in sentence and f"{data}:2" in sentence and "1e+06" in sentence and "step 18" in sentence
    assert [each["step"] for each in runs.metrics(job.out)] == list(range(1, 24))
    assert sorted(file.name for file in (job.out / "checkpoints").iterdir()) == ["step-000012", "step-000018"]


def test_a_learning_rate_far_too_high_ends_in_one_sentence_or_in_numbers(
    runs: Any, texts: Path, tmp_path: Path, backend: str
) -> None:
    job = runs.job(tmp_path / "run", texts, backend, steps=6, full=True, learning_rate={"peak": 1e30, "warmup": 0.0})
    assert "nan" in runs.refused(job) or "inf" in runs.refused(job, resume=True)
    assert not (tmp_path / "run" / "model").exists()


# Recipes.


@pytest.mark.parametrize(
    ("text", "wrong", "right"),
    [
        (RECIPE.replace("rank", "rnak"), "lora.rnak", "rank"),
        (RECIPE.replace("peak", "paek"), "learning_rate.paek", "peak"),
        (RECIPE.replace("steps", "setps"), "setps", "steps"),
        (RECIPE.replace("[lora]", "[lroa]"), "lroa", "lora"),
        ('weigthing = "token"\n' + RECIPE, "weigthing", "weighting"),
        (
            RECIPE.replace("steps = 4\n", "") + "[[phases]]\nname = 'a'\nsteps = 1\nbacth = 2\n",
            "phases.0.bacth",
            "batch",
        ),
        (RECIPE + "[data]\nmax_token = 8\n", "data.max_token", "max_tokens"),
    ],
)
def test_a_misspelled_key_is_named_with_the_nearest_right_one(
    runs: Any, tmp_path: Path, text: str, wrong: str, right: str
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_recipe(file)
    sentence = runs.one_sentence(str(caught.value))
    assert str(file) in sentence and f"{wrong} is not a key" in sentence and f"the nearest is {right}" in sentence


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora.rnk=4", ["lora.rnk", "rank"]),
        ("rank=4", ["rank"]),
        ("learning_rate=1e-4", ["learning_rate"]),
        ("learning_rate.peak=fast", ["learning_rate.peak", "fast", "a number"]),
        ("steps=0", ["steps", "at least 1"]),
        ("phases.0.steps=2", ["phases"]),
        ("=4", ["key=value"]),
        ("steps", ["key=value"]),
        ("stage=stf", ["stf", "sft"]),
    ],
)
def test_an_unknown_key_or_value_of_set_is_one_sentence(
    runs: Any, tmp_path: Path, override: str, words: list[str]
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(RECIPE)
    with pytest.raises(ConfigError) as caught:
        read_recipe(file, [override])
    sentence = runs.one_sentence(str(caught.value))
    assert all(word in sentence for word in words)


@pytest.mark.parametrize("phase", [0, 1])
def test_a_mix_of_an_unknown_data_set_is_refused_before_anything_is_trained(
    runs: Any, texts: Path, tmp_path: Path, phase: int
) -> None:
    phases: list[dict[str, Any]] = [{"name": name, "steps": 2} for name in ("short", "long")]
    phases[phase]["data"] = {"mix": {"rwos": 1.0}}
    job = runs.job(tmp_path / "run", texts, phases=phases)
    sentence = runs.refused(job)
    assert "'rwos'" in sentence and "'rows'" in sentence
    assert not runs.metrics(job.out)


# What does not fit.


def packed(runs: Any, folder: Path) -> Path:
    convert(runs.MICRO, folder, Options(bits=4, group_size=32))
    return folder


def test_a_packed_model_takes_a_lora_but_cannot_be_trained_in_full(
    runs: Any, texts: Path, tmp_path: Path, backend: str
) -> None:
    model = packed(runs, tmp_path / "packed")
    out = tmp_path / "run"
    assert "LoRA" in runs.refused(runs.job(out, texts, backend, model=model, full=True))
    # Nothing was begun, so the same folder takes the corrected recipe.
    runs.run(runs.job(out, texts, backend, model=model, steps=2))
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"dtype": "float8"}, "float8"),
        ({"lora": {"targets": ["no_such_layer"]}}, "no_such_layer"),
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"data": {"mix": {"rwos": 1.0}}}, "rwos"),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_begins_no_run(
    runs: Any, texts: Path, tmp_path: Path, backend: str, change: dict[str, Any], word: str
) -> None:
    out = tmp_path / "run"
    assert word in runs.refused(runs.job(out, texts, backend, **change))
    runs.run(runs.job(out, texts, backend, steps=1))


def test_a_cache_of_clips_that_cannot_be_is_one_sentence(runs: Any, texts: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    (tmp_path / "file").write_text("mine")
    job = replace(runs.job(tmp_path / "run", texts), cache=tmp_path / "file")
    assert str(tmp_path / "file") in runs.refused(job)


def test_clips_can_be_cached_for_several_runs_outside_of_them(runs: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    data = runs.write_rows(tmp_path / "rows.jsonl", runs.media_rows(tmp_path))
    kept = []
    for name in ("first", "second"):
        runs.run(replace(runs.job(tmp_path / name, data, steps=2), cache=tmp_path / "cache"))
        assert not (tmp_path / name / "clips").exists()
        kept.append({file.name: file.stat().st_ino for file in (tmp_path / "cache").glob("*.clip")})
    assert kept[0] and kept[1] == kept[0]


def test_a_base_that_is_gone_at_the_end_is_one_sentence_and_put_back_the_run_is_finished(
    runs: Any, texts: Path, tmp_path: Path
) -> None:
    """Its tokenizer belongs to the model that is written."""
    base, elsewhere = tmp_path / "base", tmp_path / "elsewhere"
    shutil.copytree(runs.MICRO, base)
    job = runs.job(tmp_path / "run", texts, model=base, full=True)
    with pytest.raises(TrainingError) as caught:
        train(job, on_progress=lambda step, steps, metrics: base.rename(elsewhere) if step == steps else None)
    assert f"{base} is gone" in runs.one_sentence(str(caught.value)) and not (tmp_path / "run/model").exists()
    elsewhere.rename(base)
    train(job, resume=True)
    assert (tmp_path / "run/model/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
