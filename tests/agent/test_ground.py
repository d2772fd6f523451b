"""The tool `ground` by itself: which windows are asked about, what is taken for a match, and how likely that is."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.spans import Span, overlap
from agent.tools import ground
from agent.tools.ground import Found, Ground, together, windows
from agent.tools.tool import call
from agent.workspace import Workspace


class Knows:
    """What a model would find that knows where an event is: sure of windows that hold half a second of it."""

    def __init__(self, event: Span | None) -> None:
        self.event, self.asked = event, [(0.0, 0.0, 0.0)][:0]

    def __call__(self, description: str, window: Span, fps: float = ground.FPS) -> Found:
        self.asked.append((*window, fps))
        if self.event is None or overlap(window, self.event) < 0.5:
            return Found(window, 0.1, window)
        seen = max(window[0], self.event[0]), min(window[1], self.event[1])
        share = (seen[1] - seen[0]) / (self.event[1] - self.event[0])
        return Found(seen if fps == ground.FINE_FPS else window, 0.5 + 0.44 * share, window)


def grounding(monkeypatch: pytest.MonkeyPatch, knows: Any) -> Ground:
    monkeypatch.setattr(Workspace, "duration", 600.0)
    monkeypatch.setattr(Ground, "_ask", lambda self, *asked: knows(*asked))
    return Ground(Workspace(Path("film.mp4"), None, None))  # type: ignore[arg-type]  # nobody asks a model


@pytest.mark.parametrize("start", [0.0, 10.5, 14.5, 100.25, 300.0, 597.0])
def test_ground_finds_an_event_of_three_seconds_in_ten_minutes(monkeypatch: pytest.MonkeyPatch, start: float) -> None:
    knows = Knows((start, start + 3.0))
    tool = grounding(monkeypatch, knows)
    (found,) = tool.find("a red circle", (0.0, 600.0))
    count = len(windows((0.0, 600.0)))
    assert found.span == (start, start + 3.0)
    assert found.probability == pytest.approx(1 / (1 + count * (0.06 / 0.94) ** 2))
    coarse = [each[:2] for each in knows.asked if each[2] == ground.FPS]
    parts = ground.parts_of(windows((0.0, 600.0))[0])
    assert coarse == windows((0.0, 600.0)) and len(knows.asked) <= len(coarse) + ground.CANDIDATES * len(parts) + 1
    assert knows.asked[-1] == (max(start - 1.0, 0.0), min(start + 4.0, 600.0), ground.CLOSEST_FPS)
    assert all(0 <= first < last <= 600 for first, last, _ in knows.asked)
    assert call(tool, {"description": "a red circle"}).text == f"Matches: {start:.1f} to {start + 3:.1f} (0.83)."


@given(st.floats(0.0, 20.0), st.floats(1.0, 16.0))
def test_an_event_that_goes_on_behind_a_window_is_one_match(start: float, length: float) -> None:
    event = start, start + length
    cut = [part for part in windows((0.0, 40.0), ground.FINE_WINDOW, ground.FINE_OVERLAP) if overlap(part, event) > 0.1]
    seen = [(max(part[0], event[0]), min(part[1], event[1])) for part in cut]
    found = together([Found(span, 0.9, part) for span, part in zip(seen, cut, strict=True)])
    assert len(found) == 1 and found[0].span == pytest.approx(event, abs=0.11)


def test_ground_looks_in_the_named_span_only_and_says_when_nothing_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    knows = Knows((100.0, 103.0))
    shown = call(grounding(monkeypatch, knows), {"description": "a red circle", "start": 200.0, "end": 210.0})
    assert shown.text == "Nothing from 200.0 to 210.0 matches. The likeliest place is 200.0 to 210.0 (0.10)."
    assert [each[:2] for each in knows.asked] == [(200.0, 210.0)] and not shown.is_evidence


def test_what_a_closer_look_does_not_see_is_no_match(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(description: str, window: Span, fps: float = ground.FPS) -> Found:
        return Found(window, 0.8 if fps == ground.FPS else 0.3 - window[0] / 1000, window)

    shown = call(grounding(monkeypatch, ask), {"description": "a red circle", "start": 0.0, "end": 12.0})
    assert shown.text == "Nothing from 0.0 to 12.0 matches. The likeliest place is 0.0 to 4.0 (0.30)."


def test_a_match_is_as_likely_as_both_looks_at_it_and_one_of_so_many_windows_make_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Odds of looks multiply, and fifty windows make them a fiftieth: 99 by 9 by 1/50, 99 by 99 and 4 by 9."""
    seen = {100.0: (0.99, 0.9), 300.0: (0.99, 0.99), 500.0: (0.8, 0.9)}

    def ask(description: str, window: Span, fps: float = ground.FPS) -> Found:
        for start, (first, again) in seen.items():
            event = start, start + 1.0
            if overlap(window, event) > 0.9:
                span = event if fps == ground.FINE_FPS else window
                return Found(span, again if fps == ground.CLOSEST_FPS else first, window)
        return Found(window, 0.1, window)

    tool = grounding(monkeypatch, ask)
    assert len(windows((0.0, 600.0))) == 50
    likelier, other = tool.find("a red circle", (0.0, 600.0))
    assert likelier.span == (300.0, 301.0) and likelier.probability == pytest.approx(196.02 / 197.02)
    assert other.span == (100.0, 101.0) and other.probability == pytest.approx(17.82 / 18.82)
    del seen[100.0], seen[300.0]
    shown = call(tool, {"description": "a red circle"})
    assert shown.text == "Nothing from 0.0 to 600.0 matches. The likeliest place is 500.0 to 501.0 (0.42)."
    (alone,) = tool.find("a red circle", (495.0, 505.0))
    assert alone.probability == pytest.approx(36 / 37)
    seen[500.0] = (1.0, 0.0)
    (undecided,) = tool.find("a red circle", (495.0, 505.0))
    assert undecided.probability == pytest.approx(0.5)


