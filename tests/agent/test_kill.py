"""`iv3 agent` as a process that is killed with -9 at random moments: its trace stands, and it goes on to its answer."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from agent.calls import written
from agent.entries import Entry, Reasoning, Result, Resumed, Run
from agent.trace import read_trace
from tests.agent.commands import LOOK, MICRO, Says, answer, film, says
from tests.agent.conftest import Run as RunCommand

ROOT = Path(__file__).resolve().parents[2]
SAYS = [LOOK, written("transcript", {}), written("zoom", {}), answer("blue", "o1", "o2")]
TALKS = """
import json, sys
import pytest
from agent import cli
from tests.agent.commands import says

says(pytest.MonkeyPatch())(*json.loads(sys.argv[1]))
cli.main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("kill"))


@pytest.fixture(name="says")
def says_fixture(monkeypatch: pytest.MonkeyPatch) -> Says:
    return says(monkeypatch)


def killed(command: Sequence[str | Path], lines: int) -> list[str]:
    """What a process has shown on stderr that is killed behind so many lines of it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert child.stderr is not None
    shown = [child.stderr.readline() for _ in range(lines)]
    child.kill()
    shown += child.stderr.readlines()
    child.stderr.close()
    assert child.wait() == -9, shown
    return [line.rstrip("\n") for line in shown]


def told(entries: Sequence[Entry]) -> list[dict[str, object]]:
    """What a run says, calls and sees, without what it costs."""
    kinds = ("instruction", "reasoning", "call", "observation", "feedback", "claim")
    costs = {"seconds", "cost", "prefilled", "generated", "context"}
    return [each.model_dump(exclude=costs) for each in entries if each.kind in kinds]


def test_a_killed_run_has_all_that_was_shown_in_its_trace_and_resumes_to_the_same_answer(
    clip: Path, tmp_path: Path, run: RunCommand, says: Says
) -> None:
    arguments = [clip, "What moves?", "-m", MICRO, "--dtype", "float32", "--tools", "look,transcript"]
    says(*SAYS)
    code, out, err = run("agent", *arguments, "--trace", tmp_path / "whole.jsonl", "--json")
    assert code == 0, err
    whole = read_trace(tmp_path / "whole.jsonl")
    lines = err[err.index("video: ") :].splitlines()
    rng = random.Random(6)
    for number in range(2):
        trace = tmp_path / f"{number}.jsonl"
        stop = rng.randint(1, len(lines) - 4)
        shown = killed(["-c", TALKS, json.dumps(SAYS), "agent", *arguments, "--trace", trace], stop)
        there = read_trace(trace)
        assert isinstance(there[0], Run) and not isinstance(there[-1], Result)
        assert told(there) == told(whole)[: len(told(there))]
        kinds = [each.kind for each in there]
        for mark, kind in (("look", "call"), ("saw", "observation"), ("problem:", "feedback"), ("claim", "claim")):
            assert sum(line.startswith(mark) for line in shown) <= kinds.count(kind), (kind, shown)
        says(*SAYS[sum(isinstance(each, Reasoning) for each in there) :])
        code, again, err = run("agent", "--resume", trace, "--json")
        assert code == 0, err
        entries = read_trace(trace)
        assert told(entries) == told(whole)
        for field in ("answer", "status", "evidence", "turns", "stopped"):
            assert json.loads(again)[field] == json.loads(out)[field]
        (mark,) = (each for each in entries if isinstance(each, Resumed))
        end = entries[-1]
        assert mark.cost == there[-1].cost and mark.seconds == there[-1].seconds
        assert end.seconds > there[-1].seconds and end.cost.prefilled > there[-1].cost.prefilled


def test_a_real_model_that_is_killed_resumes_to_the_same_answer(clip: Path, tmp_path: Path, run: RunCommand) -> None:
    # Random weights never call a tool, but they do write what no tokenizer would cut that way.
    arguments = [clip, "What moves?", "-m", MICRO, "--dtype", "float32", "--tools", "look", "--max-tokens", "24"]
    code, out, err = run("agent", *arguments, "--trace", tmp_path / "whole.jsonl", "--json")
    assert code == 0, err
    whole = read_trace(tmp_path / "whole.jsonl")
    trace = tmp_path / "run.jsonl"
    killed(["-m", "agent.cli", "agent", *arguments, "--trace", trace], 3)
    there = read_trace(trace)
    assert told(there) == told(whole)[: len(told(there))]
    code, again, err = run("agent", "--resume", trace, "--json")
    assert code == 0, err
    assert json.loads(again)["answer"] == json.loads(out)["answer"] != ""
    assert told(read_trace(trace)) == told(whole)
