"""`iv3 chat`: questions in order in one context, and an answer that is stopped is not the end."""

from __future__ import annotations

import builtins
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.chat import questions
from agent.entries import Instruction, Observation, Reasoning, Result, Run
from agent.trace import read_trace
from tests.agent.commands import LOOK, OPTIONS, STOPS, Says, answer, film, says
from tests.agent.conftest import Run as RunCommand


@pytest.fixture(name="says")
def says_fixture(monkeypatch: pytest.MonkeyPatch) -> Says:
    return says(monkeypatch)


def asked(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_questions_from_a_pipe_are_answered_in_order_in_one_context(
    tmp_path: Path, run: RunCommand, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(LOOK, answer("blue", "o1"), answer("two", "o1"))
    asked(monkeypatch, "What moves?", "", "   ", "How many?")
    trace = tmp_path / "talk.jsonl"
    code, out, err = run("chat", film(tmp_path), *OPTIONS, "--trace", trace)
    assert code == 0, err
    assert out.index("blue") < out.index("two") and "look 2" in err and "look" not in out
    entries = read_trace(trace)
    assert isinstance(entries[0], Run)
    assert [each.text.rpartition("Question: ")[2] for each in entries if isinstance(each, Instruction)][1:] == [
        "What moves?",
        "How many?",
    ]
    assert [each.answer for each in entries if isinstance(each, Result)] == ["blue", "two"]
    assert [each.id for each in entries if isinstance(each, Observation)] == ["o1"]
    assert [each for each in entries if isinstance(each, Reasoning)][-1].prefilled < 100  # nothing is read again


def test_ctrl_c_stops_the_answer_and_the_next_question_is_answered(
    tmp_path: Path, run: RunCommand, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = says(LOOK, f"Let me think about it{STOPS}", answer("two", "o1"))
    asked(monkeypatch, "What moves?", "How many?")
    trace = tmp_path / "talk.jsonl"
    code, out, err = run("chat", film(tmp_path), *OPTIONS, "--trace", trace)
    assert code == 0 and not model._answers, err
    assert "stopped; ask something else, or leave by Ctrl-D." in err
    entries = read_trace(trace)
    (result,) = (each for each in entries if isinstance(each, Result))
    assert result.answer == "two" and "two" in out and result.evidence[0].observation == "o1"
    assert not any(isinstance(each, Reasoning) and "think" in each.said for each in entries)


def test_nothing_is_asked_by_an_empty_pipe(
    tmp_path: Path, run: RunCommand, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    says()
    asked(monkeypatch, "", " ")
    code, out, _ = run("chat", film(tmp_path), *OPTIONS)
    assert (code, out) == (0, "")


def test_ctrl_c_at_the_prompt_does_not_leave_and_ctrl_d_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed: list[Any] = ["  What moves? ", "", KeyboardInterrupt, "How many?", EOFError]

    def prompt(said: str) -> str:
        line = typed.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(builtins, "input", prompt)
    assert list(questions()) == ["What moves?", "How many?"] and not typed
    assert "leave by Ctrl-D." in capsys.readouterr().out


def test_a_talk_without_a_question_has_its_first_line_and_is_not_gone_on_with(
    tmp_path: Path, run: RunCommand, failure: Callable[..., str], says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    says()
    asked(monkeypatch)
    trace = tmp_path / "talk.jsonl"
    assert run("chat", film(tmp_path), *OPTIONS, "--trace", trace)[0] == 0
    (entry,) = read_trace(trace)
    assert isinstance(entry, Run) and entry.question == ""
    assert "has no question yet" in failure("agent", "--resume", trace)


def test_a_trace_that_cannot_be_written_is_known_before_the_model_is_loaded(
    tmp_path: Path, failure: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.act.load", never)
    (tmp_path / "talk.jsonl").write_text("mine")
    assert "is there already" in failure("chat", film(tmp_path), *OPTIONS, "--trace", tmp_path / "talk.jsonl")
    assert (tmp_path / "talk.jsonl").read_text() == "mine"


def never(*arguments: object) -> None:
    raise AssertionError("the model was loaded")


def test_a_budget_is_that_of_a_question(
    tmp_path: Path, run: RunCommand, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(LOOK, answer("blue", "o1"), LOOK, answer("two", "o2"))
    now = [0.0]
    monkeypatch.setattr("agent.budget.time.monotonic", lambda: now[0])

    def thinking() -> Iterator[str]:
        for question in ("What moves?", "How many?"):
            yield question
            now[0] += 3_600

    monkeypatch.setattr("agent.chat.questions", thinking)
    budget = ["--budget-seconds", "60", "--max-turns", "2", "--budget-frames", "4"]
    code, out, err = run("chat", film(tmp_path), *OPTIONS, *budget)
    assert code == 0 and "blue" in out and "two" in out and "stopped" not in out, out + err
