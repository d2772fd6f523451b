"""The model that comes with the package: small, whole, and right about clips it has not seen, without a network."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ivcore.backend import load
from ivcore.config import ModelConfig
from ivcore.hub import PACKAGED, resolve
from ivcore.prompt import build_inputs
from ivcore.tokenizer import Tokenizer
from tests.agent.conftest import Run
from train.toyworld.compose import make_script
from train.toyworld.questions import ask
from train.toyworld.render import write_clip
from train.toyworld.script import SHORT_SECONDS, Script, seeds

FOLDER = PACKAGED["iv3-tiny"]
FIRST = 3_000  # of the held-out clips here: behind those that docs/results.md measures


def script(number: int, kind: str) -> Script:
    (seed,) = seeds("heldout", FIRST + number, 1)
    return make_script(seed, kind, SHORT_SECONDS)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"a connection to {arguments[-1]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("IV3_MODEL", raising=False)


def test_it_is_m2la_in_at_most_eight_megabytes() -> None:
    config = ModelConfig.from_dir(FOLDER)
    assert config.text.attention == "m2la"
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 8_000_000


def test_its_name_is_enough_and_a_folder_of_that_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("iv3-tiny") == FOLDER
    (tmp_path / "iv3-tiny").mkdir()
    assert resolve("iv3-tiny") == Path("iv3-tiny")


def test_its_hashes_hold(run: Run) -> None:
    code, _, err = run("verify", FOLDER)
    assert code == 0, err


def test_its_provenance_names_every_step() -> None:
    steps = [step["step"] for step in json.loads((FOLDER / "provenance.json").read_text())["steps"]]
    assert steps[0] == "norm-2" and steps[-1] == "iv3-tiny"
    assert [step.split("-")[0] for step in steps[2:-2]] == ["sft", "sft", "rl", "distill"]


def test_ask_needs_no_model_and_says_which_one_answers(run: Run, tmp_path: Path, no_network: None) -> None:
    played = script(0, "shape")
    write_clip(tmp_path / "clip.mp4", played)
    question = ask(played)
    code, out, err = run("ask", tmp_path / "clip.mp4", question.text)
    assert (code, out) == (0, f"{question.answer}\n")
    assert err.startswith("iv3: iv3-tiny answers, which knows nothing but figures that move") and "--model" in err
    code, out, err = run("ask", tmp_path / "clip.mp4", question.text, "-m", "iv3-tiny", "--json")
    assert (code, err) == (0, "") and json.loads(out)["dtype"] == "float32"


@pytest.mark.parametrize("kind", ["colour", "shape", "direction", "count", "order"])
def test_it_is_right_about_clips_that_it_has_not_seen(
    backends: dict[str, Any], tmp_path: Path, no_network: None, kind: str
) -> None:
    """Four of five at least: a model that guesses would pass all kinds less than once in a million times."""
    tokenizer = Tokenizer.from_dir(FOLDER)
    right = {name: 0 for name in backends}
    said: dict[str, list[str]] = {name: [] for name in backends}
    for number in range(5):
        played = script(number, kind)
        write_clip(tmp_path / f"{number}.mp4", played)
        question = ask(played)
        content = [{"type": "video", "video": str(tmp_path / f"{number}.mp4")}, {"type": "text", "text": question.text}]
        inputs = build_inputs(FOLDER, [{"role": "user", "content": content}])
        for name, model in backends.items():
            said[name].append(tokenizer.decode(list(model.generate(inputs, max_tokens=16))))
            right[name] += said[name][-1] == question.answer
    assert min(right.values()) >= 4, said
    assert len({tuple(each) for each in said.values()}) == 1


@pytest.fixture(scope="module")
def backends() -> dict[str, Any]:
    loaded: dict[str, Any] = {}
    for name, framework in (("torch", "torch"), ("mlx", "mlx.core")):
        pytest.importorskip(framework)
        loaded[name] = load(FOLDER, name, "float32")  # type: ignore[arg-type]
    return loaded


def test_the_demo_prints_questions_answers_truth_and_time() -> None:
    done = subprocess.run([sys.executable, "-m", "agent.demo"], capture_output=True, text=True, check=True)
    head, *rows = done.stdout.splitlines()[-4:]
    assert head.split() == ["question", "mlx", "torch", "truth", "mlx,", "s", "torch,", "s"]
    assert len(rows) == 3 and all("?" in row for row in rows)
