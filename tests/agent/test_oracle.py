"""The oracle's runs: each ends in what is so in the film, and is worth the whole reward."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.answering import Answering
from agent.calls import parse
from agent.entries import Call, Entry, Evidence, Result
from agent.oracle import dataset
from agent.oracle.environment import PRICE, parts, worth
from agent.oracle.rows import question_of
from agent.oracle.runs import CLOSELY, Oracle
from agent.oracle.wording import absent
from agent.spans import overlap
from agent.tools.box import NAMES, tools
from agent.tools.ground import CANDIDATES
from agent.tools.tool import checked, schema
from ivcore.chat_template import QWEN_TEMPLATE, render_template
from tests.agent.made_films import Made, holds, in_parts, make_films, subject_of
from train.rewards import temporal_iou
from train.row import Row, parse_row
from train.tiny.template import terse_template
from train.toyworld.questions import NOT_THERE
from train.toyworld.score import is_right
from train.toyworld.script import random_of

LONG_ENOUGH = 0.9
"""Seconds of a key of which more than half is seen whatever the slips."""


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[Made]:
    return make_films(tmp_path_factory.mktemp("films"))


def runs_of(made: Made, count: int = 6, follow_ups: int = 0) -> Iterator[tuple[Oracle, list[dict[str, Any]]]]:
    for number in range(count):
        oracle = Oracle(*made.about, random_of(number, 99))
        yield oracle, oracle.run(follow_ups)


def ended(made: Made, oracle: Oracle, messages: list[dict[str, Any]]) -> list[Entry]:
    """The run's entries with the result that its last call comes to when every claim is supported."""
    (last,) = parse(messages[-1]["content"])[1]
    assert last.name == "answer" and isinstance(last.arguments, dict)
    cited = [name for claim in last.arguments["claims"] for name in claim["evidence"]]
    found = [oracle.context.observation(name) for name in cited]
    evidence = tuple(Evidence(observation=each.id, span=each.span) for each in found if each is not None)
    assert len(evidence) == len(cited)
    status = "verified" if last.arguments.get("found", True) else "not found"
    return [*oracle.context.entries, Result(answer=last.arguments["text"], status=status, evidence=evidence)]


def test_every_call_of_a_run_is_one_that_its_tool_takes(films: list[Made]) -> None:
    for made in films:
        for oracle, messages in runs_of(made, follow_ups=4):
            offered = tools(made.workspace, NAMES if oracle.has_library else None)
            known = {**offered, "answer": Answering(made.workspace)}
            for message in messages:
                if message["role"] != "assistant":
                    continue
                (call,) = parse(message["content"])[1]
                assert call.problem is None and isinstance(call.arguments, dict)
                checked(known[call.name], call.arguments)


def test_a_run_ends_in_the_right_answer_with_evidence_and_is_worth_the_whole_reward_less_its_calls(
    films: list[Made],
) -> None:
    for made in films:
        row = made.row(question_of(*made.about), "rl")
        for oracle, messages in runs_of(made):
            entries = ended(made, oracle, messages)
            result = entries[-1]
            assert isinstance(result, Result)
            assert made.kind == "when" or is_right(result.answer, made.question.answer)
            span = made.question.span
            if span is not None and span[1] - span[0] < LONG_ENOUGH:
                continue
            assert parts(row, entries) == {"right": 1.0, "shown": 1.0}, (made.kind, messages)
            calls = sum(isinstance(entry, Call) for entry in entries)
            assert worth(row, entries) == pytest.approx(1 - PRICE * calls)


def test_a_run_makes_mistakes_and_gets_over_them(films: list[Made]) -> None:
    """Of many runs, some look at something else first; they look again before they answer."""
    made = next(made for made in films if made.kind == "rare")
    (key,) = made.script.keys
    again = 0
    for _, messages in runs_of(made, 40):
        (last_look,) = [parse(each["content"]) for each in messages if '"look"' in str(each["content"])][-1][1]
        spans = [parse(each["content"])[1][0].arguments for each in messages if '"look"' in str(each["content"])]
        first = spans[0]
        if not (first["start"] < key.span[1] and key.span[0] < first["end"]):
            again += 1
            assert 2 <= len(spans) <= CANDIDATES
        assert isinstance(last_look.arguments, dict)
        assert temporal_iou((last_look.arguments["start"], last_look.arguments["end"]), key.span) > 0.5
    assert 2 <= again <= 20


