"""Whole runs as rl's environment: what each is worth, and which of its tokens are trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.calls import written
from agent.oracle.environment import PRICE, Acting
from agent.oracle.rows import FILMS, question_of
from agent.workspace import Workspace
from ivcore.backend import load
from ivcore.tokenizer import Tokenizer
from tests.agent.scripted import Scripted
from train.environment import Setting
from train.recipe_file import parse_recipe
from train.rows import read_rows
from train.samples import SampleBuilder
from train.tiny.template import terse_template
from train.toyworld.compose import make_script
from train.toyworld.questions import NOT_THERE, ask
from train.toyworld.render import write_clip

MICRO = Path(__file__).resolve().parents[1] / "data/reference/iv3-micro"
LOOK = written("look", {"start": 2.0, "end": 3.0, "fps": 2.0})


def says_nothing_of(text: str) -> str:
    return written("answer", {"text": text, "claims": [], "found": False})


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """Of one row, a question whose answer is not in its film, and three runs a step."""
    (tmp_path / FILMS).mkdir()
    script = make_script(2, "absent", 16.0)
    write_clip(film := tmp_path / FILMS / "film.mp4", script)
    raw = question_of(script, ask(script), Workspace(film, None, None))  # type: ignore[arg-type]
    (tmp_path / "rows.jsonl").write_text(json.dumps(raw) + "\n")
    base: dict[str, Any] = {
        "stage": "rl", "steps": 2, "batch": 1, "learning_rate": {"peak": 1e-3}, "environment": "acting",
        "rollout": {"rollouts": 3}, "data": {"max_tokens": 4000}, "lora": {"rank": 2},
    }  # fmt: skip
    recipe: Any = parse_recipe(base)
    terse = shutil.copytree(MICRO, tmp_path / "model")  # whole schemas would be thousands of tokens
    (terse / "chat_template.jinja").write_text(terse_template())
    tokenizer = Tokenizer.from_dir(terse)
    (phase,) = recipe.plan()
    rows = read_rows(tmp_path / "rows.jsonl", "rl")
    return Setting(recipe, phase, rows, SampleBuilder(tokenizer), tokenizer, 0)


def test_runs_are_judged_by_their_end_and_priced_by_their_calls(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.belief.ANSWER_TOKENS", 4)
    runs = [[says_nothing_of(NOT_THERE)], [LOOK, says_nothing_of(NOT_THERE)], [says_nothing_of("a red cross")]]
    said = [message for run in runs for message in run]
    model = Scripted(load(MICRO, "torch", "float32"), setting.tokenizer, said, least=64)
    (judged,) = Acting(setting).step(model)  # type: ignore[arg-type]
    np.testing.assert_allclose(judged.rewards, [1 - PRICE, 1 - 2 * PRICE, -PRICE])
    assert judged.kinds == {"right": [1, 1, 0], "shown": [1, 1, 1]}
    assert [cut_off for _, cut_off in judged.answers] == [False] * 3
    for number, run in enumerate(runs):
        sample = judged.sample(number)
        trained = setting.tokenizer.decode(sample.token_ids[sample.trained].tolist())
        assert trained.replace("<|im_end|>", "").replace("\n", "") == "".join(run).replace("\n", "")
        assert (sample.pixels is not None) == (LOOK in run)
        lengths = sum(len(setting.tokenizer.encode(each)) + 1 for each in run)
        assert judged.answers[number][0] == lengths
