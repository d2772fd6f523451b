"""Which rows of a packed batch attend as one: every token asks once, and sees its row and the one before that."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ivcore.row_groups import row_groups

ROWS = st.lists(
    st.tuples(st.one_of(st.integers(1, 30), st.integers(1, 4)), st.integers(-1, 5)), min_size=1, max_size=12
)


@given(ROWS)
def test_every_token_asks_once_and_sees_its_row_and_the_one_before_it(rows: list[tuple[int, int]]) -> None:
    lengths = np.array([length for length, _ in rows], np.int32)
    parents = np.full(len(rows), -1)
    for row, (_, wanted) in enumerate(rows):
        if 0 <= wanted < row and parents[wanted] < 0:
            parents[row] = wanted
    groups, back = row_groups(lengths, parents)
    starts, owner = np.cumsum(lengths) - lengths, np.repeat(np.arange(len(rows)), lengths)
    asking = np.concatenate([group.index[:, group.first :].ravel() for group in groups])
    np.testing.assert_array_equal(asking[back], np.arange(lengths.sum()))
    for group in groups:
        for line in group.index:
            row = owner[line[group.first]]
            own = np.arange(starts[row], starts[row] + lengths[row])
            before = np.arange(0)
            if parents[row] >= 0:
                before = np.arange(starts[parents[row]], starts[parents[row]] + lengths[parents[row]])
            seen = len(before) + len(own)
            np.testing.assert_array_equal(line[:seen], np.concatenate([before, own]))
            assert group.first == len(before)
            assert (line[seen:] == own[-1]).all(), "what fills a row up comes after it"
            assert seen > 7 / 8 * len(line) - 1e-9
