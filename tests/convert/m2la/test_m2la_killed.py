"""A conversion to M2LA that is killed, again and again, goes on to the bytes of one that was not.

Run as a script, this file does one conversion after the other in forks of itself, and kills each where it is told to.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from convert.m2la.options import Options
from convert.m2la.run import convert_attention
from convert.verification import verify
from ivcore.inputs import ModelInputs

ROOT = Path(__file__).resolve().parents[3]
HOW: dict[str, Any] = {"backend": "torch", "shard_bytes": 20_000}
Serve = Callable[..., dict[str, Any]]


def serve() -> None:
    """Do the job in every line of stdin; say a line of how it ended."""
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            do(job, writer)
        os.close(writer)
        if left := job["kill_after"]:
            while left and (seen := os.read(reader, left)):
                left -= len(seen)
            if not left:
                os.kill(child, signal.SIGKILL)
        with os.fdopen(reader) as rest:
            said = rest.read()
        status = os.waitpid(child, 0)[1]
        print(
            json.dumps({"killed": os.WIFSIGNALED(status), "said": said.lstrip("."), "dots": said.count(".")}),
            flush=True,
        )


def do(job: dict[str, Any], pipe: int) -> None:
    """A conversion with a dot into the pipe at every progress, and its error at the end."""
    try:
        prompts = [ModelInputs(*arrays) for arrays in pickle.loads(Path(job["prompts"]).read_bytes())]
        convert_attention(
            job["source"], job["target"], Options(cache_ratio=2), prompts, resume=job["resume"],
            on_progress=lambda what, done, total: os.write(pipe, b".") and None, **HOW,
        )  # fmt: skip
    except BaseException as error:
        os.write(pipe, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(0)


@pytest.fixture(scope="module")
def run() -> Iterator[Serve]:
    """Function (**job) that has the server do a job; how it ended."""
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert server.stdin is not None and server.stdout is not None
    to_server, from_server = server.stdin, server.stdout

    def ask(**job: Any) -> dict[str, Any]:
        print(json.dumps(job), file=to_server, flush=True)
        return json.loads(from_server.readline())

    yield ask
    to_server.close()
    from_server.close()
    assert server.wait() == 0


def test_killed_again_and_again_it_ends_with_the_same_bytes(
    sources: Any, prompts: list[ModelInputs], tmp_path: Path, run: Serve
) -> None:
    pytest.importorskip("torch")
    source = sources.make(tmp_path / "in", sources.Shape(kv_heads=4, layers=3))
    kept = tmp_path / "prompts"
    kept.write_bytes(pickle.dumps([(each.token_ids, each.pixels, each.grid_thw) for each in prompts]))

    def convert(target: str, kill_after: int = 0) -> dict[str, Any]:
        out = tmp_path / target
        begun = out.with_name(f"{target}.part").exists()
        return run(source=str(source), target=str(out), prompts=str(kept), resume=begun, kill_after=kill_after)

    whole = convert("whole")
    assert (whole["killed"], whole["said"]) == (False, "")
    expected = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    draw = random.Random(7)
    for number in range(4):
        target, kills = f"out-{number}", 0
        while (ended := convert(target, draw.randint(1, whole["dots"])))["killed"]:
            kills += 1
            assert not (tmp_path / target).exists()
            if kills == 3:
                ended = convert(target)
                break
        assert (ended["killed"], ended["said"]) == (False, ""), number
        assert {file.name: file.read_bytes() for file in (tmp_path / target).iterdir()} == expected
        assert verify(tmp_path / target).ok and not (tmp_path / f"{target}.part").exists()


if __name__ == "__main__":
    serve()
