"""Search in one table: by words (BM25), by vectors (cosine), or by both.

Both together is LanceDB's hybrid search with its reciprocal rank fusion: a record's score is the sum of 1 / (60 + rank)
over the two lists (Cormack, Clarke and Buettcher, SIGIR 2009), so neither list's own scale matters. Rows that came
after an index was last built are searched as well, one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from lancedb.expr import Expr, col, lit
from lancedb.table import Table

from agent.library.records import Kind, Record
from agent.library.schema import VIDEO, dimension_of

Mode = Literal["text", "vector", "both"]
MODES: tuple[Mode, ...] = get_args(Mode)

_FUSED_DEPTH = 50
"""Records that each of the two lists gives to the fusion, at least."""

_REFINE_FACTOR = 4
"""Candidates of the quantised vector index, per record wanted, whose true distance is then computed."""


@dataclass(frozen=True)
class Filter:
    """Which records may be found: of a video, of some kinds, and those that overlap or touch a span (seconds)."""

    video: str | None = None
    kinds: Sequence[Kind] | None = None
    span: tuple[float, float] | None = None

    def expression(self) -> Expr:
        """Built of values, never of text, so nothing in a value can be read as SQL."""
        found = col("kind") != lit(VIDEO) if self.kinds is None else col("kind").isin(list(self.kinds))
        if self.video is not None:
            found = found & (col("video") == lit(self.video))
        if self.span is not None:
            found = found & (col("span_start") <= lit(self.span[1])) & (col("span_end") >= lit(self.span[0]))
        return found


def find(
    table: Table, model: str, text: str | None, vector: np.ndarray | None, count: int, only: Filter
) -> list[Record]:
    """The `count` best records, best first, for a text, a vector (float32 (d,)), or both.

    Scores: BM25 for a text, the cosine (-1 to 1) for a vector, the fused ranks for both.
    """
    query: Any
    if vector is None:
        query, score = table.search(text, query_type="fts", fts_columns="text"), "_score"
    elif text is None:
        query, score = table.search(vector, "vector", "vector"), "_distance"
    else:
        hybrid: Any = table.search(query_type="hybrid", vector_column_name="vector", fts_columns="text")
        query, score = hybrid.vector(vector).text(text), "_relevance_score"
    if vector is not None:
        query = query.distance_type("cosine").refine_factor(_REFINE_FACTOR)
    depth = max(count, _FUSED_DEPTH) if score == "_relevance_score" else count
    found = query.where(only.expression()).limit(depth).to_arrow()
    vectors = found["vector"].combine_chunks().flatten().to_numpy().reshape(-1, dimension_of(found.schema))  # (n, d)
    rows = found.drop_columns(["vector"]).to_pylist()
    for row, vector_of_row in zip(rows, vectors, strict=True):
        row["score"] = 1 - row[score] if score == "_distance" else row[score]
        row["vector"] = vector_of_row
    rows = sorted(rows, key=lambda row: (-row["score"], row["id"]))[:count]
    paths = paths_of(table, {row["video"] for row in rows})
    return [_record(row, model, paths.get(row["video"], "")) for row in rows]


def paths_of(table: Table, videos: set[str]) -> dict[str, str]:
    """Where the files of videos were last seen, by content hash."""
    if not videos:
        return {}
    of_videos = (col("kind") == lit(VIDEO)) & col("video").isin(sorted(videos))
    rows = table.search().where(of_videos).select(["video", "path"]).limit(len(videos)).to_arrow()
    return {row["video"]: row["path"] for row in rows.to_pylist()}


def _record(row: dict[str, Any], model: str, path: str) -> Record:
    return Record(
        kind=row["kind"],
        video=row["video"],
        path=path,
        span=(row["span_start"], row["span_end"]),
        text=row["text"],
        source=row["source"],
        model=model,
        time=row["time"],
        score=float(row["score"]),
        vector=row["vector"].copy(),
    )
