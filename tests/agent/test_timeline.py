"""The timeline: every look and every piece of evidence has its place, and on a phone no label lies on another."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.entries import Call, Entry, Evidence, Feedback, Judgement, Observation, Result, Run
from agent.timeline import MAX_LANES, MAX_ROWS, Label, Timeline, timeline

PHONE = 290  # pixels across
CHARACTER = 6.6  # pixels of a digit at the drawing's 11 pixels


def run_of(duration: float) -> Run:
    return Run(path="f", video="0", duration=duration, question="?", model="m", backend="b", dtype="d")


def extent(label: Label) -> tuple[float, float]:
    """Left and right of a label in pixels on a phone."""
    width, at = CHARACTER * len(label.text), label.x * PHONE / 100 + label.shift
    left = {"start": at, "middle": at - width / 2, "end": at - width}[label.anchor]
    return left, left + width


def seen(number: int, span: tuple[float, float], source: str = "look") -> list[Entry]:
    call = Call(turn=number, id=f"c{number}", name=source, arguments={"start": span[0], "end": span[1]})
    look = Observation(turn=number, id=f"o{number}", source=source, span=span, times=span)
    return [call, look, Feedback(turn=number, call=f"c{number}", observation=f"o{number}")]


spans = st.lists(st.tuples(st.floats(0, 0.99), st.floats(0.0001, 1)), min_size=1, max_size=40)


@given(st.sampled_from([4.0, 16.0, 600.0, 7200.0, 90_000.0]), spans)
def test_no_label_lies_on_another_or_on_a_mark(duration: float, shares: list[tuple[float, float]]) -> None:
    looks = [(start * duration, min(start + length, 1) * duration) for start, length in shares]
    entries = [entry for number, span in enumerate(looks) for entry in seen(number, span)]
    made = timeline(run_of(duration), entries)
    (lane,) = made.lanes
    assert len(lane.marks) == len(looks)
    taken: list[tuple[int, float, float]] = []
    for mark in lane.marks:
        left, right = mark.left * PHONE / 100, (mark.left + mark.width) * PHONE / 100
        if mark.label is None:
            assert len({other.top for other in lane.marks}) == MAX_ROWS
            continue
        text = extent(mark.label)
        assert text[0] >= -0.01 and text[1] <= PHONE + 0.01
        assert mark.label.inside or text[1] <= left or right <= text[0]
        taken.append((mark.top, min(text[0], left), max(text[1], right)))
    for (top, left, right), (other_top, other_left, other_right) in combinations(taken, 2):
        assert top != other_top or right <= other_left + 0.01 or other_right <= left + 0.01


@given(st.floats(0.5, 200_000))
def test_the_labels_of_the_axis_have_room(duration: float) -> None:
    ticks = timeline(run_of(duration), []).ticks
    assert 2 <= len(ticks) <= 7
    extents = [extent(tick) for tick in ticks]
    assert all(one[1] < other[0] for one, other in pairwise(extents))
    margin = 16  # of the page
    assert extents[0][0] >= -margin and extents[-1][1] <= PHONE + margin


@pytest.mark.parametrize(
    ("duration", "labels"),
    [
        (600.0, ["00:00", "02:00", "04:00", "06:00", "08:00", "10:00"]),
        (7200.0, ["00:00", "30:00", "1:00:00", "1:30:00", "2:00:00"]),
        (4.0, ["00:00", "00:01", "00:02", "00:03", "00:04"]),
        (1.0, ["00:00.0", "00:00.2", "00:00.4", "00:00.6", "00:00.8", "00:01.0"]),
    ],
)
def test_an_axis_counts_in_round_steps(duration: float, labels: list[str]) -> None:
    assert [tick.text for tick in timeline(run_of(duration), []).ticks] == labels


@given(st.lists(st.floats(0, 599), max_size=MAX_ROWS))
def test_flags_of_evidence_are_apart_and_in_the_drawing(starts: list[float]) -> None:
    evidence = tuple(Evidence(observation="o", span=(start, start + 1)) for start in starts)
    made = timeline(run_of(600), [Result(answer="", status="verified", evidence=evidence)])
    assert [flag.number for flag in made.flags] == list(range(1, len(starts) + 1))
    for flag, start in zip(made.flags, starts, strict=True):
        assert (flag.left, flag.right) == pytest.approx((start / 6, (start + 1) / 6), abs=0.002)
        assert 9 <= flag.middle * PHONE / 100 <= PHONE - 9
        assert flag.top + 18 <= made.top
    for one, other in combinations(made.flags, 2):
        across = (one.middle - other.middle) * PHONE / 100
        assert across**2 + (one.top - other.top) ** 2 >= 18**2


def test_calls_without_an_observation_are_placed_by_their_arguments_or_listed() -> None:
    entries: list[Entry] = [
        Call(id="c1", name="ground", arguments={"span": [3, 6]}),
        Feedback(call="c1", problem="Nothing is like it."),
        Call(turn=1, id="c2", name="look", arguments={"start": 20, "end": 30}),
        Feedback(turn=1, call="c2", problem="The video ends at 10.0 s."),
        Call(turn=2, id="c3", name="note", arguments={"text": "a cross"}),
        Call(turn=3, id="c4", name="look", arguments='{"start"'),
        Judgement(turn=4, claim="k1", verdict="support", spans=((1, 2), (8, 9)), support=0.9),
    ]
    made = timeline(run_of(10), entries)
    assert [(lane.name, [(mark.left, mark.width) for mark in lane.marks]) for lane in made.lanes] == [
        ("ground", [(30, 30)]),
        ("fresh look", [(10, 10), (80, 10)]),
    ]
    assert made.lanes[0].marks[0].problem
    assert made.unplaced == (("look with a problem", 1), ("note", 2), ("look", 3))


def test_a_model_that_makes_up_tools_gets_no_endless_timeline() -> None:
    entries = [entry for n in range(300) for entry in seen(n, (1, 2), f"tool {n} " + "x" * 1000)]
    made = timeline(run_of(10), entries)
    assert len(made.lanes) == MAX_LANES and made.lanes[-1].name == "other"
    assert sum(len(lane.marks) for lane in made.lanes) == 300
    assert made.height < 1000


def test_lanes_follow_each_other_without_overlap() -> None:
    entries = [entry for n in range(12) for entry in seen(n, (n / 2, n / 2 + 1), ("look", "ground", "overview")[n % 3])]
    made: Timeline = timeline(run_of(10), entries)
    assert [lane.name for lane in made.lanes] == ["look", "ground", "overview"]
    edges = [lane.top for lane in made.lanes] + [made.axis]
    for lane, below in zip(made.lanes, edges[1:], strict=True):
        assert all(lane.top < mark.top and mark.top + 14 < below for mark in lane.marks)


def test_a_video_of_no_length_has_a_timeline() -> None:
    assert timeline(run_of(0.0), seen(0, (0.0, 0.0))).ticks[0].text == "00:00.0"
