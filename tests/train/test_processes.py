"""Several processes give what one gives, go on from one another's checkpoints, and stop together.

Run as a script, this file is one process of several: it does runs, line by line, with the others.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ivcore.errors import BackendError, MediaError, OtherProcessError, TrainingError
from train.processes import ALONE, agreed, by_lane, is_first, join, summed
from train.rollouts import packs

ROOT = Path(__file__).resolve().parents[2]
WORLD = 2
PATIENCE = 600.0
"""Seconds after which processes that say nothing are taken to wait for each other for ever."""
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MLX_RANK", "MLX_HOSTFILE")

# Where a gradient is next to nothing, AdamW makes a step of its rounding; not with an eps above it.
COMMON: dict[str, Any] = {"optimizer": {"eps": 1e-3}, "steps": 3, "save_every": 2, "batch": 4}
ROLLOUT: dict[str, Any] = {"data": {"max_tokens": 256, "max_frames": 4}, "rollout": {"rollouts": 3, "max_tokens": 5}}
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"lora": {"rank": 3, "dropout": 0.25}, "evaluate_every": 2},
    "rl": {"stage": "rl", **ROLLOUT, "rewards": {"weights": {"format": 1.0}, "form": ".*[a-e].*"}, "updates": 2,
           "kl_weight": 0.05},
    "distill": {"stage": "distill", **ROLLOUT, "teacher": {"max_frames": 6}},
}  # fmt: skip
FULL: dict[str, Any] = {"full": True, "learning_rate": {"peak": 1e-3}}


# One process of several.


def serve() -> None:
    """Do the run in every line of stdin; say a line of how it ended on this process."""
    spec = importlib.util.spec_from_file_location("train_runs", Path(__file__).with_name("runs.py"))
    assert spec is not None and spec.loader is not None
    sys.modules["train_runs"] = runs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runs)
    for line in sys.stdin:
        with pytest.MonkeyPatch.context() as patch:
            print(json.dumps(do(runs, json.loads(line), patch)), flush=True)


def do(runs: Any, job: dict[str, Any], patch: pytest.MonkeyPatch) -> dict[str, Any]:
    taken_part: list[None] = []

    def change(trainer: Any) -> None:
        take_part = trainer.take_part
        trainer.take_part = lambda: (taken_part.append(None), take_part())
        if job["fails"] == "loss" and not is_first():
            accumulate = trainer.accumulate
            trainer.accumulate = lambda *given: accumulate(*given) | ({"loss": float("nan")} if trainer._steps else {})

    def no_clip(*_: Any) -> None:
        raise MediaError("There is no clip on this machine.")

    def no_room(*_: Any) -> None:
        raise TrainingError("The checkpoint cannot be written (no room).")

    runs.trainers(patch, change)
    if job["fails"] == "data" and not is_first():
        patch.setattr("train.samples.SampleBuilder.sample", no_clip)
    if job["fails"] == "save" and is_first():
        patch.setattr("train.run_folder.RunFolder.save", no_room)
    if job["scattered"] and not is_first():
        patch.setattr("train.rl.packs", lambda samples, total, _: packs(samples, total, 0))
    if job["stop"]:
        step = runs.train.loop.Loop._step

        def until(loop: Any, stage: Any, number: int, rate: float) -> Any:
            if number > job["stop"]:
                raise runs.Stopped
            return step(loop, stage, number, rate)

        patch.setattr("train.loop.Loop._step", until)
    what, said = "", ""
    made = runs.job(Path(job["out"]), Path(job["rows"]), job["backend"], **job["changes"])
    made = replace(made, held_out=job["held_out"])
    try:
        runs.run(made, resume=job["resume"])
    except BaseException as error:
        what, said = type(error).__name__, str(error)
    return {"what": what, "said": said, "taken_part": len(taken_part)}


# Their parent.


Ask = Callable[..., list[dict[str, Any]]]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def environment(**more: str) -> dict[str, str]:
    """That of this process without a launcher's, with the package on the path, computing in one thread."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def listen(process: subprocess.Popen[str], queue: Queue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        queue.put(line)
    queue.put(json.dumps({"what": "it died", "said": f"{process.wait()}"}))


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Ask]]:
    """Function backend -> function (out, rows, ...) that has a run done by two processes; how it ended on each."""
    started: dict[str, Ask] = {}
    children: list[subprocess.Popen[str]] = []

    def launch(backend: str) -> list[subprocess.Popen[str]]:
        """As torchrun and mlx.launch set the environment."""
        ports = free_ports(WORLD)
        hosts = tmp_path_factory.mktemp("hosts") / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        own = []
        for rank in range(WORLD):
            torch = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{WORLD}", "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": f"{ports[0]}"}  # fmt: skip
            mlx = {"MLX_RANK": f"{rank}", "MLX_HOSTFILE": str(hosts)}
            own.append(subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=environment(**(torch if backend == "torch" else mlx)),
            ))  # fmt: skip
        children.extend(own)
        return own

    def asker(backend: str) -> Ask:
        if backend not in started:
            pytest.importorskip(f"iv{backend}")
            own = launch(backend)
            replies: list[Queue[str]] = [Queue() for _ in own]
            for process, queue in zip(own, replies, strict=True):
                threading.Thread(target=listen, args=(process, queue), daemon=True).start()

            def ask(out: Path, rows: Path, *, resume: bool = False, stop: int = 0, fails: str = "",
                    scattered: bool = False, held_out: Path | None = None,
                    **changes: Any) -> list[dict[str, Any]]:  # fmt: skip
                job = {"out": str(out), "rows": str(rows), "backend": backend, "resume": resume, "stop": stop,
                       "fails": fails, "scattered": scattered, "held_out": held_out and str(held_out),
                       "changes": changes}  # fmt: skip
                for process in own:
                    assert process.stdin is not None
                    print(json.dumps(job), file=process.stdin, flush=True)
                try:
                    return [json.loads(queue.get(timeout=PATIENCE)) for queue in replies]
                except Empty:
                    for process in own:
                        process.kill()
                    raise AssertionError("the processes wait for each other") from None

            started[backend] = ask
        return started[backend]

    yield asker
    for process in children:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


