"""`iv3 parity` as a user runs it: the table, the object, the picture, the gates and the exit codes."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from agent.display import Display
from agent.parity_view import show
from convert.parity import run as run_module
from convert.parity.compare import compare
from convert.parity.report import Report
from ivcore.inputs import ModelInputs
from ivcore.shards import Checkpoint, write_checkpoint

MICRO = Path(__file__).resolve().parents[2] / "tests/data/reference/iv3-micro"
Run = Callable[..., tuple[int, str, str]]
pytest.importorskip("mlx")
pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting all of Python's garbage takes ten times as long as running a micro model."""
    monkeypatch.setattr(run_module, "release", lambda backend: None)


@pytest.fixture
def spoilt(checkpoint: Path) -> Path:
    """The checkpoint with 1 % on one tensor of decoder layer 3."""
    source, name = Checkpoint(MICRO), "model.language_model.layers.3.self_attn.kv_b_proj.weight"
    tensors = ((each, np.array(source.read(each)) * np.float32(1.01 if each == name else 1)) for each in source.specs)
    write_checkpoint(checkpoint, json.loads((MICRO / "config.json").read_text()), source.specs, tensors)
    return checkpoint


def shown(report: Report, **console: Any) -> str:
    stream = io.StringIO()
    show(report, Console(file=stream, width=80, highlight=False, **console))
    return stream.getvalue()


def test_one_folder_on_both_backends_prints_every_point_and_no_suspect(run: Run) -> None:
    code, out, err = run("parity", MICRO, "--tokens", 4)
    assert (code, err) == (0, "") and "\x1b" not in out
    lines = [line.split() for line in out.splitlines()]
    names = [line[0] for line in lines if len(line) == 5 and line[0].startswith(("visual.", "layers."))]
    assert len(names) == 9 + 5 and names[0] == "visual.patch_embed" and names[-1] == "layers.4"
    assert "No point leaves the trend of those before it." in out and "All 4 greedy tokens are the same." in out
    assert f"Reference: {MICRO} on mlx in float32" in out and "torch in float32, against the reference" in out
    assert max(len(line) for line in out.splitlines() if str(MICRO) not in line) <= 80


def test_a_fault_is_marked_in_the_table_and_named_below(run: Run, spoilt: Path) -> None:
    code, out, _ = run("parity", MICRO, spoilt, "--backends", "torch", "--tokens", 0)
    assert code == 0
    marked = [line.split()[0] for line in out.splitlines() if " < " in line]
    assert marked == ["layers.3"]
    sentences = [line for line in out.splitlines() if "leaves the trend" in line]
    assert len(sentences) == 1 and sentences[0].startswith("layers.3 leaves the trend: by itself it is off by ")
    rows = {line.split()[0]: line.split()[-4:] for line in out.splitlines() if line.startswith(("layers.", "visual."))}
    assert rows["layers.2"] == rows["visual.merger"] == ["0", "0", "0", "1.000000"]
    assert rows["layers.4"][1] == "0" and float(rows["layers.4"][0]) > 1e-4


def test_a_fault_is_named_between_backends_too(run: Run, spoilt: Path) -> None:
    code, out, _ = run("parity", MICRO, spoilt, "--backends", "mlx,torch", "--tokens", 0, "--json")
    assert code == 0
    clean, *faulty = json.loads(out)["comparisons"]
    assert clean["suspect"] is None and [each["suspect"]["point"] for each in faulty] == ["layers.3"] * 2


def test_json_is_the_library_s_report(run: Run) -> None:
    code, out, err = run("parity", MICRO, "--dtype", "float32,float16", "--backends", "torch", "--tokens", 3, "--json")
    assert (code, err) == (0, "")
    report = compare(MICRO, dtypes=["float32", "float16"], backends=["torch"], tokens=3)
    assert json.loads(out) == json.loads(json.dumps(report.to_dict()))


def test_gates_fail_after_the_report_with_one_sentence_that_names_run_and_bound(run: Run) -> None:
    arguments = ("parity", MICRO, "--backends", "torch", "--dtype", "float32,bfloat16", "--tokens", 0)
    code, out, err = run(*arguments, "--max-kl", "1", "--min-agreement", "0.5")
    assert (code, err) == (0, "")
    code, failed, err = run(*arguments, "--max-kl", "1e-9")
    assert code == 1 and failed == out
    assert err.startswith("iv3: torch in bfloat16: the mean KL of ") and err.endswith(" nats is not within 1e-09.\n")
    code, _, err = run(*arguments, "--max-kl", "1e-9", "--min-agreement", "1")
    assert code == 1 and len(err.splitlines()) == 1 and "KL" in err and "top tokens agree at 0." in err


