"""`iv3 train` as a user runs it: its commands and their help, a short run, its picture, and what is said on stderr."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MICRO = Path(__file__).resolve().parents[1] / "data/reference/iv3-micro"
ROOT = Path(__file__).resolve().parents[2]
STAGES = ("cpt", "sft", "rl", "distill")
RECIPE = """
stage = "sft"
steps = 4
save_every = 2
checkpointing = false
[learning_rate]
peak = 1e-2
[lora]
rank = 2
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """What every run here is told: recipe, model and data."""
    asked = [{"role": "user", "content": f"What is {number}?"} for number in range(4)]
    said = [{"role": "assistant", "content": ("even", "odd")[number % 2]} for number in range(4)]
    rows = [
        {"messages": list(turns), "choices": ["even", "odd"], "answer": 0} for turns in zip(asked, said, strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    recipe, data = tmp_path / "recipe.toml", tmp_path / "rows.jsonl"
    return ["--recipe", str(recipe), "--model", str(MICRO), "--data", str(data)]


@pytest.fixture(params=["mlx", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(f"iv{request.param}")
    return str(request.param)


@pytest.fixture
def torch_only() -> None:
    pytest.importorskip("torch")


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# Commands and help.


@pytest.mark.parametrize("wrong", [("foo",), ("foo", "--recipe", "x"), ("sftt", "--out", "y")])
def test_a_command_that_does_not_exist_is_one_sentence_that_names_those_that_do(run: Run, wrong: tuple[str]) -> None:
    code, out, err = run("train", *wrong)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith(f"iv3: iv3 train has no command '{wrong[0]}', only cpt, sft, rl, distill and plot;")
    assert "see iv3 train --help." in err


def test_help_shows_examples_and_the_commands(run: Run) -> None:
    code, out, _ = run("train", "--help")
    assert code == 0 and "Examples:" in out and "iv3 train sft --recipe" in out and "iv3 train plot" in out
    assert all(f"\n  {command} " in out for command in (*STAGES, "plot"))
    assert "..." not in out.split("Commands:")[1].split("Examples:")[0]
    assert run("train")[:2] == (2, out)


def test_the_stages_have_the_same_options_and_examples_of_their_own(run: Run) -> None:
    options = set()
    for stage in STAGES:
        code, out, _ = run("train", stage, "--help")
        assert code == 0 and f"iv3 train {stage} --recipe mac16-{stage} " in out
        options.add(out.split("Options:")[1].split("Examples:")[0])
    (same,) = options
    names = ("recipe", "model", "data", "out", "backend", "dtype", "held-out", "set", "resume", "tensorboard")
    assert all(f"--{name}" in same for name in names)
    assert "iv3 train plot" in run("train", "plot", "--help")[1]


def test_a_missing_option_is_one_sentence_that_names_the_help(run: Run) -> None:
    code, out, err = run("train", "sft", "--model", MICRO)
    assert (code, out) == (2, "") and err == "iv3: Missing option '--recipe'; see iv3 train sft --help.\n"


def test_help_imports_neither_numpy_nor_a_framework_nor_matplotlib() -> None:
    code = (
        "import sys, agent.cli\n"
        "for command in ([], ['sft'], ['plot']):\n"
        "    try: agent.cli.main(['train', *command, '--help'])\n"
        "    except SystemExit: pass\n"
        "assert not {'torch', 'mlx', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr


# A run.


def test_a_run_prints_where_its_adapter_is_and_its_memory_is_measured(
    run: Run, files: list[str], tmp_path: Path, backend: str
) -> None:
    out = tmp_path / "run"
    assert run("train", "sft", *files, "--out", out, "--backend", backend) == (0, f"{out / 'adapter'}\n", "")
    logged = lines(out / "metrics.jsonl")
    assert [each["step"] for each in logged] == [1, 2, 3, 4]
    model = importlib.import_module(f"iv{backend}").load(MICRO)
    peaks = [each["peak_bytes"] for each in logged]
    assert peaks == sorted(peaks) and peaks[0] > model.weight_bytes > 0


@pytest.mark.usefixtures("torch_only")
def test_a_recipe_of_another_stage_is_one_sentence(files: list[str], tmp_path: Path, failure: Any) -> None:
    sentence = failure("train", "rl", *files, "--out", tmp_path / "run", "--backend", "torch")
    assert "sft" in sentence and "rl" in sentence and not (tmp_path / "run").exists()


@pytest.mark.usefixtures("torch_only")
def test_evaluations_that_have_no_rows_are_pointed_out_once(run: Run, files: list[str], tmp_path: Path) -> None:
    often = ("--backend", "torch", "--set", "evaluate_every=2")
    code, _, err = run("train", "sft", *files, "--out", tmp_path / "a", *often)
    assert code == 0 and len(err.splitlines()) == 1 and "evaluate_every is 2" in err and "--held-out" in err
    code, _, err = run("train", "sft", *files, "--out", tmp_path / "b", *often, "--held-out", tmp_path / "rows.jsonl")
    assert (code, err) == (0, "")
    assert [each["step"] for each in lines(tmp_path / "b" / "evaluations.jsonl")] == [2, 4]


@pytest.mark.usefixtures("torch_only")
def test_tensorboard_is_written_when_asked_for(run: Run, files: list[str], tmp_path: Path) -> None:
    for name, option in (("without", []), ("with", ["--tensorboard"])):
        assert run("train", "sft", *files, "--out", tmp_path / name, "--backend", "torch", *option)[0] == 0
    assert not (tmp_path / "without" / "tensorboard").exists()
    (file,) = (tmp_path / "with" / "tensorboard").iterdir()
    assert file.name.startswith("events.out.tfevents.") and file.read_bytes().count(b"train/loss") == 4


@pytest.mark.usefixtures("torch_only")
def test_a_run_goes_on_where_tensorboard_cannot_be_written(
    run: Run, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ivcore.errors import TrainingError
    from train.tensorboard import TensorBoard

    def refuse(self: TensorBoard, step: int, metrics: Any) -> None:
        raise TrainingError("The disk is full.")

    monkeypatch.setattr(TensorBoard, "add", refuse)
    code, out, err = run("train", "sft", *files, "--out", tmp_path / "run", "--backend", "torch", "--tensorboard")
    assert (code, out) == (0, f"{tmp_path / 'run' / 'adapter'}\n")
    assert err == "iv3: The disk is full. TensorBoard shows nothing from step 1 on.\n"


@pytest.mark.usefixtures("torch_only")
def test_a_folder_in_which_another_process_trains_is_one_sentence(
    run: Run, files: list[str], tmp_path: Path, failure: Any
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    held = os.open(out, os.O_RDONLY)  # a lock of its own, as another process has one
    fcntl.flock(held, fcntl.LOCK_EX)
    sentence = failure("train", "sft", *files, "--out", out, "--backend", "torch")
    assert "nother process is training in" in sentence and str(out) in sentence
    os.close(held)
    assert run("train", "sft", *files, "--out", out, "--backend", "torch")[0] == 0


# Its picture.


@pytest.mark.usefixtures("torch_only")
def test_plot_draws_one_run_beside_it_and_several_where_told(
    run: Run, files: list[str], tmp_path: Path, failure: Any
) -> None:
    pytest.importorskip("matplotlib")
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        assert run("train", "sft", *files, "--out", folder, "--backend", "torch")[0] == 0
    assert run("train", "plot", folders[0]) == (0, f"{folders[0] / 'curves.png'}\n", "")
    assert "--out FILE.png" in failure("train", "plot", *folders)
    together = tmp_path / "both.png"
    assert run("train", "plot", *folders, "--out", together) == (0, f"{together}\n", "")
    assert together.read_bytes().startswith(b"\x89PNG") and (folders[0] / "curves.png").is_file()
    # A picture in its folder does not keep a run from going on.
    assert run("train", "sft", *files, "--out", folders[0], "--backend", "torch", "--resume")[0] == 0


def test_plot_of_no_run_is_one_sentence(tmp_path: Path, failure: Any) -> None:
    assert str(tmp_path) in failure("train", "plot", tmp_path)
