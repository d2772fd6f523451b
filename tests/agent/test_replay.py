"""`iv3 replay`: what a run showed, shown again; and run again, where it departs."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.entries import Belief, Reasoning, Result, Resumed
from agent.trace import Trace, read_trace
from tests.agent.commands import LOOK, OPTIONS, STOPS, Says, answer, film, says
from tests.agent.conftest import Run

MESSAGES = [LOOK, answer("blue", "o1")]


@pytest.fixture(name="says")
def says_fixture(monkeypatch: pytest.MonkeyPatch) -> Says:
    return says(monkeypatch)


_RUN: list[str] = []


@pytest.fixture
def traced(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, run: Run, says: Says) -> tuple[Path, str, str]:
    """The trace of a run, and what it showed on stdout and stderr."""
    trace = tmp_path / "run.jsonl"
    if not _RUN:  # one is enough for all
        says(*MESSAGES)
        video = film(tmp_path_factory.mktemp("replay"))
        code, out, err = run("agent", video, "What moves?", *OPTIONS, "--trace", trace)
        assert code == 0, err
        _RUN[:] = [trace.read_text(), out, err]
    trace.write_text(_RUN[0])
    return trace, _RUN[1], _RUN[2]


def test_a_replay_shows_what_the_run_showed_and_changes_nothing(traced: tuple[Path, str, str], run: Run) -> None:
    trace, out, err = traced
    before = trace.read_bytes()
    code, again, said = run("replay", trace)
    assert (code, said) == (0, "") and trace.read_bytes() == before
    shown = err[err.index("video: ") :]
    assert again == shown + out


def test_an_unchanged_run_goes_as_it_did(traced: tuple[Path, str, str], run: Run, says: Says) -> None:
    says(*MESSAGES)
    code, out, err = run("replay", traced[0], "--rerun")
    assert code == 0, out + err
    assert out.endswith("The rerun went as the run did.\n") and traced[1] in out and "look 2" in err


def test_a_rerun_says_where_it_departs(traced: tuple[Path, str, str], run: Run, says: Says) -> None:
    trace = traced[0]
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    lines[-1]["answer"] = "green"
    trace.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    says(*MESSAGES)
    code, out, _ = run("replay", trace, "--rerun")
    departs, _, rest = out.partition("It is:")
    assert code == 1 and "The rerun departs here. It was:" in departs and "green" in departs and "blue" in rest


def test_a_model_that_says_something_else_departs_there(traced: tuple[Path, str, str], run: Run, says: Says) -> None:
    says("Let me see.\n" + LOOK, answer("blue", "o1"))
    code, out, _ = run("replay", traced[0], "--rerun")
    assert code == 1 and "Let me see." in out.partition("It is:")[2] and "blue" not in out


def test_a_rerun_that_goes_on_or_ends_where_the_run_did_not_departs(
    traced: tuple[Path, str, str], run: Run, says: Says
) -> None:
    trace = traced[0]
    lines = trace.read_text().splitlines(keepends=True)
    trace.write_text("".join(lines[:-1]))
    says(*MESSAGES)
    code, out, _ = run("replay", trace, "--rerun")
    assert code == 1 and "The rerun departs here. It was:\nthe end\nIt is:\n" in out
    trace.write_text("".join([*lines, lines[-1]]))
    says(*MESSAGES)
    code, out, err = run("replay", trace, "--rerun")
    assert code == 1 and "The rerun ends before the run did" in out + err and "went as" not in out


def test_what_a_stopped_run_cost_is_not_where_its_rerun_departs(
    traced: tuple[Path, str, str], run: Run, says: Says
) -> None:
    entries = read_trace(traced[0])
    other = traced[0].with_name("resumed.jsonl")
    with Trace(other) as trace:
        for entry in entries:
            if isinstance(entry, Belief) and entry.turn == 1:
                trace.append(entry)
                trace.append(Resumed(dropped=1))
            costs = {"prefilled": 5_000, "generated": 900} if isinstance(entry, Reasoning | Result) else {}
            trace.append(entry.model_copy(update=costs))
    says(*MESSAGES)
    code, out, _ = run("replay", other, "--rerun")
    assert code == 0 and out.endswith("The rerun went as the run did.\n")


@pytest.fixture
def changed(traced: tuple[Path, str, str]) -> Callable[..., Path]:
    """Function (options of the traced run that are others, its other fields) -> the trace."""

    def change(options: dict[str, object] | None = None, **fields: object) -> Path:
        first, _, rest = traced[0].read_text().partition("\n")
        line = json.loads(first) | fields
        line["options"] |= options or {}
        traced[0].write_text(f"{json.dumps(line)}\n{rest}")
        return traced[0]

    return change


def test_a_sampled_run_without_a_seed_has_no_rerun(changed: Callable[..., Path], failure: Callable[..., str]) -> None:
    trace = changed({"sampling": {"temperature": 0.7}})
    assert "sampled without a seed" in failure("replay", trace, "--rerun")


@pytest.mark.parametrize("options", [{"sampling": {"heat": 1}}, {"budget": None}, {"tools": 5}, {"x": 1}])
def test_options_that_are_none_are_one_sentence(
    changed: Callable[..., Path], failure: Callable[..., str], options: dict[str, object]
) -> None:
    assert "options that this version does not know" in failure("replay", changed(options), "--rerun")


def test_what_is_no_trace_or_whose_film_is_gone_is_one_sentence(
    changed: Callable[..., Path], tmp_path: Path, failure: Callable[..., str]
) -> None:
    assert "nowhere.jsonl cannot be read" in failure("replay", tmp_path / "nowhere.jsonl")
    trace = changed(path=str(tmp_path / "nowhere.mp4"))
    assert "nowhere.mp4" in failure("replay", trace, "--rerun")


@pytest.fixture
def talk(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, run: Run, says: Says, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The trace of a talk of three questions; the second was stopped."""
    trace = tmp_path / "talk.jsonl"
    if not _TALK:
        says(*MESSAGES, f"Let me think{STOPS}", answer("two", "o1"))
        monkeypatch.setattr(sys, "stdin", io.StringIO("What moves?\nWho?\nHow many?\n"))
        code, _, err = run("chat", film(tmp_path_factory.mktemp("talk")), *OPTIONS, "--trace", trace)
        assert code == 0, err
        _TALK[:] = [trace.read_text()]
    trace.write_text(_TALK[0])
    return trace


_TALK: list[str] = []


def test_a_talk_is_shown_again_with_its_questions(talk: Path, run: Run) -> None:
    code, out, _ = run("replay", talk)
    said = ["video: ", "question: What moves?", "answer: blue", "question: Who?", "question: How many?", "answer: two"]
    places = [out.index(each) for each in said]
    assert code == 0 and places == sorted(places)


def test_a_talk_is_run_again_question_by_question(talk: Path, run: Run, says: Says) -> None:
    says(*MESSAGES, answer("two", "o1"))
    code, out, _ = run("replay", talk, "--rerun")
    assert code == 0 and out.endswith("The rerun went as the run did.\n"), out
    says(*MESSAGES, answer("three", "o1"))
    code, out, _ = run("replay", talk, "--rerun")
    assert code == 1 and "three" in out.partition("It is:")[2]


def test_a_talk_without_a_question_has_no_rerun(talk: Path, failure: Callable[..., str]) -> None:
    talk.write_text(talk.read_text().partition("\n")[0] + "\n")
    assert "has no question" in failure("replay", talk, "--rerun")
