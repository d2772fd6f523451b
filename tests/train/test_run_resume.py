"""A run that is stopped or killed anywhere goes on to the very bytes of one that never was.

Run as a script, this file is a server: it does runs in forks of itself, which kill themselves at a step of the file
system, or in which a copy of the run's folder is made before every such step.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ivcore.errors import TrainingError

ROOT = Path(__file__).resolve().parents[2]
Serve = Callable[..., dict[str, Any]]

PHASES: list[dict[str, Any]] = [
    {"name": "short", "steps": 3, "data": {"max_tokens": 130}},
    {"name": "long", "steps": 4, "batch": 3, "data": {"max_tokens": 400, "max_frames": 6, "window": 5}},
]
HOW: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 2, "dropout": 0.25}},
    "full": {"full": True, "learning_rate": {"peak": 1e-3}},
}
SAMPLED: dict[str, Any] = {
    "steps": 5,
    "learning_rate": {"peak": 1e-2},
    "lora": {"rank": 2, "dropout": 0.25},
    "rollout": {"rollouts": 3, "max_tokens": 5},
    "data": {"max_tokens": 300, "max_frames": 2, "min_frames": 2},
}
STAGES: dict[str, dict[str, Any]] = {
    "cpt": {"stage": "cpt", "steps": 5, "weighting": "token"},
    "rl": {"stage": "rl", "updates": 2, "kl_weight": 0.1, "rewards": {"weights": {"format": 1.0}, "form": "(?s).*e.*"}}
    | SAMPLED,
    "distill": {"stage": "distill", "forward_share": 0.3, "teacher": {"max_frames": 4}} | SAMPLED,
}


# The server.


def serve() -> None:
    """Do the run in every line of stdin; say a line of how it ended."""
    spec = importlib.util.spec_from_file_location("train_runs", Path(__file__).with_name("runs.py"))
    assert spec is not None and spec.loader is not None
    sys.modules["train_runs"] = runs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runs)
    for backend in ("ivtorch.train", "ivmlx.train"):
        if importlib.util.find_spec({"ivtorch.train": "torch", "ivmlx.train": "mlx"}[backend]):
            importlib.import_module(backend)
    for line in sys.stdin:
        job = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            do(runs, job, writer)
        os.close(writer)
        with os.fdopen(reader) as rest:
            said = rest.read()
        status = os.waitpid(child, 0)[1]
        print(json.dumps({"killed": os.WIFSIGNALED(status), "said": said}), flush=True)


def do(runs: Any, job: dict[str, Any], pipe: int) -> None:
    try:
        out = Path(job["out"])
        if "copies" in job:
            at_every_step(out.parent, copier(out.parent, Path(job["copies"])))
        if "kill_at" in job:
            at_every_step(out.parent, killer(job["kill_at"]))
        runs.run(runs.job(out, Path(job["rows"]), job["backend"], **job["changes"]), resume=job["resume"])
    except BaseException as error:
        os.write(pipe, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(0)


def killer(countdown: int) -> Callable[[], None]:
    def step() -> None:
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return step


def copier(folder: Path, copies: Path) -> Callable[[], None]:
    return lambda: (shutil.copytree(folder, copies / f"{len(list(copies.iterdir())):03d}"), None)[1]


def at_every_step(folder: Path, act: Callable[[], None]) -> None:
    """Call `act` before whatever changes a file: an opening to write, a renaming, a removal, a flush to the disk."""
    busy, lock = threading.local(), threading.Lock()

    def step(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "fsync")
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wa+x")
        if not (changes or writes) or getattr(busy, "acting", False):
            return
        busy.acting = True
        with lock:
            act()
        busy.acting = False

    os.fsync = lambda fd: step("fsync", ())
    sys.addaudithook(step)


@pytest.fixture(scope="module")
def server() -> Iterator[Serve]:
    """Function (out, rows, backend, **job) that has a run done in a process of its own; how it ended."""
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},  # as in this process; see conftest.py
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    to_server, from_server = process.stdin, process.stdout

    def ask(out: Path, rows: Path, backend: str, *, resume: bool = False, **job: Any) -> dict[str, Any]:
        out.parent.mkdir(parents=True, exist_ok=True)
        job = {"changes": {}, "resume": resume, "out": str(out), "rows": str(rows), "backend": backend, **job}
        print(json.dumps(job), file=to_server, flush=True)
        return json.loads(from_server.readline())

    yield ask
    to_server.close()
    from_server.close()
    assert process.wait() == 0


# What is run.


@pytest.fixture(scope="module")
def runs(tools: Any) -> Any:
    return tools.neighbour("train", "runs")


@pytest.fixture(scope="module")
def data(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, an image, clips, a row too long for the first phase, and rows of which each proves unusable in its way."""
    folder = tmp_path_factory.mktemp("data")
    media = runs.media_rows(folder)
    (folder / "broken.mp4").write_bytes(b"no clip")
    broken = runs.said([{"type": "video", "video": "broken.mp4"}, {"type": "text", "text": "What?"}], "Nothing.")
    long = runs.said("Count.", "and one " * 90)  # over 130 tokens
    return runs.write_rows(folder / "rows.jsonl", [*runs.text_rows(4), "{", *media, broken, long])


@pytest.fixture(scope="module")
def undisturbed(runs: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Any]:
    """Function (backend, how) -> the outcome of a run of two phases that nothing disturbed; each is run once."""
    known: dict[tuple[str, str], Any] = {}

    def outcome(backend: str, how: str) -> Any:
        if (backend, how) not in known:
            out = tmp_path_factory.mktemp("undisturbed") / "run"
            runs.run(runs.job(out, data, backend, phases=PHASES, **HOW[how]))
            known[backend, how] = runs.outcome(out)
        return known[backend, how]

    return outcome


