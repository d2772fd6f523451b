"""distill: the divergence of a step is that of the two models on the student's answers, and a step lowers it."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train.distill
from ivcore.prompt import build_inputs
from ivcore.tokenizer import Tokenizer
from train.distill import DistillStage, load_guides, teacher_framing
from train.recipe_file import parse_recipe
from train.rollouts import Group
from train.rows import read_rows
from train.samples import Framing, SampleBuilder
from train.trainer import make_trainer

SETTINGS: dict[str, Any] = {
    "stage": "distill", "steps": 9, "batch": 2, "checkpointing": False, "learning_rate": {"peak": 1e-2},
    "rollout": {"rollouts": 2, "max_tokens": 6}, "data": {"max_tokens": 512, "max_frames": 2, "min_frames": 2},
    "lora": {"rank": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tools: Any) -> Any:
    return tools.neighbour("train", "runs")


@pytest.fixture(scope="module")
def data(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of eight frames, an image, and a text."""
    folder = tmp_path_factory.mktemp("data")
    return runs.write_rows(folder / "rows.jsonl", [*runs.media_rows(folder), runs.text_rows(1)[0]])


class Bench:
    """A stage on a trainer, and the groups that it rolled out."""

    def __init__(self, file: Path, student: Path, backend: str, **changes: Any) -> None:
        self.recipe: Any = parse_recipe(SETTINGS | changes)
        self.model = importlib.import_module(f"iv{backend}").load(student)
        self.trainer: Any = make_trainer(self.model, self.recipe)
        self.framing = Framing(max_frames=2, min_frames=2)
        builder = SampleBuilder(Tokenizer.from_dir(student), self.framing)
        self.shown = teacher_framing(self.recipe.teacher, self.framing)
        (phase,) = self.recipe.plan()
        rows = read_rows(file, "distill")
        guides = load_guides(
            self.recipe, self.trainer, student, backend, None,  # type: ignore[arg-type]
            rows.datasets, lambda tokenizer: SampleBuilder(tokenizer, self.shown),
        )  # fmt: skip
        self.stage = DistillStage(self.recipe, phase, rows, builder, guides, 0)

    @property
    def groups(self) -> list[Group]:
        return self.stage._last

    def step(self, update: Callable[[], Any] = lambda: None) -> dict[str, float]:
        return self.stage.step(self.trainer, update)

    def gradient_and_metrics(self) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        found: dict[str, np.ndarray] = {}
        metrics = self.step(lambda: found.update(self.trainer.gradients()))
        return found, metrics

    def scores(self, model: Any, tokenizer: Path, framing: Framing) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities (K, vocab) at the places of all answers, from inference, and the tokens there."""
        found, tokens = [], []
        for group in self.groups:
            how = {"fps": framing.fps, "max_frames": framing.max_frames, "min_frames": framing.min_frames}
            prompt = build_inputs(tokenizer, group.row.prompt(), **how)  # type: ignore[arg-type]
            for answer in group.answers:
                token_ids = np.array([*prompt.token_ids, *answer.token_ids], np.int32)
                logits = np.asarray(model.logits(replace(prompt, token_ids=token_ids)), np.float64)
                logits = logits[-len(answer) - 1 : -1]
                found.append(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))
                tokens += answer.token_ids
        return np.concatenate(found), np.array(tokens)


def divergence(one: np.ndarray, other: np.ndarray) -> float:
    """KL(one || other), the mean over places."""
    return float((np.exp(one) * (one - other)).sum(axis=-1).mean())


@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize("frames", [2, 8])
def test_the_loss_is_the_divergence_of_the_two_models_each_with_its_own_view(
    runs: Any, data: Path, backend: str, share: float, frames: int
) -> None:
    """The student is M2LA, the teacher GQA, on four times the frames."""
    path = runs.REFERENCE / "qwen3vl-micro"
    bench = Bench(data, runs.MICRO, backend, forward_share=share, batch=4,
                  teacher={"model": str(path), "max_frames": frames})  # fmt: skip
    metrics = bench.step()
    teacher = importlib.import_module(f"iv{backend}").load(path)
    student, tokens = bench.scores(bench.model, runs.MICRO, bench.framing)
    other, _ = bench.scores(teacher, path, bench.shown)
    seen = [tuple(len(prompt.token_ids) for prompt in group.prompts) for group in bench.groups if group.row.media]
    assert any(shown > own for own, shown in seen) == (frames > 2)
    assert metrics["kl"] == pytest.approx(divergence(student, other), rel=1e-4)
    assert metrics["forward_kl"] == pytest.approx(divergence(other, student), rel=1e-4)
    assert metrics["loss"] == pytest.approx((1 - share) * metrics["kl"] + share * metrics["forward_kl"], rel=1e-5)
    assert metrics["entropy"] == pytest.approx(-(np.exp(student) * student).sum(axis=-1).mean(), rel=1e-4)
    assert metrics["answer_tokens"] == len(tokens) / 8 and metrics["rows"] == 4


def test_the_sampled_loss_is_the_mean_of_what_the_student_is_ahead_by(runs: Any, data: Path, backend: str) -> None:
    path = runs.REFERENCE / "qwen3vl-micro"
    bench = Bench(data, runs.MICRO, backend, vocabulary="sampled", teacher={"model": str(path), "max_frames": 8})
    metrics = bench.step()
    teacher = importlib.import_module(f"iv{backend}").load(path)
    student, tokens = bench.scores(bench.model, runs.MICRO, bench.framing)
    other, _ = bench.scores(teacher, path, bench.shown)
    places = np.arange(len(tokens))
    assert metrics["loss"] == pytest.approx((student - other)[places, tokens].mean(), rel=1e-4)
    assert metrics["kl"] == metrics["loss"] and "forward_kl" not in metrics


@pytest.fixture(scope="module")
def two_sets(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text by the name of `said`, and what is to be seen as `shown`."""
    folder = tmp_path_factory.mktemp("sets")
    rows = {"said": runs.text_rows(1), "shown": runs.media_rows(folder)}
    files = {name: runs.write_rows(folder / f"{name}.jsonl", each) for name, each in rows.items()}
    meta = {name: {"annotation": str(file), "media_root": str(folder)} for name, file in files.items()}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder / "meta.json"