def test_what_is_misread_is_contradicted_and_looked_at_more_closely(films: list[Made]) -> None:
    made = next(made for made in films if made.kind == "rare")
    slipped = 0
    for _, messages in runs_of(made, 40):
        places = [place for place, each in enumerate(messages) if "A fresh look contradicts k1" in str(each["content"])]
        assert len(places) <= 1
        for place in places:
            slipped += 1
            seen, wrong, _, look, closer = messages[place - 2 : place + 3]
            first, last = (parse(each["content"])[1][-1].arguments for each in (wrong, messages[-1]))
            (again,) = parse(look["content"])[1]
            assert again.name == "look" and isinstance(again.arguments, dict) and again.arguments["fps"] > CLOSELY
            assert isinstance(first, dict) and first["text"] == answered(seen) != made.question.answer
            assert isinstance(last, dict) and last["text"] == answered(closer) == made.question.answer
    assert 3 <= slipped <= 20


def test_a_run_asks_of_what_it_looks_at_and_says_what_it_hears(films: list[Made]) -> None:
    """A look at something else answers that it is not there, and the next match is looked at."""
    elsewhere = 0
    for made in (made for made in films if not made.question.read):
        for _, messages in runs_of(made, 8):
            calls = [(place, *parse(each["content"])[1]) for place, each in enumerate(messages) if is_call(each)]
            looks = [(place, each) for place, each in calls if each.name == "look"]
            assert all("question" in each.arguments for _, each in looks)
            heard = [answered(messages[place + 1]) for place, _ in looks]
            misses = [each for each in heard if each in (NOT_THERE, "no")]
            elsewhere += len(misses)
            assert misses == heard if absent(made.question) else heard[-1] not in misses
            if not absent(made.question) and made.kind != "when":
                assert heard[-1] == made.question.answer
                assert all(each.arguments["question"] == made.question.text for _, each in looks)
    assert elsewhere >= 10


def is_call(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant"


def answered(message: dict[str, Any]) -> str:
    """What a look says about what it was asked."""
    (_, said) = in_parts(message)[-1]["text"].split("> ")
    return str(said)


def test_questions_that_follow_are_answered_rightly_and_without_a_search_where_it_was_seen(
    films: list[Made],
) -> None:
    at_once = not_there = 0
    for made in (made for made in films if not made.question.read):
        names = {figure.name for figure in made.script.figures}
        for _, messages in runs_of(made, 8, follow_ups=4):
            asked = [place for place, each in enumerate(messages) if each["role"] == "user"][1:]
            assert len(asked) == len({messages[place]["content"] for place in asked}) <= 4
            for place, end in zip(asked, [*asked[1:], len(messages)], strict=True):
                (last,) = parse(messages[end - 1]["content"])[1]
                assert last.name == "answer" and isinstance(last.arguments, dict)
                names_of_calls = [parse(each["content"])[1][0].name for each in messages[place:end] if is_call(each)]
                at_once += "ground" not in names_of_calls and bool(last.arguments["claims"])
                if not last.arguments["claims"]:
                    not_there += 1
                    words = set(messages[place]["content"].strip("?.").split())
                    assert last.arguments["found"] is False and not any({*name} <= words for name in names)
                    continue
                said = last.arguments["claims"][0]["text"]
                about = [each for each in made.script.figures if subject_of(said) <= {*each.name}]
                if " visible from " in said:
                    (figure,) = about
                    start, end_ = (float(each) for each in re.findall(r"[0-9.]+[0-9]", said))
                    assert overlap((start, end_), figure.span) > 0
                    assert last.arguments["text"] in said
                else:
                    assert len(about) == 1 and holds(said, about[0]) and last.arguments["text"] in said
    assert at_once >= 10 and not_there >= 3


def test_a_question_without_an_answer_ends_as_not_found_and_cites_nothing(films: list[Made]) -> None:
    for made in (made for made in films if made.kind == "absent"):
        for oracle, messages in runs_of(made):
            result = ended(made, oracle, messages)[-1]
            assert isinstance(result, Result) and (result.status, result.evidence) == ("not found", ())


def test_a_look_and_a_claim_have_the_seconds_that_ground_has_said(films: list[Made]) -> None:
    (made,) = (made for made in films if made.kind == "when")
    for _, messages in runs_of(made):
        said = [
            part["text"] for each in messages if each["role"] == "tool" for part in in_parts(each) if "text" in part
        ]
        (matches,) = [text for text in said if "Matches: " in text]
        calls = [call for each in messages if each["role"] == "assistant" for call in parse(each["content"])[1]]
        for given in (call.arguments for call in calls if call.name == "look"):
            assert f"{given['start']:.1f} to {given['end']:.1f} (" in matches
        assert f"{calls[-1].arguments['text']} (" in matches
        assert calls[-1].arguments["text"] in calls[-1].arguments["claims"][0]["text"]


@pytest.mark.parametrize(
    ("answer", "status", "spans", "expected"),
    [
        ("red", "verified", [(9.5, 13.5)], {"right": 1.0, "shown": 1.0}),
        ("red", "verified", [(8.0, 16.0)], {"right": 1.0, "shown": 0.0}),
        ("red", "unverified", [], {"right": 1.0, "shown": 0.0}),
        ("blue", "verified", [(0.0, 1.0), (10.0, 13.0)], {"right": 0.0, "shown": 1.0}),
        ("red or blue", "verified", [(10.0, 13.0)], {"right": 0.0, "shown": 1.0}),
    ],
)
def test_a_reward_needs_the_right_answer_and_evidence_that_is_half_the_truth(
    answer: str, status: Any, spans: list[tuple[float, float]], expected: dict[str, float]
) -> None:
    row = Row("r", (), (), ("red", "blue"), 0, (10.0, 13.0), "run rare", "")
    evidence = tuple(Evidence(observation="o1", span=span) for span in spans)
    result = Result(answer=answer, status=status, evidence=evidence)
    assert parts(row, [result]) == expected
    assert worth(row, [Call(id="c1", name="look", arguments={}), result]) == min(expected.values()) - PRICE
    assert parts(row, [result.model_copy(update={"stopped": "turns"})]) == {"right": 0.0, "shown": 0.0}


def test_the_terse_template_writes_a_tool_as_a_line_of_its_names(films: list[Made]) -> None:
    offered = [schema(tool) for tool in tools(films[0].workspace).values()]
    messages = [{"role": "user", "content": "Hello"}]
    whole = render_template(QWEN_TEMPLATE, messages, tools=offered)
    terse = render_template(terse_template(), messages, tools=offered)
    assert "\nlook(start, end, fps, question)\n" in terse and "properties" not in terse
    assert len(terse) < len(whole) / 3
    assert render_template(terse_template(), messages) == render_template(QWEN_TEMPLATE, messages)


class InThisProcess:
    """A pool of no other process, which would not know the shorter films."""

    def __init__(self, *_: Any) -> None: ...
    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: Any) -> None: ...
    def map(self, function: Any, values: Any, chunksize: int) -> Any:
        return map(function, values)


