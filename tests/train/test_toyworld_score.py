"""Scoring: words to the letter, spans by intersection over union, malformed answers nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.toyworld.score import is_right, parse_span, score, span_text, temporal_iou

TENTHS = st.integers(0, 9999)


@pytest.mark.parametrize("given_text", ["red circle", "Red circle.", "  red \n circle ", "RED CIRCLE ."])
def test_case_white_space_and_a_full_stop_do_not_count(given_text: str) -> None:
    assert is_right(given_text, "red circle") and score(given_text, "red circle") == 1.0


@pytest.mark.parametrize("given_text", ["", "red", "the red circle", "red circle blue", "redcircle", "red circle!"])
def test_other_words_are_wrong(given_text: str) -> None:
    assert not is_right(given_text, "red circle") and score(given_text, "red circle") == 0.0


@given(TENTHS, TENTHS)
def test_a_written_span_reads_back(one: int, other: int) -> None:
    span = min(one, other) / 10, max(one, other) / 10
    assert parse_span(span_text(span)) == (span if one != other else None)
    assert parse_span(f" {span_text(span).upper()}.\n") == parse_span(span_text(span))


MALFORMED = (
    *(
        "",
        "1.5",
        "1.5 to",
        "to 3.0",
        ". to .",
        "1.5-3.0",
        "1.5to3.0",
        "from 1.5 to 3.0",
        "1.5 to 3.0 s",
        "1.5 to 3.0 to 4",
    ),
    *("3.0 to 1.5", "2 to 2", "-1 to 3", "nan to 3", "1 to inf", "1e0 to 3", f"1 to {'9' * 400}", "١ to ٣", "1 to 3.."),
)


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_span_is_none_and_earns_nothing(text: str) -> None:
    assert parse_span(text) is None
    assert score(text, "1.5 to 3.0", (1.5, 3.0)) == 0.0


def test_spans_may_be_whole_seconds() -> None:
    assert parse_span("1 to 3") == (1.0, 3.0)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [((0, 2), (1, 3), 1 / 3), ((0, 4), (1, 2), 1 / 4), ((0, 1), (1, 2), 0), ((0, 1), (5, 6), 0), ((2, 5), (2, 5), 1)],
)
def test_iou_of_known_spans(one: tuple[float, float], other: tuple[float, float], expected: float) -> None:
    assert temporal_iou(one, other) == temporal_iou(other, one) == pytest.approx(expected)
    assert score(span_text(one), span_text(other), other) == pytest.approx(expected)