@pytest.mark.parametrize("vocabulary", ["full", "sampled"])
def test_every_data_set_has_its_own_teacher(runs: Any, two_sets: Path, backend: str, vocabulary: str) -> None:
    """The student itself teaches the texts, so all of the divergence is that from the other one at what is shown."""
    path = runs.REFERENCE / "qwen3vl-micro"
    bench = Bench(two_sets, runs.MICRO, backend, vocabulary=vocabulary, batch=4,
                  teacher={"by_dataset": {"shown": str(path)}})  # fmt: skip
    metrics = bench.step()
    teacher = importlib.import_module(f"iv{backend}").load(path)
    student, tokens = bench.scores(bench.model, runs.MICRO, bench.framing)
    other, _ = bench.scores(teacher, path, bench.shown)
    shown = np.repeat(
        [group.row.dataset == "shown" for group in bench.groups],
        [sum(map(len, group.answers)) for group in bench.groups],
    )
    assert 0 < shown.sum() < len(shown)
    ahead = (np.exp(student) * (student - other)).sum(axis=-1)
    if vocabulary == "sampled":
        ahead = (student - other)[np.arange(len(tokens)), tokens]
    assert metrics["kl"] == pytest.approx((ahead * shown).mean(), rel=1e-4)


def test_a_teacher_that_is_not_there_or_of_a_data_set_that_is_not_is_refused_and_nothing_written(
    runs: Any, two_sets: Path, tmp_path: Path
) -> None:
    said = {
        name: runs.refused(
            runs.job(tmp_path / "run", two_sets, **SETTINGS | {"teacher": {"by_dataset": {name: model}}})
        )
        for name, model in (("show", str(runs.MICRO)), ("shown", str(tmp_path / "nowhere")))
    }
    hint = "teacher.by_dataset names the data set 'show', which the data does not have; the nearest is 'shown'"
    assert hint in said["show"] and "nowhere does not exist" in said["shown"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("vocabulary", ["full", "sampled"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_teacher_that_is_the_student_teaches_nothing(
    runs: Any, data: Path, backend: str, vocabulary: str, full: bool
) -> None:
    bench = Bench(data, runs.MICRO, backend, vocabulary=vocabulary, full=full)
    gradient, metrics = bench.gradient_and_metrics()
    other = Bench(data, runs.MICRO, backend, vocabulary=vocabulary, full=full, teacher={"max_frames": 8})
    moved, different = other.gradient_and_metrics()
    size, usual = (np.sqrt(sum((array**2).sum() for array in each.values())) for each in (gradient, moved))
    assert abs(metrics["loss"]) < 1e-5 and abs(different["loss"]) > 1e-3
    assert size < 1e-4 * usual


@pytest.mark.parametrize("vocabulary", ["full", "sampled"])
def test_the_teacher_is_the_model_that_training_began_from_and_not_the_student_as_it_is(
    runs: Any, data: Path, backend: str, tools: Any, vocabulary: str
) -> None:
    bench = Bench(data, runs.MICRO, backend, vocabulary=vocabulary)
    bench.step(lambda: tools.randomize(bench.trainer))
    assert abs(bench.step()["kl"]) > 1e-3


@pytest.mark.parametrize("vocabulary", ["full", "sampled"])
def test_steps_bring_the_student_closer_to_the_teacher(runs: Any, data: Path, backend: str, vocabulary: str) -> None:
    """Measured as the divergence over the whole vocabulary, on the answers of the first step."""
    path = runs.REFERENCE / "qwen3vl-micro"
    bench = Bench(data, runs.MICRO, backend, vocabulary=vocabulary, teacher={"model": str(path)}, batch=1,
                  rollout={"rollouts": 8, "max_tokens": 8})  # fmt: skip
    teacher = importlib.import_module(f"iv{backend}").load(path)
    seen: list[float] = []

    def update() -> None:
        other, _ = bench.scores(teacher, path, bench.shown)
        seen.append(divergence(bench.scores(bench.model, runs.MICRO, bench.framing)[0], other))
        bench.trainer.apply(1e-3, 1.0)
        seen.append(divergence(bench.scores(bench.model, runs.MICRO, bench.framing)[0], other))

    for _ in range(2):
        bench.step(update)
    assert seen[1] < seen[0] - 1e-3 and seen[3] < seen[2] - 1e-3


@pytest.mark.parametrize("vocabulary", ["full", "sampled"])
def test_a_step_divided_into_packs_has_the_gradient_of_one(
    runs: Any, data: Path, backend: str, tools: Any, monkeypatch: pytest.MonkeyPatch, vocabulary: str
) -> None:
    """By tokens, where the teacher's rows are longer and make other packs, or by what its scores take."""
    found = []
    for most, held in ((160, 1 << 20), (2048, 4 * 512 * 13), (2048, 1 << 20)):
        monkeypatch.setattr(train.distill, "HELD_BYTES", held)
        bench = Bench(data, runs.MICRO, backend, vocabulary=vocabulary, batch=4, data={"max_tokens": most},
                      teacher={"max_frames": 8})  # fmt: skip
        found.append(tools.randomize(bench.trainer) and bench.gradient_and_metrics())
    for gradient, metrics in found[:2]:
        assert metrics == pytest.approx(found[2][1], rel=1e-4)
        assert tools.furthest(gradient, found[2][0]) < 1e-4


def test_a_teacher_of_another_vocabulary_is_refused(
    runs: Any, data: Path, tmp_path: Path, write_random: Callable[..., Any]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(runs.MICRO, other)
    raw = json.loads((other / "config.json").read_text())
    (other / "model.safetensors").unlink()
    write_random(other, raw | {"text_config": raw["text_config"] | {"vocab_size": 520}})
    changes = {key: value for key, value in SETTINGS.items() if key != "lora"} | {"teacher": {"model": str(other)}}
    said = runs.refused(runs.job(tmp_path / "run", data, **changes))
    assert "a vocabulary of 520 tokens, but the student's has 512" in said and str(other) in said


@pytest.mark.parametrize("vocabulary", ["full", "sampled"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    runs: Any, data: Path, tmp_path: Path, backend: str, vocabulary: str
) -> None:
    changes = SETTINGS | {"vocabulary": vocabulary, "teacher": {"max_frames": 8}, "steps": 4,
                          "lora": {"rank": 3, "dropout": 0.25}}  # fmt: skip
    whole, part = (runs.job(tmp_path / name, data, backend, **changes) for name in ("whole", "part"))
    runs.run(whole)
    with pytest.raises(runs.Stopped):
        runs.run(part, stop=3)
    runs.run(part, resume=True)
    runs.same(runs.outcome(part.out), runs.outcome(whole.out))
    assert [each["step"] for each in runs.metrics(whole.out)] == [1, 2, 3, 4]
