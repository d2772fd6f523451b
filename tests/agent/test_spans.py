"""Spans: how they overlap, and the one that a text states."""

from __future__ import annotations

from datetime import timedelta
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from agent.spans import Span, first_span, overlap
from train.rewards import temporal_iou as iou


def span_of(numbers: tuple[float, float]) -> Span:
    first, last = sorted(numbers)
    assume(first < last)
    return first, last


TIMES = st.floats(0, 1e5, allow_subnormal=False)
SPANS = st.tuples(TIMES, TIMES).map(span_of)


@given(SPANS, SPANS)
def test_overlap_and_iou_are_symmetric_and_those_of_exact_arithmetic(one: Span, other: Span) -> None:
    assert overlap(one, other) == overlap(other, one) and iou(one, other) == iou(other, one)
    (a, b), (c, d) = [tuple(map(Fraction, each)) for each in (one, other)]
    shared = max(Fraction(0), min(b, d) - max(a, c))
    union = (b - a) + (d - c) - shared
    assert overlap(one, other) == pytest.approx(float(shared), rel=1e-12)
    assert iou(one, other) == pytest.approx(float(shared / union), rel=1e-9)


@given(SPANS)
def test_a_span_is_itself_and_shares_nothing_with_what_only_touches_it(span: Span) -> None:
    assert iou(span, span) == 1 and overlap(span, (span[1], span[1] + 1)) == iou(span, (span[1], span[1] + 1)) == 0


@given(st.integers(1, 10**9), st.integers(0, 10**6))
def test_the_iou_of_the_shortest_spans_is_no_division_by_zero(steps: int, start: int) -> None:
    end = start + steps * 2.0**-32
    assume(end > start)
    assert iou((start, end), (start, end)) == 1


@given(st.text() | st.text("0123456789. to-s"), SPANS)
def test_a_span_that_is_read_lies_within(text: str, within: Span) -> None:
    found = first_span(text, within)
    assert found is None or within[0] <= found[0] < found[1] <= within[1]


@given(SPANS, st.sampled_from(["to", "-", "–", "and"]), st.sampled_from(["", "s", " s", " seconds"]))
def test_a_span_that_is_written_is_read(span: Span, word: str, unit: str) -> None:
    first, last = (round(each, 3) for each in span)
    assume(first < last)
    text = f"It is there from {first:.3f}{unit} {word} {last:.3f}{unit}."
    assert first_span(text, (0.0, 1e6)) == (first, last)


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("2.5 to 3.0", (2.5, 3.0)),
        ("not in the video", None),
        ("from 5 to 3, or 4 to 6", (4.0, 6.0)),
        ("0 to 1, then 3 to 4", (3.0, 4.0)),
        ("1 to 99", (2.0, 8.0)),
        ("0.123456789 to 3", (2.0, 3.0)),
        ("1234567.5 to 7654321.5", None),
        ("2 to 7654321", None),
        ("3 to", None),
        ("٣ to ٤", None),
    ],
)
def test_what_a_text_states_within_2_to_8(text: str, span: Span | None) -> None:
    assert first_span(text, (2.0, 8.0)) == span


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59), st.integers(1, 999), st.integers(1, 10_000))
def test_times_are_read_as_a_players_clock_writes_them(
    hours: int, minutes: int, seconds: int, thousandths: int, more: int
) -> None:
    start = Fraction(hours * 3600 + minutes * 60 + seconds) + Fraction(thousandths, 1000)
    first, last = (clock_of(each) for each in (start, start + more))
    for text in (f"{first} to {last}", f"It is there [{first}-{last}].", f"{float(start):.3f} and {last}"):
        assert first_span(text, (0.0, 1e7)) == pytest.approx((float(start), float(start + more)))


def clock_of(time: Fraction) -> str:
    """`0:02.5`, from an hour on `1:00:02.5`, as timedelta writes it."""
    text = str(timedelta(microseconds=int(time * 10**6) % (24 * 3600 * 10**6)))
    hours, rest = text.split(":", 1)
    whole = int(hours) + int(time) // (24 * 3600) * 24
    return f"{whole}:{rest}" if whole else rest


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("12:03 to 12:05", (723.0, 725.0)),
        ("[00:12.0-00:15.5]", (12.0, 15.5)),
        ("59:58 and 1:00:03", (3598.0, 3603.0)),
        ("at 10:00, 3 to 4", (3.0, 4.0)),
        ("Answer:3 to 4", (3.0, 4.0)),
        ("3 to 12:75", None),
        ("12:5 to 12:9", None),
        ("1:02:03:04 to 9:00", None),
        ("1:99 to 2:00", None),
    ],
)
def test_what_is_no_clock_is_no_time_and_neither_is_a_part_of_one(text: str, span: Span | None) -> None:
    assert first_span(text, (0.0, 1e4)) == span


def test_a_megabyte_of_digits_is_read_at_once() -> None:
    assert first_span("1" * 1_000_000, (0.0, 1.0)) is None
    assert first_span("1 to " * 200_000, (0.0, 1.0)) is None
    assert first_span("1:11" * 200_000, (0.0, 1.0)) is None
