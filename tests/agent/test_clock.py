"""Times as a person reads them: tenths that carry over, and that agree with numbers printed beside them."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.clock import clock, span_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "00:00.0"),
        (12.0, "00:12.0"),
        (59.94, "00:59.9"),
        (59.96, "01:00.0"),
        (599.97, "10:00.0"),
        (3599.94, "59:59.9"),
        (3599.96, "1:00:00.0"),
        (3723.4, "1:02:03.4"),
        (36000.0, "10:00:00.0"),
        (-0.04, "00:00.0"),
        (-61.5, "-01:01.5"),
        (math.nan, "--:--.-"),
        (math.inf, "--:--.-"),
    ],
)
def test_a_clock_shows_minutes_seconds_and_tenths(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@given(st.floats(0, 1e6))
def test_a_clock_is_the_number_rounded_as_python_prints_it(seconds: float) -> None:
    match = re.fullmatch(r"(?:(\d+):)?(\d\d):(\d\d)\.(\d)", clock(seconds))
    assert match is not None
    hours, minutes, whole, tenth = (int(part or 0) for part in match.groups())
    assert minutes < 60 and whole < 60
    assert f"{hours * 3600 + minutes * 60 + whole}.{tenth}" == f"{seconds:.1f}"


def test_a_span_is_written_as_evidence_is_cited() -> None:
    assert span_text((12.0, 15.5)) == "[00:12.0-00:15.5]"
    assert span_text((3599.96, 7200)) == "[1:00:00.0-2:00:00.0]"
