"""Where the marks of a run's timeline go: everything across in percent of its width, everything down in pixels.

A drawing in percent keeps its letters' size at any width, so labels are spaced for a phone's and never overlap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from agent.clock import clock, span_text
from agent.entries import Call, Entry, Evidence, Feedback, Judgement, Observation, Result, Run
from agent.run_view import asked_span, call_text, observation_text, shortened
from agent.spans import Span

LABEL = 7.0
"""The width in percent that a label of two characters needs on a drawing of 290 pixels, a small phone's."""
FLAG_ROW, HEADING, BAR_ROW, LANE_GAP, AXIS = 22, 20, 18, 12, 26
MAX_ROWS = 6  # of a lane; what is beyond shares the last one, without labels
MAX_LANES = 10  # a model may make up names of tools
MAX_FRAMES = 128
MAX_NAME = 24
MOST_TICKS = 5
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800)
FRESH_LOOK = "fresh look"


@dataclass(frozen=True)
class Label:
    """A text at `x` percent, moved by `shift` pixels; anchor: SVG's text-anchor; inside: it lies on its own bar."""

    text: str
    x: float
    anchor: Literal["start", "middle", "end"] = "start"
    shift: int = 0
    inside: bool = False


@dataclass(frozen=True)
class Mark:
    """A span that was looked at. frames: percent; title: what a pointer over it says; turn: counted from 0."""

    left: float
    width: float
    top: int
    label: Label | None
    frames: tuple[float, ...]
    title: str
    turn: int
    problem: bool


@dataclass(frozen=True)
class Flag:
    """A piece of evidence, numbered from 1: a band over all lanes, and a flag above its centre or near it.

    left, right, centre: of the band; middle, top: of the flag.
    """

    number: int
    left: float
    width: float
    right: float
    centre: float
    middle: float
    top: int
    title: str


@dataclass(frozen=True)
class Lane:
    name: str
    top: int
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Timeline:
    """top, axis: where the lanes begin and end, below the flags. unplaced: (what, turn) of calls without a span."""

    duration: float
    height: int
    top: int
    axis: int
    flags: tuple[Flag, ...]
    lanes: tuple[Lane, ...]
    ticks: tuple[Label, ...]
    unplaced: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class _Event:
    lane: str
    span: Span
    title: str
    turn: int
    times: tuple[float, ...] = ()
    problem: bool = False


@dataclass
class _Rows:
    """Places intervals (percent) in the first row where they fit; at most `limit` rows."""

    limit: int
    taken: list[list[tuple[float, float]]] = field(default_factory=list)

    def place(self, start: float, end: float) -> tuple[int, bool]:
        """The row, and whether the interval is free in it."""
        for number, row in enumerate(self.taken):
            if all(end <= left or right <= start for left, right in row):
                row.append((start, end))
                return number, True
        if len(self.taken) == self.limit:
            return self.limit - 1, False
        self.taken.append([(start, end)])
        return len(self.taken) - 1, True


def timeline(run: Run, entries: Sequence[Entry]) -> Timeline:
    """The timeline of a run's entries: a lane for every tool that was called, in the order of their first calls."""
    events, unplaced = _events(entries, run.duration)
    cited = [evidence for entry in entries if isinstance(entry, Result) for evidence in entry.evidence]
    flags, top = _flags(cited, run.duration)
    names = list(dict.fromkeys(event.lane for event in events))
    kept = names if len(names) <= MAX_LANES else names[: MAX_LANES - 1]
    lanes: list[Lane] = []
    below = top
    for name in [*kept, *(["other"] if len(names) > len(kept) else [])]:
        mine = [event for event in events if (event.lane if event.lane in kept else "other") == name]
        marks, rows = _lane(mine, run.duration, below + HEADING)
        lanes.append(Lane(name, below, marks))
        below += HEADING + rows * BAR_ROW + LANE_GAP
    return Timeline(
        run.duration, below + AXIS, top, below, flags, tuple(lanes), _ticks(run.duration), tuple(unplaced)
    )  # fmt: skip


