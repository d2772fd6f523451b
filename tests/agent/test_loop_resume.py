"""A run that was stopped goes on: to the same answer, on what was left of its budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent.belief import Beliefs
from agent.budget import Budget
from agent.calls import written
from agent.context import Context
from agent.entries import (
    Belief,
    Call,
    Claim,
    Cost,
    Feedback,
    Observation,
    Reasoning,
    Result,
    read_entry,
)
from agent.loop import Loop
from tests.agent.commands import answer, film
from tests.agent.loops import LOOK, MakeLoop, maker, problems, result, run


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("resume"))


@pytest.fixture
def make(clip: Path, monkeypatch: pytest.MonkeyPatch) -> MakeLoop:
    return maker(clip, monkeypatch)


@pytest.mark.parametrize("kept", range(3, 22, 3))
def test_a_run_that_was_stopped_anywhere_goes_on_to_the_same_end(make: MakeLoop, kept: int) -> None:
    messages = [LOOK, written("transcript", {}), written("zoom", {}), answer("blue", "o1", "o2")]
    whole = run(make(*messages, verdicts=["support"]))
    lines = [entry.model_dump_json() for entry in whole][:kept]
    entries = [read_entry(line) for line in lines]
    loop = make(
        *messages[sum(isinstance(each, Reasoning) for each in entries) :], verdicts=["support"], entries=entries
    )
    again = [*loop.context.entries, *([] if isinstance(entries[-1], Result) else loop.go_on())]
    assert result(again).answer == "blue" and result(again).status == "verified"
    for kind in (Observation, Claim, Call):
        ids = [each.id for each in again if isinstance(each, kind)]
        assert ids == list(dict.fromkeys(ids)) == [each.id for each in whole if isinstance(each, kind)]


def test_a_question_after_one_that_was_stopped_while_it_was_weighed_is_answered(
    make: MakeLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make(LOOK, answer("blue", "o1"), verdicts=["support"])

    def stop(session: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.beliefs, "update", stop)
        run(loop)
    assert result(run(loop, "What moves now?")).answer == "blue"


def test_a_belief_that_is_gone_on_with_weighs_what_was_seen_since(make: MakeLoop) -> None:
    whole = run(make(LOOK, answer("blue", "o1"), verdicts=["support"]))
    place = next(n for n, each in enumerate(whole) if isinstance(each, Feedback))
    kept = [read_entry(each.model_dump_json()) for each in whole[: place + 1]]
    again = list(make(answer("blue", "o1"), verdicts=["support"], entries=kept).go_on())
    first, second = (
        next(each for each in entries if isinstance(each, Belief)) for entries in (whole[place + 1 :], again)
    )
    assert [(each.text, each.pro, each.contra) for each in first.hypotheses] == [
        (each.text, each.pro, each.contra) for each in second.hypotheses
    ]


@pytest.mark.parametrize("dropped", [0, 1])
def test_what_was_spent_before_a_stop_counts_and_so_do_the_entries_that_are_void(make: MakeLoop, dropped: int) -> None:
    messages = [LOOK, LOOK, answer("blue", "o1")]
    whole = run(make(*messages, verdicts=["support"]))
    place = next(place for place, each in enumerate(whole) if isinstance(each, Feedback))
    before = whole[place + dropped]
    loop = make(*messages[1:], verdicts=["support"], entries=whole[: place + dropped + 1])
    end = result(list(loop.go_on()))
    assert (end.answer, end.turns, end.frames) == ("blue", 3, result(whole).frames)
    assert end.cost == before.cost + _spent(loop) and end.seconds >= before.seconds
    assert end.prefilled == end.cost.prefilled > result(whole).prefilled  # the context was read again
    for spent in (Budget(turns=1), Budget(frames=4), Budget(tokens=before.cost.prefilled), Budget(seconds=1e-3)):
        loop = make(entries=whole[: place + dropped + 1], budget=spent)
        assert result(list(loop.go_on())).stopped is not None, spent


def test_a_run_that_was_stopped_in_a_follow_up_question_has_the_budget_of_that_question(
    make: MakeLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.belief.SURE", 2.0)  # so that the question is never settled
    messages = [LOOK, answer("blue", "o1"), LOOK, answer("two", "o2")]
    loop = make(*messages, verdicts=["support"] * 2)
    first, second = run(loop), run(loop, "How many?")
    entries = [*first, *second[: next(n for n, each in enumerate(second) if isinstance(each, Feedback)) + 1]]
    again = list(make(messages[-1], verdicts=["support"], entries=entries, budget=Budget(turns=2, frames=5)).go_on())
    end = result(again)
    assert (end.answer, end.stopped, end.turns, end.frames) == ("two", None, 2, 4)
    unknown = [each.unknown for each in again if isinstance(each, Belief)]
    assert unknown == [("How many?",)]


def test_beliefs_about_an_earlier_question_are_not_gone_on_with(make: MakeLoop) -> None:
    loop = make(LOOK, answer("blue", "o1"), verdicts=["support"])
    first = run(loop)
    asked = next(iter(loop.ask("How many?")))
    assert Beliefs(Context(loop._frames, list(first))).best() is not None
    assert Beliefs(Context(loop._frames, [*first, asked])).best() is None


def test_a_run_that_was_stopped_between_a_message_without_a_call_and_its_feedback_asks_for_evidence(
    make: MakeLoop,
) -> None:
    whole = run(make("It is blue.", "Blue, I say.", verdicts=[]))
    place = next(place for place, each in enumerate(whole) if isinstance(each, Reasoning))
    again = list(make("Blue, I say.", entries=whole[: place + 1]).go_on())
    assert [each.kind for each in again] == [each.kind for each in whole[place + 1 :]]
    assert problems(again) == problems(whole) and result(again).answer == "Blue, I say."
    last = max(place for place, each in enumerate(whole) if isinstance(each, Reasoning))
    assert [each.kind for each in make(entries=whole[: last + 1]).go_on()] == ["result"]


def test_a_turn_is_a_message_with_what_came_of_it(make: MakeLoop) -> None:
    loop = make(LOOK, answer("blue", "o1"), answer("two", "o1"), verdicts=["support"] * 2)
    entries = [*run(loop), *run(loop, "How many?")]
    turns = {kind: [each.turn for each in entries if isinstance(each, kind)] for kind in (Belief, Reasoning, Call)}
    assert set(turns) == {Belief, Reasoning, Call} and all(each == [0, 1, 2] for each in turns.values())
    assert [each.turn for each in entries if isinstance(each, Observation | Claim)] == [0, 1, 2]


def _spent(loop: Loop) -> Cost:
    spent = loop.workspace.spent
    return Cost(**vars(spent), frames=loop.workspace.frames)
