"""`make tiny`: its steps fit together, and made small the whole of it runs, once."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from agent import cli
from agent.oracle import dataset
from ivcore.config import ModelConfig
from ivcore.errors import TrainingError
from train.recipe_file import read_recipe
from train.tiny import base as base_rows
from train.tiny import pipeline
from train.tiny.base import HELDOUT_CLIPS
from train.tiny.start import write_start
from train.toyworld.dataset import write_dataset


def option(arguments: tuple[str, ...], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def test_every_step_reads_what_an_earlier_one_made() -> None:
    base, out = Path("base"), Path("out")
    made, rows = {base / "model"}, {base / "data/rows.json", *(out / f"data/{stage}.json" for stage in pipeline.SETS)}
    names = []
    for step in pipeline.steps(base, out, []):
        training = step.arguments[0] == "train"
        source = Path(option(step.arguments, "--model") if training else step.arguments[1])
        assert source in made or source.parent in made, step
        if training:
            assert Path(option(step.arguments, "--data")) in rows
            recipe = option(step.arguments, "--recipe")
            given = [key for name, key in pairwise(step.arguments) if name == "--set"]
            read = read_recipe(recipe, given, stage=step.arguments[1])  # type: ignore[arg-type]
            assert read.stage == step.arguments[1] and read.full == (recipe.removeprefix("tiny/") not in pipeline.LORAS)
        made.add(step.made)
        names.append(step.name)
    assert len(set(names)) == len(names)
    seeds, variants = len(pipeline.SEEDS), len(pipeline.LAYOUTS) * len(pipeline.RATIOS)
    a_seed = variants + len(pipeline.CHAIN) + len(pipeline.LORAS)
    assert len(names) == variants + seeds * a_seed + len(pipeline.ACTING) + 1


def test_no_recipe_of_continued_pretraining_reads_more_than_a_tenth_of_the_bases_tokens() -> None:
    base, cpt = read_recipe("tiny/base", [], stage="sft"), read_recipe("tiny/cpt", [], stage="cpt")
    tokens = [
        sum(phase.steps * phase.batch * phase.data.max_tokens for phase in recipe.plan()) for recipe in (base, cpt)
    ]
    assert tokens[1] <= tokens[0] / 10


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs the commands here, which saves the seconds that a new process takes to import a framework; those run."""
    ran: list[list[str]] = []

    def run(command: list[str], check: bool) -> Any:
        assert command[1] == "-m" and not check
        if command[2] == "agent.oracle.dataset":
            monkeypatch.setattr(dataset, "DURATIONS", (60.0,))
            dataset.write_acts(command[3], "train", 0, 2)
            dataset.write_acts(Path(command[3]) / dataset.LONGEST_FOLDER, "train", 2, 2, longest=True)
            return subprocess.CompletedProcess(command, 0)
        assert command[2] == "agent.cli"
        ran.append(command[3:])
        with pytest.raises(SystemExit) as stop:
            cli.main([*command[3:], *few_steps(command)])
        return subprocess.CompletedProcess(command, stop.value.code)

    monkeypatch.setattr(subprocess, "run", run)
    return ran


def few_steps(command: list[str]) -> list[str]:
    """Options by which a training command takes the fewest steps that its recipe can."""
    if "train" not in command:
        return []
    recipe = read_recipe(option(tuple(command), "--recipe"))
    keys = [f"phases.{number}.steps" for number in range(len(getattr(recipe, "phases", ())))] or ["steps"]
    few = [argument for key in keys for argument in ("--set", f"{key}=1")]
    least = "batch=1", "rollout.rollouts=2", "rollout.max_tokens=8"
    return [*few, *(argument for each in least for argument in ("--set", each))] if "rl" in command else few


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Function that makes all of it, with the least of everything."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr("train.tiny.kept.KEPT", tmp_path / "kept")
    monkeypatch.setattr("agent.convert_attention.SAMPLES", 4)
    monkeypatch.setattr("agent.oracle.environment.MOST_TURNS", 2)
    monkeypatch.setattr("agent.belief.ANSWER_TOKENS", 2)
    fewest = {
        "SEEDS": (0,),
        "LAYOUTS": ("norm",),
        "RATIOS": (2,),
        "STILLS": 3,
        "MOVES": 3,
        "PAIRS": 3,
        "TEXTS": 3,
        "ECHOES": 3,
        "TRAIN_CLIPS": 6,
    }
    for name, value in fewest.items():
        monkeypatch.setattr(pipeline, name, value)
        if hasattr(base_rows, name):
            monkeypatch.setattr(base_rows, name, value)
    monkeypatch.setattr(pipeline, "CLIPS", {key: (6, shares) for key, (_, shares) in pipeline.CLIPS.items()})
    monkeypatch.setattr(pipeline, "LONG_CLIPS", 6)
    heldout = {name: (1, *rest) for name, (_, *rest) in pipeline.HELDOUT.items()}
    monkeypatch.setattr(pipeline, "HELDOUT", heldout)
    base = tmp_path / "base"
    write_start(base / "model")
    write_dataset(base / "data", "train", 0, 6)
    write_dataset(base / "data", "heldout", HELDOUT_CLIPS, 1)
    overrides = ["batch=2", "data.max_tokens=600", "data.cache_gib=0.0"]

    def make() -> None:
        pipeline.make_tiny(base, tmp_path / "out", overrides)

    return make