def test_the_picture_is_written_beside_the_report(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "error.png"
    code, out, _ = run("parity", MICRO, "--tokens", 0, "--plot", picture)
    assert code == 0 and "layers.4" in out
    assert picture.read_bytes().startswith(b"\x89PNG") and [*tmp_path.iterdir()] == [picture]


def test_a_clip_and_a_question_take_the_probe_s_place(run: Run, make_clip: Any) -> None:
    clip = make_clip(frames=8, fps=4)
    arguments = ("--backends", "torch", "--dtype", "float32,float16", "--tokens", 0)
    code, out, _ = run("parity", MICRO, "--video", clip, "--question", "What?", *arguments)
    assert code == 0 and f"Prompt: {clip}; " in out


@pytest.mark.parametrize("given", [("--video", "clip.mp4"), ("--question", "What?")])
def test_a_video_without_a_question_is_bad_usage(run: Run, given: tuple[str, str]) -> None:
    code, out, err = run("parity", MICRO, *given)
    assert (code, out) == (2, "")
    assert (
        err == "iv3: Invalid value: --video and --question go together; give both or neither; see iv3 parity --help.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--backends", "torch"), "nothing to compare"),
        (("--backends", "jax"), "There is no backend 'jax'"),
        (("--dtype", "int8"), "dtype 'int8' is not one of"),
        (("absent",), "absent does not exist"),
        (("--video", "absent.mp4", "--question", "Q"), "absent.mp4"),
        (("--plot", "absent/a.png"), "absent is no folder"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    failure: Callable[..., str], arguments: tuple[str, ...], sentence: str
) -> None:
    assert sentence in failure("parity", MICRO, *arguments)


@pytest.mark.parametrize("option", [("--min-agreement", "1.5"), ("--max-kl", "-1"), ("--tokens", "-1")])
def test_a_bound_outside_its_range_is_bad_usage(run: Run, option: tuple[str, str]) -> None:
    code, out, err = run("parity", MICRO, *option)
    assert (code, out) == (2, "") and option[0] in err


def test_models_of_other_shapes_are_one_sentence(failure: Callable[..., str], tmp_path: Path) -> None:
    other = Path(shutil.copytree(MICRO, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["image_token_id"] = 490
    (other / "config.json").write_text(json.dumps(config))
    assert "are not of one body" in failure("parity", MICRO, other)


def make_report() -> Report:
    inputs = ModelInputs(np.arange(10, 40, dtype=np.int32), None, None)
    return compare(MICRO, backends=["torch"], dtypes=["float32", "bfloat16"], inputs=inputs, tokens=2)


def test_a_terminal_gets_colours_and_a_pipe_none() -> None:
    report = make_report()
    assert "\x1b[" in shown(report, force_terminal=True) and "\x1b" not in shown(report)


def test_numbers_that_are_not_finite_are_said_so() -> None:
    report = make_report()
    (comparison,) = report.comparisons
    points = (*comparison.points[:-1], replace(comparison.points[-1], own=math.nan, relative_l2=math.nan))
    assert comparison.text is not None
    text = replace(comparison.text, kl_mean=math.nan, perplexity=math.inf)
    out = shown(replace(report, comparisons=(replace(comparison, points=points, text=text),)))
    assert out.count("not finite") == 3 and "inf" in out


def test_texts_that_part_say_after_how_many_tokens() -> None:
    report = make_report()
    (comparison,) = report.comparisons
    decode = replace(comparison.decode, parted_at=3, reference_ids=(1, 2, 3, 4), ids=(1, 2, 3, 5))
    out = shown(replace(report, comparisons=(replace(comparison, decode=decode),)))
    assert "The greedy texts part after 3 of 4 tokens." in out


def test_progress_is_shown_on_a_terminal_and_is_silent_in_a_pipe() -> None:
    for terminal in (True, False):
        stream = io.StringIO()
        with Display(Console(file=stream, force_terminal=terminal, width=80)) as display:
            display.show("run 1 of 2, mlx float32: reading the prompt", 3, 10)
            display.show("run 1 of 2, mlx float32: reading the prompt", 10, 10)
        assert ("reading the prompt" in stream.getvalue()) == terminal