def _events(entries: Iterable[Entry], duration: float) -> tuple[list[_Event], list[tuple[str, int]]]:
    """What has a span, and (what, turn) of the calls that have none."""
    entries = list(entries)
    feedback = {entry.call: entry for entry in entries if isinstance(entry, Feedback)}
    calls = {entry.observation: entry.call for entry in feedback.values() if entry.observation is not None}
    by_id = {entry.id: entry for entry in entries if isinstance(entry, Call)}
    seen = {entry.id for entry in entries if isinstance(entry, Observation)}
    events: list[_Event] = []
    unplaced: list[tuple[str, int]] = []
    for entry in entries:
        if isinstance(entry, Observation):
            call = by_id.get(calls.get(entry.id, ""))
            title = f"{call_text(call) if call else entry.source}: {observation_text(entry)}"
            events.append(_Event(_name(entry.source), entry.span, title, entry.turn, entry.times))
        elif isinstance(entry, Judgement):
            title = f"fresh look at claim {entry.claim}: {entry.verdict}"
            events.extend(_Event(FRESH_LOOK, span, title, entry.turn) for span in entry.spans)
        elif isinstance(entry, Call):
            came = feedback.get(entry.id)
            if came is not None and came.observation in seen:
                continue
            problem = came is not None and came.problem is not None
            span = asked_span(entry.arguments) if isinstance(entry.arguments, dict) else None
            if span is not None and 0 <= span[0] < span[1] and span[0] < duration:
                events.append(_Event(_name(entry.name), span, call_text(entry), entry.turn, problem=problem))
            else:
                unplaced.append((_name(entry.name) + (" with a problem" if problem else ""), entry.turn))
    return events, unplaced


def _name(text: str) -> str:
    return shortened(text, MAX_NAME) or "no name"


def _flags(cited: Sequence[Evidence], duration: float) -> tuple[tuple[Flag, ...], int]:
    """The flags, and the pixels that they take."""
    rows, flags = _Rows(MAX_ROWS), []
    for number, evidence in enumerate(cited, 1):
        left, width = _across(evidence.span, duration)
        centre = round(left + width / 2, 3)
        middle = min(max(centre, LABEL / 2), 100 - LABEL / 2)
        row, _ = rows.place(middle - LABEL / 2, middle + LABEL / 2)
        title = f"evidence {number}: {span_text(evidence.span)}"
        flags.append(Flag(number, left, width, round(left + width, 3), centre, middle, row * FLAG_ROW, title))
    return tuple(flags), len(rows.taken) * FLAG_ROW


def _lane(events: Sequence[_Event], duration: float, top: int) -> tuple[tuple[Mark, ...], int]:
    """The marks of a lane, and how many rows they take."""
    rows, marks = _Rows(MAX_ROWS), []
    for event in events:
        left, width = _across(event.span, duration)
        right = left + width
        text = str(event.turn + 1)
        if right + LABEL <= 100:
            label, taken = Label(text, round(right, 3), "start", 5), (left, right + LABEL)
        elif left >= LABEL:
            label, taken = Label(text, left, "end", -5), (left - LABEL, right)
        else:
            label, taken = Label(text, round(right, 3), "end", -6, inside=True), (left, right)
        row, free = rows.place(*taken)
        step = -(-len(event.times) // MAX_FRAMES) or 1
        marks.append(
            Mark(
                left=left,
                width=width,
                top=top + row * BAR_ROW,
                label=label if free else None,
                frames=tuple(_percent(time, duration) for time in event.times[::step]),
                title=f"turn {event.turn + 1}: {event.title}",
                turn=event.turn,
                problem=event.problem,
            )
        )
    return tuple(marks), len(rows.taken)


def _across(span: Span, duration: float) -> tuple[float, float]:
    """(left, width) in percent."""
    left, right = _percent(span[0], duration), _percent(span[1], duration)
    return left, round(max(right - left, 0.0), 3)


def _percent(time: float, duration: float) -> float:
    return round(100 * min(max(time / duration, 0.0), 1.0), 3) if duration > 0 else 0.0


def _ticks(duration: float) -> tuple[Label, ...]:
    most = MOST_TICKS if duration < 36_000 else MOST_TICKS - 1  # hours of two digits are wide
    step = next((step for step in STEPS if duration <= step * most), duration / most)
    labels = []
    for number in range(int(duration / step + 1e-6) + 1):
        time = number * step
        x = _percent(time, duration)
        # Whole seconds need no tenths, and the axis has little room.
        text = clock(time) if step < 1 else clock(time)[:-2]
        # The first and the last reach into the margin.
        if number == 0:
            labels.append(Label(text, x, "start", -12))
        else:
            labels.append(Label(text, x, "end", 12) if x > 93 else Label(text, x, "middle"))
    return tuple(labels)