def test_all_of_it_ends_in_a_small_model_and_is_not_done_twice(
    small: Callable[[], None], in_this_process: list[list[str]], tmp_path: Path
) -> None:
    small()
    tiny = tmp_path / "out/iv3-tiny"
    config = ModelConfig.from_dir(tiny)
    assert config.text.attention == "m2la" and config.quantization is not None and config.quantization.bits == 8
    assert sum(file.stat().st_size for file in tiny.iterdir()) <= 8_000_000
    steps = [json.loads(line) for line in (tmp_path / "out/steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [
        "norm-2", "norm-2-cpt-0", "sft-short-0", "sft-long-0", "rl-0", "distill-0",
        "distill-0-merged", "sft-looks-0", "sft-act-0", "sft-longest-0", "iv3-tiny", "rl-act-0",
    ]  # fmt: skip
    assert [step["arguments"] for step in steps] == in_this_process
    assert json.loads((tiny / "provenance.json").read_text())["steps"] == steps[:-1]
    in_this_process.clear()
    small()
    assert in_this_process == []


def test_the_small_model_can_be_made_of_a_kept_one_alone(
    small: Callable[[], None], in_this_process: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, tiny = tmp_path / "kept", tmp_path / "out/iv3-tiny"
    write_start(kept / "sft-longest-0")
    (kept / "steps.jsonl").write_text('{"step": "sft-longest-0", "seconds": 1.0}\n')
    make = pipeline.make_tiny
    monkeypatch.setattr(pipeline, "make_tiny", lambda base, out, overrides: make(base, out, overrides, ("iv3-tiny",)))
    small()
    assert [command[0] for command in in_this_process] == ["convert"]
    steps = json.loads((tiny / "provenance.json").read_text())["steps"]
    assert [step["step"] for step in steps] == ["sft-longest-0", "iv3-tiny"]


def test_a_step_that_fails_is_named_and_gone_on_with(
    small: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], check: bool) -> Any:
        (tmp_path / "out/norm-2.part").mkdir(exist_ok=True)
        commands.append(command)
        return subprocess.CompletedProcess(command, 130)

    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", fail)
    for _ in range(2):
        with pytest.raises(TrainingError, match="norm-2 ended with exit code 130"):
            small()
    assert ["--resume" in command for command in commands] == [False, True]


def test_a_step_that_is_stopped_while_it_is_made_anew_is_not_taken_for_done(
    small: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, commands = tmp_path / "out/steps.jsonl", []
    log.parent.mkdir()
    log.write_text('{"step": "norm-2", "seconds": 1.0}\n{"step": "rl-0", "seconds": 1.0}\n')

    def stop(command: list[str], check: bool) -> Any:
        (tmp_path / "out/norm-2").mkdir(exist_ok=True)
        commands.append(command)
        return subprocess.CompletedProcess(command, 130)

    monkeypatch.setattr(subprocess, "run", stop)
    for _ in range(2):
        with pytest.raises(TrainingError, match="norm-2 ended"):
            small()
    assert len(commands) == 2
    assert log.read_text() == '{"step": "rl-0", "seconds": 1.0}\n'


def test_a_run_that_was_stopped_before_it_wrote_anything_is_begun_anew(
    small: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def stop_at_training(command: list[str], check: bool) -> Any:
        commands.append(command)
        training = "train" in command
        made = Path(option(tuple(command), "--out")) if training else tmp_path / "out/norm-2"
        made.mkdir(parents=True, exist_ok=True)
        return subprocess.CompletedProcess(command, int(training))

    monkeypatch.setattr(subprocess, "run", stop_at_training)
    for _ in range(2):
        with pytest.raises(TrainingError, match="norm-2-cpt-0 ended"):
            small()
    assert [command[3] for command in commands] == ["convert", "train", "train"]
    assert not any("--resume" in command for command in commands)


def test_a_model_that_is_kept_is_not_made_again_and_what_follows_begins_with_it(
    small: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, out = tmp_path / "kept", tmp_path / "out"
    write_start(kept / "norm-2-cpt-0", seed=5)
    lines = [json.dumps({"step": name, "seconds": 1.0}) for name in ("norm-2", "norm-2-cpt-0")]
    (kept / "steps.jsonl").write_text("".join(f"{line}\n" for line in lines))
    commands: list[list[str]] = []

    def stop(command: list[str], check: bool) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", stop)
    for _ in range(2):
        with pytest.raises(TrainingError, match="sft-short-0 ended"):
            small()
    assert option(tuple(commands[0]), "--model") == str(out / "norm-2-cpt-0/model")
    weights = [folder / "model.safetensors" for folder in (kept / "norm-2-cpt-0", out / "norm-2-cpt-0/model")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert (out / "steps.jsonl").read_text().splitlines() == lines


def test_a_kept_model_whose_line_was_taken_out_is_made_anew(
    small: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, out = tmp_path / "kept", tmp_path / "out"
    write_start(kept / "norm-2", seed=5)
    (kept / "steps.jsonl").write_text("")
    found = []

    def stop(command: list[str], check: bool) -> Any:
        found.append((option(tuple(command), "--attention"), (out / "norm-2").exists()))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", stop)
    with pytest.raises(TrainingError, match="norm-2 ended"):
        small()
    assert found == [("m2la", False)]


@pytest.mark.parametrize("command", [pipeline.main, base_rows.main])
@pytest.mark.parametrize("number", ["0", "-1", "two", "1.5"])
def test_a_number_of_processes_that_is_none_ends_with_one_sentence(
    command: Callable[[], None],
    number: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["tiny", "--processes", number])
    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 2
    assert f"argument --processes: {number} is not a number of processes; give 1 or more." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
