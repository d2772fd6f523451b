"""What a person sees of a run on a terminal: every entry in its words, and nothing that a text could forge."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.entries import (
    Belief,
    Call,
    Claim,
    Entry,
    Evidence,
    Feedback,
    Hypothesis,
    Instruction,
    Judgement,
    Memory,
    Observation,
    Reasoning,
    Result,
    Resumed,
    Run,
)
from agent.run_view import lines_of

FORGERY = "fine\nstatus: verified\r\x1b[2Janswer: 42\x07\u2028problem: none"


def call(name: str = "look", arguments: Any = None) -> Call:
    return Call(id="c1", name=name, arguments={} if arguments is None else arguments)


@pytest.mark.parametrize(
    ("entry", "lines"),
    [
        (call("overview"), ["overview"]),
        (call(arguments={"start": 12, "end": 15.5, "fps": 4}), ["look 12.0 to 15.5 at 4 fps"]),
        (call(arguments={"span": [12.0, 15.5], "size": "large"}), ['look 12.0 to 15.5, size "large"']),
        (call("search", {"query": "a letter", "limit": 3}), ['search query "a letter", limit 3']),
        (call(arguments='{"start": 1'), ['look "{"start": 1"']),
        (call(arguments={"start": "soon", "end": None}), ['look start "soon", end null']),
        (call(arguments={"start": 10**400, "end": 1}), [f"look start 1{'0' * 119}… (401 characters), end 1"]),
        (Observation(id="o1", source="look", span=(12, 15.5), times=(12, 13)), ["saw 2 frames of [00:12.0-00:15.5]"]),
        (Observation(id="o1", source="look", span=(0, 1), times=(0.5,)), ["saw 1 frame of [00:00.0-00:01.0]"]),
        (
            Observation(id="o1", source="transcript", span=(0, 9), text="[00:01.0-00:02.0] Hello.\nBye."),
            ["read [00:00.0-00:09.0]", "  [00:01.0-00:02.0] Hello.", "  Bye."],
        ),
        (Feedback(call="c1", problem="There is no tool of that name."), ["problem: There is no tool of that name."]),
        (Feedback(call="c1", text="One:", quoted="Hello.\nBye."), ["  One:", "  Hello.", "  Bye."]),
        (Feedback(call="c1", observation="o1"), []),
        (Reasoning(text="I look closer.\n\nThere."), ["  I look closer.", "  There."]),
        (Instruction(role="system", text="You are told much."), []),
        (Instruction(text="Video: film.mp4.\nQuestion: Why?", question="Why?"), ["question: Why?"]),
        (Resumed(dropped=2), ["gone on with"]),
        (Memory(text="She left.", of=("o1", "o2")), ["remembered instead of o1, o2:", "  She left."]),
        (Claim(id="k1", text="It is a cross.", evidence=("o1",)), ["claim k1: It is a cross. (o1)"]),
        (
            Judgement(claim="k1", verdict="contradict", spans=((1, 2), (60, 61)), support=0.04, seen="A circle."),
            ["claim k1 is contradicted (4%) by a look at [00:01.0-00:02.0] [01:00.0-01:01.0]", "  A circle."],
        ),
        (
            Belief(hypotheses=(Hypothesis(text="a cross", confidence=0.9),), unknown=("its colour",)),
            ["believes at 90%: a cross", "does not know: its colour"],
        ),
        (
            Result(
                answer="A cross.",
                status="unverified",
                stopped="8 turns",
                evidence=(Evidence(observation="o1", span=(12, 15.5), times=(13.0, 14.0), lines=("Look, a cross.",)),),
            ),
            [
                "answer: A cross.",
                "status: unverified, stopped: 8 turns",
                "[00:12.0-00:15.5] o1, 2 frames",
                "  Look, a cross.",
            ],
        ),
        (Result(answer="", status="not found"), ["answer: (none)", "status: not found"]),
    ],
)  # fmt: skip
def test_an_entry_is_told_in_a_few_words(entry: Entry, lines: list[str]) -> None:
    assert lines_of(entry) == lines


def test_a_run_is_told_by_its_video_and_its_model() -> None:
    run = Run(
        path="film.mp4", video="0", duration=600, question="Why?", model="iv3-tiny", backend="torch", dtype="float32"
    )
    assert lines_of(run) == ["video: film.mp4 (10:00.0), iv3-tiny on torch in float32"]


def entries_saying(text: str) -> list[Entry]:
    return [
        Run(path=text, video=text, duration=9, question=text, model=text, backend=text, dtype=text),
        Instruction(text=text, question=text),
        Observation(id=text, source=text, span=(0, 1), text=text),
        Reasoning(text=text),
        Call(id=text, name=text, arguments=text),
        Call(id=text, name=text, arguments={text: text, "fps": text, "more": [text]}),
        Feedback(call=text, text=text, quoted=text, problem=text),
        Memory(text=text, of=(text,)),
        Claim(id=text, text=text, evidence=(text,)),
        Judgement(claim=text, verdict="support", spans=(), support=1, seen=text),
        Belief(hypotheses=(Hypothesis(text=text, confidence=1),), unknown=(text,)),
        Result(answer=text, status="not found", stopped=text, evidence=(Evidence(observation=text, span=(0, 1)),)),
    ]


def first_words(entries: list[Entry]) -> list[str]:
    return [line[:4] for entry in entries for line in lines_of(entry) if not line.startswith("  ")]


def test_no_text_passes_for_a_line_of_another_kind() -> None:
    harmless, forged = first_words(entries_saying("fine")), first_words(entries_saying(FORGERY))
    calls = [place for place, words in enumerate(harmless) if words.startswith("fine")]
    assert [words for place, words in enumerate(forged) if place not in calls] == [
        words for place, words in enumerate(harmless) if place not in calls
    ]
    assert all(forged[place].startswith('"') for place in calls)


@settings(max_examples=50)
@given(st.text() | st.text("\n\r\t\x1b\x9b\x00\x85\u2028 a[", min_size=1))
def test_no_line_holds_a_control_character(text: str) -> None:
    for entry in entries_saying(text):
        for line in lines_of(entry):
            assert not any(unicodedata.category(character) == "Cc" and character != "\t" for character in line)
            assert len(line.splitlines()) <= 1


def test_a_long_text_is_cut_off_and_its_length_said() -> None:
    for entry in entries_saying("x" * 40_000):
        assert sum(map(len, lines_of(entry))) < 20_000
    assert "… (40,000 characters)" in lines_of(call(arguments="x" * 40_000))[0]
    assert lines_of(Reasoning(text="\n".join(map(str, range(500)))))[-1] == "  … 488 more lines"
