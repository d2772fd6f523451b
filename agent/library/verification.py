"""Whether a table is whole: every row readable and sound, the counts right, the indices there and readable."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from lancedb.expr import col, lit
from lancedb.table import Table

from agent.library.collection import INDICES, indexed_columns
from agent.library.errors import REBUILD, LibraryError, speaking_of
from agent.library.records import KINDS
from agent.library.schema import VIDEO, dimension_of

_BATCH_ROWS = 1024
_QUERIED = 256
_WORD = re.compile(r"(?<!\S)[a-z]{2,20}(?!\S)")
"""A word that the index's tokenizer keeps whole."""


def problems_of(table: Table, location: str) -> list[str]:
    """A sentence for each thing that is wrong; reads everything, a batch of rows at a time."""
    problems: list[str] = []
    try:
        with speaking_of(location):
            problems += [f"The library at {location} is damaged ({what}); {REBUILD}." for what in _of_rows(table)]
    except LibraryError as error:
        problems.append(str(error))
    try:
        with speaking_of(location):
            # They are made before the first rows are.
            missing = INDICES.keys() - indexed_columns(table) if table.count_rows() else ()
            problems += [f"{table.name} has no index on {column}; index a video to make it." for column in missing]
            for index in table.list_indices():
                table.prewarm_index(index.name)  # type: ignore[attr-defined]
            if not missing and (lost := _not_found_by_their_text(table)):
                what = f"the text of {lost} records of {table.name} is not found by a search"
                problems.append(f"The library at {location} is damaged ({what}); {REBUILD}.")
    except LibraryError as error:
        problems.append(str(error))
    return problems


def _of_rows(table: Table) -> list[str]:
    """What is wrong with the rows, half a sentence each."""
    ids: Counter[str] = Counter()
    held: Counter[str] = Counter()
    promised: dict[str, int] = {}
    strange = unsound = 0
    for batch in table.search().to_batches(batch_size=_BATCH_ROWS):
        videos, kinds = batch["video"].to_pylist(), batch["kind"].to_pylist()
        ids.update(batch["id"].to_pylist())
        held.update(video for video, kind in zip(videos, kinds, strict=True) if kind in ("passage", "scene"))
        counts = zip(videos, kinds, batch["count"].to_pylist(), strict=True)
        promised |= {video: count for video, kind, count in counts if kind == VIDEO}
        strange += sum(kind not in (*KINDS, VIDEO) for kind in kinds)
        unsound += _unsound(batch["vector"], np.array([kind != VIDEO for kind in kinds]), dimension_of(table.schema))
    found = [
        f"{video} has {held[video]} passages and scenes, not {n}" for video, n in promised.items() if held[video] != n
    ]
    found += [f"{video} has records but no row of its own" for video in held.keys() - promised.keys()]
    if double := sum(count - 1 for count in ids.values()):
        found.append(f"{table.name} holds {double} rows twice")
    if strange:
        found.append(f"{table.name} holds {strange} rows of an unknown kind")
    if unsound:
        found.append(f"{table.name} holds {unsound} records whose vector is missing or not finite")
    if (count := table.count_rows()) != ids.total():
        found.append(f"{table.name} should have {count} rows, of which {ids.total()} can be read")
    return found


def _not_found_by_their_text(table: Table) -> int:
    """How many records the index on the text has lost: LanceDB keeps no checksums, a wrong byte in it is no error."""
    lost = 0
    for batch in table.search().where(col("kind") != lit(VIDEO)).select(["id", "text"]).to_batches(batch_size=_QUERIED):
        words = {row["id"]: found[0] for row in batch.to_pylist() if (found := _WORD.findall(row["text"]))}
        if words:
            query: Any = table.search(" ".join(sorted(set(words.values()))), query_type="fts", fts_columns="text")
            of_batch = col("id").isin(sorted(words))
            lost += len(words) - len(query.where(of_batch).select(["id", "_score"]).limit(len(words)).to_arrow())
    return lost


def _unsound(vectors: Any, needed: np.ndarray, dimension: int) -> int:
    """How many rows that need a vector, bool (n,), have none or one that is not finite."""
    present = ~np.asarray(vectors.is_null())
    numbers = np.asarray(vectors.filter(pa.array(present)).flatten(), np.float32).reshape(-1, dimension)
    sound = np.zeros(len(present), bool)
    sound[present] = np.isfinite(numbers).all(axis=1)
    return int((needed & ~sound).sum())