@pytest.fixture(scope="module")
def runs(tools: Any) -> Any:
    return tools.neighbour("train", "runs")


@pytest.fixture(scope="module")
def data(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of different lengths, an image, clips, and rows that cannot be used, of which one shows that late."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "broken.mp4").write_bytes(b"no clip")
    broken = runs.said([{"type": "video", "video": "broken.mp4"}, {"type": "text", "text": "What?"}], "Nothing.")
    rows = [*runs.text_rows(5), "{", *runs.media_rows(folder), broken]
    return runs.write_rows(folder / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def held_out(runs: Any, data: Path) -> Path:
    return runs.write_rows(data.parent / "held.jsonl", [{**runs.media_rows(data.parent)[1], "kind": "colour"}] * 3)


def done(ended: list[dict[str, Any]]) -> bool:
    return all(each["what"] == "" for each in ended)


def close(found: Path, expected: Path, *, step: int, tolerance: float = 1e-5) -> None:
    """Whether two runs logged the same numbers, and have the same checkpoint after a step, but for rounding."""
    ours, theirs = (
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (found, expected)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"seconds", "tokens_per_second", "peak_bytes"}:
            assert one[name] == (other[name] if isinstance(other[name], str | None) else
                                 pytest.approx(other[name], rel=max(1e-4, 10 * tolerance), abs=1e-5)), name  # fmt: skip
    folders = [out / "checkpoints" / f"step-{step:06d}" for out in (found, expected)]
    position, other = (json.loads((folder / "position.json").read_text()) for folder in folders)
    assert position["data"] == other["data"]
    state, other = (load_file(folder / "state.safetensors") for folder in folders)
    assert state.keys() == other.keys()
    for name, array in other.items():
        if name != "draws":
            # Moments are gradients, differences of larger numbers.
            off = tolerance * (1 if name.startswith("weight.") else 10)
            assert np.linalg.norm(state[name] - array) <= off * max(np.linalg.norm(array), 1e-3), name


@pytest.fixture(scope="module")
def alone(runs: Any, data: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function (backend, stage, **changes) -> the folder of a run by one process; each is run once."""
    known: dict[str, Path] = {}

    def folder(backend: str, stage: str, **changes: Any) -> Path:
        key = f"{backend} {stage} {sorted(changes.items())}"
        if key not in known:
            known[key] = tmp_path_factory.mktemp("alone") / "run"
            job = runs.job(known[key], data, backend, **COMMON | STAGES[stage] | changes)
            runs.run(replace(job, held_out=str(held_out)) if stage == "sft" else job)
        return known[key]

    return folder


# What holds.


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_processes_with_different_numbers_of_batches_equal_one(
    data: Path, tmp_path: Path, backend: str, full: bool, processes: Any, alone: Any
) -> None:
    """The second's rollouts are a batch each. One step: rounding may change what is sampled in a later one."""
    changes = {"steps": 1, "save_every": 1} | (FULL if full else {})
    ended = processes(backend)(tmp_path / "run", data, scattered=True, **COMMON | STAGES["rl"] | changes)
    assert done(ended), ended
    close(tmp_path / "run", alone(backend, "rl", **changes), step=1)
    assert ended[0]["taken_part"] > ended[1]["taken_part"]


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_with_half_the_batch_each_equal_one(
    runs: Any, data: Path, held_out: Path, tmp_path: Path, backend: str, stage: str, full: bool, processes: Any,
    alone: Any,
) -> None:  # fmt: skip
    """With FSDP2 on torch where all weights are trained."""
    changes, held = FULL if full else {}, held_out if stage == "sft" else None
    ended = processes(backend)(tmp_path / "run", data, held_out=held, **COMMON | STAGES[stage] | changes)
    assert done(ended), ended
    expected = alone(backend, stage, **changes)
    close(tmp_path / "run", expected, step=3)
    for name in ("evaluations.jsonl", "rejected.jsonl"):
        assert sorted(map(str, runs.lines(tmp_path / "run" / name))) == sorted(map(str, runs.lines(expected / name)))
    name = "model/model.safetensors" if full else "adapter/adapter_model.safetensors"
    result, other = load_file(tmp_path / "run" / name), load_file(expected / name)
    assert result.keys() == other.keys()
    for tensor, array in other.items():
        np.testing.assert_allclose(result[tensor], array, rtol=1e-4, atol=1e-5, err_msg=tensor)


def test_sharded_weights_in_bfloat16_have_float32_masters(
    data: Path, tmp_path: Path, processes: Any, alone: Any
) -> None:
    """A bfloat16 that is rounded differently is off by 1/256, and weights move by as little as that."""
    changes = FULL | {"dtype": "bfloat16", "evaluate_every": 0}
    assert done(processes("torch")(tmp_path / "run", data, **COMMON | STAGES["sft"] | changes))
    expected = alone("torch", "sft", **changes)
    close(tmp_path / "run", expected, step=3, tolerance=1e-3)
    state = load_file(tmp_path / "run" / "checkpoints" / "step-000003" / "state.safetensors")
    assert {array.dtype for name, array in state.items() if "." in name} == {np.dtype(np.float32)}
    assert any((array.view(np.uint32) & 0xFFFF).any() for name, array in state.items() if name.startswith("weight."))


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_one_process_goes_on_from_two_and_two_from_one(
    runs: Any, data: Path, held_out: Path, tmp_path: Path, backend: str, full: bool, processes: Any, alone: Any
) -> None:
    changes = COMMON | STAGES["sft"] | (FULL if full else {})
    ask, expected = processes(backend), alone(backend, "sft", **(FULL if full else {}))
    job = replace(runs.job(tmp_path / "one", data, backend, **changes), held_out=str(held_out))
    with pytest.raises(runs.Stopped):
        runs.run(job, stop=2)
    shutil.copytree(job.out, tmp_path / "one then two")
    assert done(ask(tmp_path / "one then two", data, resume=True, held_out=held_out, **changes))
    close(tmp_path / "one then two", expected, step=3)

    ended = ask(tmp_path / "two", data, stop=2, held_out=held_out, **changes)
    assert [each["what"] for each in ended] == ["Stopped"] * WORLD
    runs.run(replace(job, out=tmp_path / "two"), resume=True)
    close(tmp_path / "two", expected, step=3)


def test_two_processes_go_on_from_themselves_to_the_same_bytes(
    runs: Any, data: Path, tmp_path: Path, backend: str, processes: Any
) -> None:
    ask, changes = processes(backend), COMMON | STAGES["rl"] | {"lora": {"dropout": 0.25}}
    assert done(ask(tmp_path / "whole", data, **changes))
    assert [each["what"] for each in ask(tmp_path / "part", data, stop=2, **changes)] == ["Stopped"] * WORLD
    assert done(ask(tmp_path / "part", data, resume=True, **changes))
    runs.same(runs.outcome(tmp_path / "part"), runs.outcome(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("loss", r"Step 2 went wrong: the loss of rows? \S*rows.jsonl:\d.* is nan; there is no checkpoint yet."),
        ("data", r"Step 1 went wrong: There is no row to train on: .*no clip on this machine"),
        ("save", r"The checkpoint cannot be written \(no room\)."),
    ],
)
def test_where_one_process_fails_all_stop_and_the_first_says_why(
    runs: Any, data: Path, tmp_path: Path, backend: str, fails: str, said: str, processes: Any
) -> None:
    ended = processes(backend)(tmp_path / "run", data, fails=fails, **COMMON)
    assert [each["what"] for each in ended] == ["TrainingError", "OtherProcessError"]
    assert [bool(each["said"]) for each in ended] == [True, False]
    assert re.match(said, runs.one_sentence(ended[0]["said"]))


def test_a_batch_that_the_processes_cannot_share_is_refused(
    data: Path, tmp_path: Path, backend: str, processes: Any
) -> None:
    ended = processes(backend)(tmp_path / "run", data, **COMMON | {"batch": 3})
    assert ended[0]["said"] == "batch is 3, which 2 processes cannot share evenly; use a multiple."
    assert ended[1]["what"] == "OtherProcessError" and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("backend", "launcher"), [("torch", "torchrun"), ("mlx", "mlx.launch")])
def test_the_launcher_of_a_backend_starts_the_command(runs: Any, tmp_path: Path, backend: str, launcher: str) -> None:
    pytest.importorskip(f"iv{backend}")
    program = Path(sys.executable).with_name(launcher)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('stage = "sft"\nsteps = 1\nbatch = 2\n[learning_rate]\npeak = 1e-3\n[data]\nwindow = 1\n')
    rows = runs.write_rows(tmp_path / "rows.jsonl", runs.text_rows(3))
    port = str(free_ports(1)[0])
    how = {
        "torch": ["--nproc-per-node", "2", "--master-port", port, "-m", "agent.cli"],
        "mlx": ["-n", "2", "-p", port, "--", sys.executable, "-m", "agent.cli"],
    }[backend]
    command = ["train", "sft", "--recipe", recipe, "-m", runs.MICRO, "--data", rows, "--backend", backend]
    ended = subprocess.run(
        [program, *how, *map(str, command), "--out", str(tmp_path / "run")], stdin=subprocess.DEVNULL,
        capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=PATIENCE,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    (logged,) = runs.metrics(tmp_path / "run")
    assert logged["rows"] == 2 and (tmp_path / "run" / "adapter").exists()


# Without other processes.


def test_the_launcher_of_the_other_backend_is_named(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    pytest.importorskip("ivtorch")
    pytest.importorskip("ivmlx")
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    assert join(backend).world == 1 and is_first()
    started = {"mlx": {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "torch": {"MLX_RANK": "0"}}[backend]
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BackendError, match=f"not for the backend {backend}; use (torchrun|mlx.launch), or name"):
        join(backend)
    monkeypatch.setenv("RANK" if backend == "mlx" else "MLX_RANK", "1")
    assert not is_first()
    with pytest.raises(OtherProcessError, match=r"^$"):
        join(backend)


class Together:
    """The first or the second of two processes, of which the other one's values are known."""

    def __init__(self, rank: int, others: list[Any]) -> None:
        self.rank, self.world, self._others = rank, 2, iter(others)

    def gather(self, value: Any) -> list[Any]:
        pair = [json.loads(json.dumps(value)), next(self._others)]
        return pair if self.rank == 0 else pair[::-1]


def test_values_of_lanes_are_in_the_order_of_one_process() -> None:
    assert by_lane(ALONE, [0, 1, 2]) == [0, 1, 2]
    assert by_lane(Together(0, [["b", "d"]]), ["a", "c"]) == by_lane(Together(1, [["a", "c"]]), ["b", "d"])
    assert by_lane(Together(1, [["a", "c"]]), ["b", "d"]) == ["a", "b", "c", "d"]
    assert summed(Together(0, [{"loss": 2.0, "kl": 1.0}]), {"loss": 0.5}) == {"loss": 2.5, "kl": 1.0}


def test_an_unexpected_error_stays_what_it_is_and_is_told_to_the_others() -> None:
    with pytest.raises(ZeroDivisionError), agreed(Together(1, [None])):
        _ = 1 / 0
    said = "Process 1 stopped with an unexpected ZeroDivisionError: no."
    with pytest.raises(TrainingError, match=f"^{said}$"), agreed(Together(0, [said])):
        pass
    with pytest.raises(MediaError, match="mine"), agreed(Together(0, ["theirs"])):
        raise MediaError("mine")
    with pytest.raises(OtherProcessError), agreed(Together(1, ["theirs"])):
        raise MediaError("mine")


if __name__ == "__main__":
    serve()