@pytest.fixture(scope="module")
def texts(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_rows(tmp_path_factory.mktemp("texts") / "rows.jsonl", runs.text_rows(5))


# Stopped.


@pytest.mark.parametrize("how", ["lora", "full"])
def test_stopped_at_random_steps_it_ends_with_the_bytes_of_an_undisturbed_run(
    runs: Any, data: Path, tmp_path: Path, backend: str, how: str, undisturbed: Any
) -> None:
    expected = undisturbed(backend, how)
    stops = sorted(random.Random(f"{how} {backend}").sample(range(1, 8), 3))
    job = runs.job(tmp_path / "run", data, backend, phases=PHASES, **HOW[how])
    for number, stop in enumerate(stops):
        with pytest.raises(runs.Stopped):
            runs.run(job, stop=stop, resume=number > 0)
    runs.run(job, resume=True)
    runs.same(runs.outcome(job.out), expected)


def test_a_run_stopped_at_the_boundary_of_its_phases_goes_on(
    runs: Any, data: Path, tmp_path: Path, backend: str, undisturbed: Any
) -> None:
    """With a checkpoint at the very boundary, which an interval of 2 steps never makes."""
    job = runs.job(tmp_path / "run", data, backend, phases=PHASES, save_every=1, **HOW["lora"])
    with pytest.raises(runs.Stopped):
        runs.run(job, stop=3)
    runs.run(job, resume=True)
    found, expected = runs.outcome(job.out), undisturbed(backend, "lora")
    assert found["metrics.jsonl"] == expected["metrics.jsonl"]
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step-000007/state.safetensors"):
        assert found[name] == expected[name]


@pytest.mark.parametrize("method", ["accumulate", "apply", "save_adapter"])
def test_stopped_in_the_middle_of_a_step_it_goes_on(
    runs: Any, data: Path, tmp_path: Path, undisturbed: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = runs.job(tmp_path / "run", data, "torch", phases=PHASES, **HOW["lora"])

    def watch(trainer: Any) -> None:
        original, left = getattr(trainer, method), [2 if method == "save_adapter" else 5]

        def interrupted(*given: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return original(*given)

        setattr(trainer, method, interrupted)

    with monkeypatch.context() as patch:
        runs.trainers(patch, watch)
        with pytest.raises(KeyboardInterrupt):
            runs.run(job)
    runs.run(job, resume=True)
    runs.same(runs.outcome(job.out), undisturbed("torch", "lora"))


# Killed.


def test_every_step_of_the_file_system_may_be_the_last(runs: Any, texts: Path, tmp_path: Path, server: Serve) -> None:
    changes: dict[str, Any] = {"steps": 2, "save_every": 1, "keep": 1, "batch": 1, "lora": {"rank": 1}}
    (tmp_path / "states").mkdir()
    ended = server(tmp_path / "work" / "run", texts, "torch", changes=changes, copies=str(tmp_path / "states"))
    assert ended == {"killed": False, "said": ""}
    expected = runs.outcome(tmp_path / "work" / "run")
    wrong = []
    for state in sorted((tmp_path / "states").iterdir()):
        job = runs.job(state / "run", texts, **changes)
        try:
            resume_or_begin(runs, job)
            runs.same(runs.outcome(state / "run"), expected)
        except (Exception, AssertionError) as error:
            wrong.append(f"{state.name}: {type(error).__name__} {error}")
        shutil.rmtree(state)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("how", ["lora", "full"])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    runs: Any, data: Path, tmp_path: Path, backend: str, how: str, undisturbed: Any, server: Serve
) -> None:
    changes = {"phases": PHASES, **HOW[how]}
    out, moments = tmp_path / "work" / "run", random.Random(f"{how} {backend}")
    # Of about 70 to 100 moments in the first run, and as many less in the second as it finds done.
    for resume, moment in ((False, moments.randint(20, 45)), (True, moments.randint(5, 15))):
        ended = server(out, data, backend, changes=changes, kill_at=moment, resume=resume)
        assert ended == {"killed": True, "said": ""}
    runs.run(runs.job(out, data, backend, **changes), resume=True)
    runs.same(runs.outcome(out), undisturbed(backend, how))


@pytest.mark.parametrize("stage", STAGES)
def test_every_other_stage_killed_at_random_moments_ends_with_the_same_bytes(
    runs: Any, tmp_path: Path, backend: str, stage: str, server: Serve
) -> None:
    judged = {"choices": ["this", "that"], "answer": 0}
    rows = [row | judged for row in (*runs.media_rows(tmp_path), *runs.text_rows(3))]
    data, changes = runs.write_rows(tmp_path / "all.jsonl", rows), STAGES[stage]
    whole = runs.job(tmp_path / "whole", data, backend, **changes)
    runs.run(whole)
    assert stage != "rl" or any(each["updates"] for each in runs.metrics(whole.out))
    out, moments = tmp_path / "work" / "run", random.Random(f"{stage} {backend}")
    for resume, moment in ((False, moments.randint(12, 30)), (True, moments.randint(5, 15))):
        ended = server(out, data, backend, changes=changes, kill_at=moment, resume=resume)
        assert ended == {"killed": True, "said": ""}
    runs.run(runs.job(out, data, backend, **changes), resume=True)
    runs.same(runs.outcome(out), runs.outcome(whole.out))


def resume_or_begin(runs: Any, job: Any) -> None:
    """What a person does who is told that there is nothing to resume."""
    try:
        runs.run(job, resume=True)
    except TrainingError as error:
        if "leave --resume out" not in str(error):
            raise
        runs.run(job)


if __name__ == "__main__":
    serve()
