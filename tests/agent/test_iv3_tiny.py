"""The model that comes with the package: it is there, small enough, and answers with no --model and no network."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from agent import demo
from ivcore.config import ModelConfig
from ivcore.hub import PACKAGED, describe, resolve
from train.toyworld.compose import make_script
from train.toyworld.questions import ask
from train.toyworld.render import write_clip
from train.toyworld.script import seeds

Run = Callable[..., tuple[int, str, str]]
KINDS = "colour", "shape", "direction", "order"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"connects to {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_it_is_latent_attention_in_8_bits_at_most_8_mb_and_says_where_it_is_from() -> None:
    folder = resolve(PACKAGED)
    config = ModelConfig.from_dir(folder)
    assert config.text.attention == "m2la" and config.quantization is not None and config.quantization.bits == 8
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8_000_000
    steps = [step["step"] for step in json.loads((folder / "provenance.json").read_text())["steps"]]
    assert steps[0] == "norm-2" and steps[-1] == PACKAGED


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_questions_about_held_out_clips_are_answered_with_no_model_named_and_no_network(
    run: Run, tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.delenv("IV3_MODEL", raising=False)
    right = []
    for seed, kind in zip(seeds("heldout", 5_000, 3 * len(KINDS)), KINDS * 3, strict=True):
        script = make_script(seed, kind)
        clip = tmp_path / f"{seed}.mp4"
        write_clip(clip, script)
        question = ask(script)
        # A CPU's float16 is slow in MLX.
        code, out, err = run("ask", clip, question.text, "--backend", backend, "--dtype", "float32")
        assert (code, err) == (0, "")
        right.append(out.strip() == question.answer)
    assert sum(right) >= 9, right


def test_a_folder_of_its_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / PACKAGED).mkdir()
    before = resolve(PACKAGED)
    monkeypatch.chdir(tmp_path)
    assert before.is_absolute() and resolve(PACKAGED) == Path(PACKAGED)


def test_it_is_described_by_its_name() -> None:
    assert describe(PACKAGED).config["text_config"]["num_hidden_layers"] == 6


def test_the_demo_asks_both_backends_which_agree_then_runs_the_agent_on_a_film_and_reports(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "REPORT", report := tmp_path / "new/demo.html")
    demo.main()
    out, turns = capsys.readouterr()
    asked, acted = out.split("\nfilm ")
    for start in ("question", "torch", "mlx", "truth"):
        assert sum(line.startswith(start) for line in asked.splitlines()) == 3
    assert "ground" in turns and "look" in turns
    truth = next(line for line in acted.splitlines() if line.startswith("truth")).split()[1].rstrip(",")
    assert f"{truth}\n" in acted.split("question")[1] and "verified" in acted
    assert truth in report.read_text(encoding="utf-8")