def test_of_whole_matches_that_overlap_the_likelier_stays_and_parts_of_it_are_no_other_match() -> None:
    first, second, cut = (8.0, 14.0), (11.0, 17.0), (12.0, 18.0)
    found = [Found((10.0, 13.0), 0.7, first), Found((11.7, 14.0), 0.9, second), Found((12.0, 12.6), 0.99, cut)]
    other = Found((30.0, 31.0), 0.95, (28.0, 34.0))
    assert together([*found, other]) == [other, found[1]]


def test_of_parts_in_windows_that_overlap_and_do_not_touch_the_likelier_stays() -> None:
    misread, seen, goes_on = (
        Found((13.7, 15.4), 0.8, (13.7, 17.6)), Found((16.7, 19.6), 0.9, (15.7, 19.6)),
        Found((17.6, 19.8), 0.7, (17.6, 21.5)),
    )  # fmt: skip
    far = Found((40.0, 42.0), 0.6, (40.0, 44.0))
    assert together([far, goes_on, misread, seen]) == [Found((16.7, 19.8), 0.9, (15.7, 21.5)), far]


@given(st.floats(0, 5_000), st.floats(0.1, 5_000), st.sampled_from([(16.0, 4.0), (4.0, 2.0)]))
def test_windows_cover_a_span_and_overlap_by_more_than_a_short_event(
    start: float, length: float, how: tuple[float, float]
) -> None:
    span = start, start + length
    found = windows(span, *how)
    assert found[0][0] == start and found[-1][1] == pytest.approx(span[1])
    assert all(0 < last - first <= how[0] + 1e-6 for first, last in found)
    for (_, last), (first, _) in pairwise(found):
        assert last - first == pytest.approx(how[1], abs=1e-6)
    assert all(last <= span[1] for _, last in found)
