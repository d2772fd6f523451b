"""Calls in what models write: found wherever they stand, given back as written, and never more than a sentence."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.calls import CLOSE, MOST_CHARACTERS, OPEN, Parsed, parse, written
from agent.entries import Call, read_entry

TEXT = st.text(max_size=30) | st.sampled_from([OPEN, CLOSE, f"a{CLOSE}\n{OPEN}b", '"}}', "\\", "\\u003c", "\u2028"])
NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(TEXT, VALUES, max_size=4)


@given(TEXT, ARGUMENTS)
@settings(max_examples=60)
def test_what_is_written_is_read_back(name: str, arguments: dict[str, object]) -> None:
    assert parse(written(name, arguments)) == ("", [Parsed(name, arguments)])


@given(st.lists(st.tuples(TEXT, ARGUMENTS), max_size=4), st.lists(st.text('ab {}"\n>é犬', max_size=9), min_size=5))
@settings(max_examples=50)
def test_calls_come_in_order_and_the_text_around_them_is_what_is_left(
    calls: list[tuple[str, dict[str, object]]], texts: list[str]
) -> None:
    said = texts[0] + "".join(
        written(*one) + between for one, between in zip(calls, texts[1 : len(calls) + 1], strict=True)
    )
    text, found = parse(said)
    assert [(each.name, each.arguments, each.problem) for each in found] == [(*one, None) for one in calls]
    assert text == "".join(texts[: len(calls) + 1]).strip()


@given(st.text(max_size=200) | st.text(f'{OPEN}{CLOSE}{{}}[]":,\\ue1-', max_size=200))
def test_any_text_is_read_and_what_was_read_fits_into_a_trace(said: str) -> None:
    _, calls = parse(f"{OPEN}{said}")
    assert calls
    for each in calls:
        assert each.problem is None or (len(each.problem.splitlines()) == 1 and each.problem.endswith("."))
        entry = Call(id="c1", name=each.name, arguments=each.arguments)
        assert read_entry(entry.model_dump_json()) == entry


def test_text_without_a_call_is_text() -> None:
    assert parse("  It is {blue}: </tool_call>\n") == ("It is {blue}: </tool_call>", [])


def test_a_call_without_its_closing_mark_runs_if_it_is_whole() -> None:
    whole = f'{OPEN}{{"name": "look", "arguments": {{"start": 1}}}}'
    assert parse(whole) == ("", [Parsed("look", {"start": 1})])
    assert parse(f"{whole}\n{whole}{CLOSE} there")[1] == [Parsed("look", {"start": 1})] * 2
    _, (cut,) = parse(whole[:-4])
    assert cut.problem is not None and f"and has no {CLOSE}" in cut.problem


def test_arguments_may_be_left_out() -> None:
    assert parse(f'{OPEN}{{"name": "segment"}}{CLOSE}')[1] == [Parsed("segment", {})]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no valid JSON"),
        ('{"name": "look", "arguments": {}} and more', "no valid JSON"),
        ('{"name": "look", "arguments": {"start": NaN}}', "no valid JSON"),
        ('{"name": "note", "arguments": {"text": "\\ud83d"}}', "no valid JSON"),
        ("[" * 5_000 + "]" * 5_000, "no valid JSON"),
        ('{"name": "look", "arguments": {"x": ' + "[" * 500 + "]" * 500 + "}}", "no valid JSON"),
        ('{"name": "look", "arguments": {"start": ' + "9" * 5_000 + "}}", "no valid JSON"),
        ('"look"', "no object with a name"),
        ('{"name": 5}', "no object with a name"),
        ('{"name": "look", "arguments": [1, 2]}', "the arguments are no object"),
        ('{"name": "look", "arguments": null}', "the arguments are no object"),
    ],
)
def test_what_is_no_call_is_told_in_a_sentence(text: str, problem: str) -> None:
    _, (found,) = parse(f"{OPEN}\n{text}\n{CLOSE}")
    assert found.problem is not None and problem in found.problem and len(found.problem) < 200
    assert isinstance(found.arguments, str) and len(found.arguments) < 300


def test_pairs_of_surrogates_are_the_characters_that_they_stand_for() -> None:
    arguments = json.dumps({"text": "犬 🐕"})
    assert "\\ud83d" in arguments
    _, (found,) = parse(f'{OPEN}{{"name": "note", "arguments": {arguments}}}{CLOSE}')
    assert found == Parsed("note", {"text": "犬 🐕"})


@pytest.mark.parametrize("said", [written("note", {"text": "x" * 1_000_000}), OPEN + "{" * 1_000_000])
def test_a_megabyte_is_refused_unread(said: str) -> None:
    _, (found,) = parse(said)
    assert found.problem is not None and f"at most {MOST_CHARACTERS:,} are read" in found.problem
    assert len(found.problem) < 200 and len(str(found.arguments)) < 300


def test_a_megabyte_of_text_or_of_marks_is_read() -> None:
    text = "It is blue. " * 90_000
    assert parse(text) == (text.strip(), [])
    _, calls = parse(OPEN * 20_000)
    assert len(calls) == 20_000 and all(each.problem for each in calls)
