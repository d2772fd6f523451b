"""Held-out rows, asked and judged: what is measured is what the answers say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ivcore.tokenizer import Tokenizer
from train.evaluate import evaluate
from train.recipe_file import parse_recipe
from train.rows import read_rows
from train.samples import SampleBuilder
from train.toyworld.compose import make_script
from train.toyworld.render import write_clip

MICRO = Path(__file__).resolve().parents[1] / "data" / "reference" / "iv3-micro"


def row(question: Any, **reward: Any) -> dict[str, Any]:
    said = reward.pop("said", "x")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
    return {"messages": turns, "kind": reward.pop("kind", ""), **reward}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    write_clip(tmp_path / "clip.mp4", make_script(0, "when"))
    when = [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "When?"}]
    colours = {"choices": ["red", "blue"], "kind": "colour"}
    file = tmp_path / "held-out.jsonl"
    content = [
        row("1?", **colours, answer=0),
        row("2?", **colours, answer=1),
        row(when, span=[1.0, 3.0], kind="when"),
    ]
    file.write_text("".join(json.dumps(each) + "\n" for each in content))
    return file


class Parrot:
    """A model that gives the answers it was made with, one a question."""

    def __init__(self, tokenizer: Tokenizer, answers: list[str]) -> None:
        self._ids = [tokenizer.encode_pieces([answer]) for answer in answers]

    def generate(self, prompt: Any, *, max_tokens: int) -> Iterator[int]:
        yield from self._ids.pop(0)[:max_tokens]


@pytest.mark.parametrize(
    ("answers", "colour", "when"),
    [
        (["red", "blue", "1.0 to 3.0"], 1.0, 1.0),
        (["red", "red", "2.0 to 3.0"], 0.5, 0.5),
        (["green", "red or blue", "soon"], 0.0, 0.0),
    ],
)
def test_accuracy_and_iou_are_those_of_the_answers(rows: Path, answers: list[str], colour: float, when: float) -> None:
    tokenizer = Tokenizer.from_dir(MICRO)
    found = evaluate(Parrot(tokenizer, answers), tokenizer, read_rows(rows, "rl"), SampleBuilder(tokenizer))  # type: ignore[arg-type]
    assert {name: (kind.rows, kind.measure, kind.value) for name, kind in found.kinds.items()} == {
        "colour": (2, "accuracy", pytest.approx(colour)),
        "when": (1, "mean IoU", pytest.approx(when)),
    }
    assert found.mean == pytest.approx((colour + when) / 2)


def test_a_run_evaluates_when_its_recipe_says_and_at_its_end(rows: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from train.loop import Job, train

    recipe = parse_recipe(
        {"stage": "sft", "steps": 5, "evaluate_every": 2, "learning_rate": {"peak": 1e-3}, "lora": {"rank": 2}}
    )
    job = Job(recipe, str(MICRO), str(rows), tmp_path / "run", "torch", held_out=str(rows))
    folder = train(job)
    lines = [json.loads(line) for line in (folder.path / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert {name: kind["rows"] for name, kind in lines[0]["kinds"].items()} == {"colour": 2, "when": 1}


def test_rows_without_a_right_answer_are_not_asked(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row("Why?")) + "\n")
    tokenizer = Tokenizer.from_dir(MICRO)
    model = SimpleNamespace(generate=lambda *_, **__: pytest.fail("asked"))
    found = evaluate(model, tokenizer, read_rows(file, "sft"), SampleBuilder(tokenizer))  # type: ignore[arg-type]
    assert found.kinds == {} and found.mean == 0.0
