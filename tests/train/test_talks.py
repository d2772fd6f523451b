"""Talks, descriptions and transcripts: every answer follows from what is shown or said there, read anew."""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.conversations import turns
from train.row import parse_row
from train.toyworld.compose import KINDS, make_script
from train.toyworld.dataset import LONG_SHARES, write_about, write_dataset
from train.toyworld.descriptions import description
from train.toyworld.script import LONG_SECONDS, SHORT_SECONDS, seeds
from train.toyworld.talks import MOST_OF_A_KIND, talk
from train.toyworld.texts import MOST_LINES, conversation, write_texts
from train.toyworld.words import COLOURS, DIRECTIONS, FACTS, SHAPES


@settings(max_examples=60)
@given(seed=st.integers(0, 100_000), kind=st.sampled_from([each for each in KINDS if each != "absent"]))
def test_later_answers_of_a_talk_are_about_the_only_figure_that_the_question_names(seed: int, kind: str) -> None:
    script = make_script(seed, kind, LONG_SECONDS)
    first, *others = turns(talk(script))
    assert others and len(others) <= 4 * MOST_OF_A_KIND and first[0] not in [question for question, _ in others]
    assert len({question for question, _ in others}) == len(others)
    for question, answer in others:
        words = re.findall(r"\w+", question)
        colour, shape = (next((each for each in names if each in words), None) for names in (COLOURS, SHAPES))
        named = [
            figure for figure in script.figures
            if colour in (None, figure.name.colour) and shape in (None, figure.name.shape)
        ]  # fmt: skip
        (figure,) = named
        truths = {figure.name.shape, figure.direction, f"{figure.span[0]:.1f} to {figure.span[1]:.1f}"}
        if colour is None:
            truths = {figure.name.colour}
        elif shape is None:
            truths = {figure.name.shape}
        assert answer in truths
        assert (" to " in answer) == question.startswith(("When", "From", "At"))
        assert answer != figure.direction or whole(figure.span)


def test_a_talk_is_about_the_clip_that_the_data_set_has(tmp_path: Path) -> None:
    files = [write_dataset(tmp_path, "train", 7, 4, shares=LONG_SHARES, duration=LONG_SECONDS)]
    for name, make in {"talks": talk, "descriptions": description}.items():
        files.append(tmp_path / f"{name}.jsonl")
        write_about(files[-1], make, "train", 7, 4, shares=LONG_SHARES, duration=LONG_SECONDS)
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    for single, several, described in zip(*rows, strict=True):  # long clips all have several figures
        assert several["messages"][:2] == single["messages"]
        assert several["seed"] == single["seed"] == described["seed"]
        media = [parse_row(row, tmp_path, "sft").media for row in (single, several, described)]
        assert media == [media[0]] * 3


@settings(max_examples=60)
@given(
    seed=st.integers(0, 100_000), kind=st.sampled_from(KINDS), duration=st.sampled_from([SHORT_SECONDS, LONG_SECONDS])
)
def test_a_description_says_of_every_figure_what_is_so(seed: int, kind: str, duration: float) -> None:
    if kind == "rare" and duration == SHORT_SECONDS:
        return
    script = make_script(seed, kind, duration)
    row = description(script)
    assert (row is None) == (len(script.figures) == 1)
    if row is None:
        return
    way = row["kind"].removeprefix("description by ")
    ((request, answer),) = turns(row)
    assert way in request
    firsts, said = [], []
    for part in answer.split("; "):
        words = [word for word in re.findall(r"[a-z]+", part) if word != "to"]
        span = tuple(float(edge) for edge in re.findall(r"[\d.]+", part))
        found = [next((word for word in words if word in names), None) for names in (COLOURS, SHAPES, DIRECTIONS)]
        said.append((*found, span))
        assert len(words) == sum(word is not None for word in found) and len(span) == 2
        firsts.append(words[0])
    shown = [(*figure.name, figure.direction if whole(figure.span) else None, figure.span) for figure in script.figures]
    if way == "time":
        assert said == shown
        return
    assert sorted(map(str, said)) == sorted(map(str, shown))
    assert set(firsts) <= set(COLOURS if way == "colour" else SHAPES)
    for first, group in groupby(zip(firsts, said, strict=True), lambda each: each[0]):
        spans = [each[1][3] for each in group]
        assert spans == sorted(spans) and len(spans) == firsts.count(first)


def whole(span: tuple[float, float]) -> bool:
    """Whether a figure is in both frames of a pair wherever the pair's half-second begins."""
    return round(10 * (span[1] - span[0])) >= 18


@settings(max_examples=60)
@given(seed=st.integers(0, 100_000))
def test_what_a_transcript_is_asked_stands_in_exactly_one_of_its_lines(seed: int) -> None:
    row = conversation(seed)
    lines = row["messages"][0]["content"].partition("\n\n")[0].splitlines()[1:]
    spans = [tuple(map(float, re.findall(r"[0-9]+\.[0-9]", line)[:2])) for line in lines]
    assert 2 <= len(lines) <= MOST_LINES and all(a < b for a, b in spans) and spans == sorted(spans)
    found = turns(row)
    if found[0][0].startswith("Repeat"):
        ((_, again),) = found
        assert sorted(re.findall(r"The [^.]*\.", again)) == sorted(line.partition(": ")[2] for line in lines)
        return
    assert len(found) == len(lines)
    for question, answer in found:
        name = next(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES if f"{colour} {shape}" in question)
        (fact,) = (fact for fact in FACTS.values() if question in [each.format(name=name) for each in fact.questions])
        (line,) = (line for line in lines if f": The {name} " in line)
        assert line.endswith(fact.statement.format(name=name, value=answer))


def test_texts_are_written_for_the_seeds_of_their_split(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in write_texts(tmp_path, "train", 3, 5).read_text().splitlines()]
    assert [row["seed"] for row in rows] == list(seeds("train", 3, 5)) and rows[0] == conversation(rows[0]["seed"])
    parse_row(rows[0], tmp_path, "sft")
