"""rl: which answers a step makes likelier and by how much, which it leaves alone, and what it says about it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train.rollouts
from ivcore.prompt import build_inputs
from ivcore.tokenizer import Tokenizer
from ivcore.training import NextToken
from train.environment import Setting, SingleTurn
from train.recipe import RlRecipe
from train.recipe_file import parse_recipe
from train.rl import PolicyStage, load_reference
from train.rollouts import Answer, packs
from train.rows import Rows, read_rows
from train.samples import SampleBuilder
from train.trainer import make_trainer

END, OTHER = 504, 500
LETTERS = ("A", "B", "C.", "D: so it is")


@pytest.fixture(scope="module")
def runs(tools: Any) -> Any:
    return tools.neighbour("train", "runs")


def question(number: int, right: int = 0) -> dict[str, Any]:
    """A multiple choice without any clip; each number has its own colours."""
    choices = [f"{colour}{number}" for colour in ("red", "blue", "green", "grey")]
    message = {"role": "user", "content": f"Which is {number}? " + ", ".join(choices)}
    return {"messages": [message], "choices": choices, "answer": right}


@dataclass
class Bench:
    """A stage on a trainer, with the answers to be sampled set by hand."""

    stage: PolicyStage
    trainer: Any
    rows: Rows
    builder: SampleBuilder
    tokenizer: Tokenizer
    recipe: RlRecipe

    def step(self, update: Callable[[], None] = lambda: None) -> dict[str, float]:
        return self.stage.step(self.trainer, update)

    def apply(self, learning_rate: float = 1e-3) -> None:
        self.trainer.apply(learning_rate, None)

    def answer(self, text: str, *, end: bool = True) -> Answer:
        return Answer((*self.tokenizer.encode(text), *([END] if end else [])), cut_off=not end)

    def logprobs(self, row: int, answers: Sequence[Answer]) -> list[float]:
        """Of whole answers to a row, from inference: the sum over their tokens."""
        prompt, found = self.builder.prompt(self.rows[row]), []
        for answer in answers:
            sample = self.builder.rollout("", prompt, answer.token_ids)
            inputs = replace(prompt, token_ids=sample.token_ids, position_ids=None)
            logits = np.asarray(self.trainer.model.logits(inputs), np.float64)[-len(answer) - 1 : -1]
            scores = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            found.append(float(scores[np.arange(len(answer)), answer.token_ids].sum()))
        return found


@pytest.fixture
def make_bench(runs: Any, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    """Function (rows, texts by row, **recipe): a text that begins with ~ is cut off before its end."""

    def make(raw: Sequence[Any], said: Sequence[Sequence[str]], **changes: Any) -> Bench:
        rows = read_rows(runs.write_rows(tmp_path / "rows.jsonl", raw), "rl")
        base: dict[str, Any] = {
            "stage": "rl", "steps": 9, "batch": len(said), "checkpointing": False, "learning_rate": {"peak": 1e-2},
            "rollout": {"rollouts": len(said[0]), "max_tokens": 20}, "data": {"max_tokens": 200}, "lora": {"rank": 3},
        }  # fmt: skip
        recipe: Any = parse_recipe(base | changes)
        model = importlib.import_module(f"iv{backend}").load(runs.MICRO)
        trainer, tokenizer = make_trainer(model, recipe), Tokenizer.from_dir(runs.MICRO)
        builder = SampleBuilder(tokenizer)
        reference = load_reference(recipe, trainer, runs.MICRO, backend, None)  # type: ignore[arg-type]
        (phase,) = recipe.plan()
        environment = SingleTurn(Setting(recipe, phase, rows, builder, tokenizer, 0))
        stage = PolicyStage(recipe, phase, environment, reference)
        bench = Bench(stage, trainer, rows, builder, tokenizer, recipe)
        prompts = [tuple(builder.prompt(row).token_ids) for row in rows]
        answers = [
            tuple(bench.answer(text.removeprefix("~"), end=not text.startswith("~")) for text in each) for each in said
        ]
        monkeypatch.setattr(
            train.rollouts, "roll_out", lambda model, prompt, *_: answers[prompts.index(tuple(prompt.token_ids))]
        )
        return bench

    return make


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_step_makes_the_rewarded_answer_likelier_and_the_others_less_so(
    make_bench: Callable[..., Bench], full: bool
) -> None:
    bench = make_bench([question(7)], [LETTERS], full=full)
    answers = [bench.answer(text) for text in LETTERS]
    before = bench.logprobs(0, answers)
    bench.step(lambda: bench.apply(1e-4 if full else 1e-3))
    after = bench.logprobs(0, answers)
    assert after[0] > before[0] + 1e-3
    assert sum(after[1:]) < sum(before[1:]) - 1e-3


@pytest.mark.parametrize("scale_by_std", [False, True])
def test_the_first_gradient_is_the_mean_over_tokens_of_the_advantage_times_that_of_the_log_probability(
    make_bench: Callable[..., Bench], tools: Any, scale_by_std: bool
) -> None:
    """Which is that of cross entropy on the answers above the mean, less that on those below it, each weighted."""
    said = [["A", "A", "B", "a long answer: C"], ["D", "D", "D", "D"], ["B", "C", "C", "C"]]
    bench = make_bench([question(number) for number in (1, 2, 3)], said, scale_by_std=scale_by_std)
    tools.randomize(bench.trainer)
    found: dict[str, np.ndarray] = {}
    bench.step(lambda: found.update(bench.trainer.gradients()))
    # Of row 0 two answers are right; all of row 1 are wrong, and so are those of row 2.
    metrics_rewards, deviation = np.array([1, 1, 0, 0]), 0.5
    advantages = (metrics_rewards - 0.5) / (deviation if scale_by_std else 1)
    answers = [bench.answer(text) for text in said[0]]
    tokens = sum(len(answer) for answer in answers)
    prompt = bench.builder.prompt(bench.rows[0])
    expected = {name: np.zeros(shape) for name, shape in bench.trainer.trainable.items()}
    bench.trainer.set_gradients({name: np.zeros(shape, np.float32) for name, shape in bench.trainer.trainable.items()})
    bench.apply(0.0)
    for answer, advantage in zip(answers, advantages, strict=True):
        sample = bench.builder.rollout("", prompt, answer.token_ids)
        for _, batch in packs([sample], tokens, 999):
            bench.trainer.accumulate(batch, NextToken())
        for name, gradient in bench.trainer.gradients().items():
            expected[name] += advantage * gradient
        bench.apply(0.0)
    assert tools.furthest(found, expected) < 2e-4


def test_groups_without_spread_change_nothing_and_are_counted(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench([question(1), question(2)], [["B", "C"], ["A", "A. red2"]])
    before = bench.trainer.state()
    metrics = bench.step(lambda: pytest.fail("an update"))
    assert (metrics["updates"], metrics["skipped_groups"], metrics["rows"]) == (0, 2, 2)
    assert metrics["reward"] == metrics["reward_choice"] == 0.5
    for name, array in bench.trainer.state().items():
        np.testing.assert_array_equal(array, before[name])
    assert not any(gradient.any() for gradient in bench.trainer.gradients().values())


def test_a_group_with_spread_learns_the_same_beside_one_without(make_bench: Callable[..., Bench], tools: Any) -> None:
    found: list[dict[str, np.ndarray]] = []
    for raw, said in (([question(1)], [["A", "B"]]), ([question(1), question(2)], [["A", "B"], ["C", "C"]])):
        bench = make_bench(raw, said)
        tools.randomize(bench.trainer)
        bench.step(lambda bench=bench: found.append(bench.trainer.gradients()))  # type: ignore[misc]
    assert tools.furthest(found[1], found[0]) < 1e-5


def test_a_step_divided_into_packs_has_the_gradient_of_one(make_bench: Callable[..., Bench], tools: Any) -> None:
    found: list[tuple[dict[str, float], dict[str, np.ndarray]]] = []
    for most in (70, 1000):
        bench = make_bench([question(1)], [LETTERS], data={"max_tokens": most}, kl_weight=0.5)
        tools.randomize(bench.trainer)
        gradients: dict[str, np.ndarray] = {}
        metrics = bench.step(lambda bench=bench, to=gradients: to.update(bench.trainer.gradients()))  # type: ignore[misc]
        found.append((metrics, gradients))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4, abs=1e-6)
    assert tools.furthest(found[0][1], found[1][1]) < 1e-4


def test_the_metrics_of_a_step_are_those_of_its_answers(make_bench: Callable[..., Bench]) -> None:
    said = [["A", "~no end but A", "B", "C"]]
    weights = {"choice": 1.0, "iou": 1.0, "format": 0.5}
    bench = make_bench([question(1)], said, rewards={"weights": weights, "form": "[AB]"})
    metrics = bench.step()
    lengths = [len(bench.tokenizer.encode(text.removeprefix("~"))) + (text[0] != "~") for text in said[0]]
    assert metrics["reward_choice"] == 0.5 and metrics["reward_format"] == 0.5 and "reward_iou" not in metrics
    assert metrics["reward"] == pytest.approx(0.5 + 0.5 * 0.5)
    assert metrics["answer_tokens"] == np.mean(lengths) and metrics["longest_answer"] == max(lengths)
    assert metrics["cut_off"] == 0.25 and metrics["skipped_groups"] == 0 and metrics["updates"] == 1
    assert metrics["tokens"] == sum(lengths) + len(bench.builder.prompt(bench.rows[0]).token_ids)
    assert 0 < metrics["entropy"] < math.log(512) and metrics["clipped"] == 0 and metrics["epoch"] == 1


def test_an_answer_near_the_most_tokens_has_a_lower_reward(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench([question(1)], [["A", "A and that is a very long story"]], overlong_buffer=20)
    lengths = [len(bench.answer(text)) for text in ("A", "A and that is a very long story")]
    assert lengths[1] <= 20  # rollout.max_tokens
    metrics = bench.step()
    assert metrics["reward_choice"] == 1
    assert metrics["reward"] == pytest.approx(1 - np.mean(lengths) / 20)
    assert metrics["skipped_groups"] == 0


@pytest.mark.parametrize("masked", [False, True])
def test_an_answer_that_was_cut_off_is_left_out_if_it_is_masked(make_bench: Callable[..., Bench], masked: bool) -> None:
    bench = make_bench([question(1)], [["A", "~B"]], mask_cut_off=masked)
    answers = [bench.answer("A"), bench.answer("B", end=False)]
    counted: list[int] = []
    accumulate = bench.trainer.accumulate
    bench.trainer.accumulate = lambda batch, loss: counted.append(len(batch.places)) or accumulate(batch, loss)
    bench.step()
    assert sum(counted) == len(answers[0]) + (0 if masked else len(answers[1]))


def test_later_updates_are_clipped_against_the_policy_that_sampled(make_bench: Callable[..., Bench]) -> None:
    updates: list[None] = []
    for learning_rate, clipped in ((1e-7, False), (3e-2, True)):
        bench = make_bench([question(1)], [LETTERS], updates=3)
        metrics = bench.step(lambda bench=bench, rate=learning_rate: updates.append(bench.apply(rate)))  # type: ignore[misc]
        assert metrics["updates"] == 3 and 0 < metrics["entropy"] < math.log(512)
        assert (metrics["clipped"] > 0.1) == clipped
    assert len(updates) == 6


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_penalty_is_for_leaving_the_model_that_training_began_from(
    make_bench: Callable[..., Bench], full: bool
) -> None:
    bench = make_bench([question(1)], [LETTERS], kl_weight=0.1, full=full)
    kls = [bench.step(lambda: bench.apply(1e-3))["kl"] for _ in range(3)]
    assert kls[0] == pytest.approx(0, abs=1e-6)
    assert kls[1] > 1e-3
    assert "kl" not in make_bench([question(1)], [LETTERS]).step()


def test_a_loss_that_is_not_a_number_names_the_rows(make_bench: Callable[..., Bench], tools: Any) -> None:
    bench = make_bench([question(1), question(2)], [["A", "B"], ["A", "B"]])
    state = bench.trainer.state()
    bench.trainer.load_state({name: array * np.nan if "lora_B" in name and name.startswith("weight") else array
                              for name, array in state.items()})  # fmt: skip
    with pytest.raises(Exception, match=r"the loss of rows (0, 1|1, 0) is nan"):
        bench.step()


RL: dict[str, Any] = {
    "stage": "rl", "rollout": {"rollouts": 3, "max_tokens": 5}, "data": {"max_tokens": 512, "max_frames": 4},
    "rewards": {"weights": {"format": 1.0}, "form": ".*[a-e].*"}, "updates": 2, "kl_weight": 0.05,
}  # fmt: skip


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(runs: Any, tmp_path: Path, backend: str) -> None:
    """With a clip, dropout, two updates a step and a reference."""
    clips = [row | {"choices": ["red", "blue"], "answer": 0} for row in runs.media_rows(tmp_path)[1:]]
    data = runs.write_rows(tmp_path / "rows.jsonl", [*clips, question(1), question(2)])
    whole, part = (runs.job(tmp_path / name, data, backend, **RL, lora={"dropout": 0.25}) for name in ("whole", "part"))
    runs.run(whole)
    with pytest.raises(runs.Stopped):
        runs.run(part, stop=3)
    runs.run(part, resume=True)
    runs.same(runs.outcome(part.out), runs.outcome(whole.out))
    metrics = runs.metrics(whole.out)
    assert any(each["updates"] == 2 for each in metrics)
    for each in metrics:
        assert (each["gradient_norm"] is None) == (each["updates"] == 0)


def test_the_prompts_of_a_run_leave_room_for_answers(runs: Any, tmp_path: Path) -> None:
    length = len(build_inputs(runs.MICRO, question(1)["messages"]).token_ids)
    data = runs.write_rows(tmp_path / "rows.jsonl", [question(1)])
    changes = RL | {"data": {"max_tokens": length + 4}}
    assert f"takes {length} tokens but the context holds {length - 1}" in runs.refused(
        runs.job(tmp_path / "short", data, **changes)
    )
    runs.run(runs.job(tmp_path / "run", data, **RL | {"data": {"max_tokens": length + 5}}, steps=1))
    assert "which leaves no room for a prompt" in runs.refused(
        runs.job(tmp_path / "none", data, **RL | {"data": {"max_tokens": 5}})
    )