@pytest.fixture
def short_films(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(dataset, "DURATIONS", (20.0,))
    monkeypatch.setattr(dataset, "LONGEST", 40.0)


@pytest.mark.usefixtures("short_films")
def test_the_rows_of_the_longest_films_are_runs_of_two_questions_at_most_about_what_is_rare_said_or_missing(
    tmp_path: Path,
) -> None:
    files = dataset.write_acts(tmp_path, "train", 0, 6, longest=True)
    runs = [json.loads(line) for line in files["runs"].read_text().splitlines()]
    assert len(runs) == 6 and {run["duration"] for run in runs} == {40.0}
    assert {run["kind"].removeprefix("run ") for run in runs} <= set(dataset.LONGEST_SHARES)
    answers = [[each for each in run["messages"] if '"name": "answer"' in str(each["content"])] for run in runs]
    assert max(map(len, answers)) <= 3 and min(map(len, answers)) >= 1  # one that is contradicted is answered again


@pytest.mark.usefixtures("short_films")
def test_films_and_rows_are_written_once_and_read_by_training(tmp_path: Path) -> None:
    files = dataset.write_acts(tmp_path, "train", 0, 6)
    assert set(files) == set(dataset.FILES)
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "films").iterdir()}
    before = {name: file.read_bytes() for name, file in files.items()}
    assert len(written) == 6
    dataset.write_acts(tmp_path, "train", 0, 6)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "films").iterdir()} == written
    assert {name: file.read_bytes() for name, file in files.items()} == before
    for name, file in files.items():
        for line in file.read_text().splitlines():
            row = parse_row(json.loads(line), tmp_path, "rl" if name == "questions" else "sft")
            row.check_media()


def test_a_note_says_what_was_found_where_and_only_a_run_with_a_library_has_one(films: list[Made]) -> None:
    noted = 0
    for made in films:
        for oracle, messages in runs_of(made, 12):
            said = [parse(each["content"])[1][0] for each in messages if each["role"] == "assistant"]
            notes = [each.arguments for each in said if each.name == "note"]
            noted += len(notes)
            assert len(notes) <= oracle.has_library and not (notes and absent(made.question))
            for note in notes:
                assert isinstance(note, dict) and isinstance(said[-1].arguments, dict)
                assert note["text"] == said[-1].arguments["claims"][0]["text"]
                assert made.question.span is not None
                assert temporal_iou((note["start"], note["end"]), made.question.span) > 0.3
    assert noted >= 5
