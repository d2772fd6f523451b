"""Which rows of a packed batch attend as one: decided once, so that both backends go through the same arrays.

A row may go on from another, as answers go on from the prompt that they share: the prompt is in the batch once, and
the tokens of every answer see it. Every answer's keys are the prompt's and its own, its queries its own alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_WASTE = 1 / 8  # of a group of rows that attend together: how much shorter than its longest one a row may be


@dataclass(frozen=True)
class RowGroup:
    """Rows of nearly one length, which attend as one batch.

    index: int32 (rows, longest) into the S tokens, those that are seen. A shorter row is filled up with its last token:
        that comes after its own ones, which under a causal mask do not see it.
    first: how many of the columns are of the row that these go on from: what asks are the others.
    """

    index: np.ndarray
    first: int = 0


def row_groups(lengths: np.ndarray, parents: np.ndarray | None = None) -> tuple[list[RowGroup], np.ndarray]:
    """All rows in groups, and the way back.

    lengths: int (rows,). parents: int (rows,), the row that each goes on from, -1 where it is none; None: nowhere.
    Returns also int32 (S,): where the result of each token stands when those of all groups, of the columns from `first`
    on, are flattened and joined.
    """
    starts = np.cumsum(lengths) - lengths
    parents = np.full(len(lengths), -1) if parents is None else parents
    groups, back, at = [], np.empty(int(lengths.sum()), np.int32), 0
    for rows in _alike(lengths, parents):
        parent = int(parents[rows[0]])
        first = 0 if parent < 0 else int(lengths[parent])
        within = np.arange(int(lengths[rows[0]]))[None]
        own = starts[rows, None] + np.minimum(within, lengths[rows, None] - 1)
        real = within < lengths[rows, None]
        back[own[real]] = at + np.flatnonzero(real)
        at += own.size
        before = np.broadcast_to(np.arange(first) + (0 if parent < 0 else starts[parent]), (len(rows), first))
        groups.append(RowGroup(np.concatenate([before, own], axis=1).astype(np.int32), first))
    return groups, back


def _alike(lengths: np.ndarray, parents: np.ndarray) -> list[np.ndarray]:
    """Rows that go on from the same one, or from none, the longest first, cut where they become too short."""
    groups: list[list[int]] = []
    seen = lengths + np.where(parents < 0, 0, lengths[parents])
    for row in np.lexsort((-lengths, parents)).tolist():
        longest = groups[-1][0] if groups else row
        if not groups or parents[row] != parents[longest] or seen[row] < (1 - _WASTE) * seen[longest]:
            groups.append([])
        groups[-1].append(row)
    return [np.array(group) for group in groups]
