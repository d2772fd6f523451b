"""The records of one model: put in a video at a time, all of it or nothing, and searched.

Notable:
- A video is replaced in one commit (LanceDB's merge_insert): its rows are updated, added or deleted together with the
  row that says it is complete. Whoever reads meanwhile, or is killed, sees the old or the new.
- Notes are nobody's index: replacing a video leaves them, removing it takes them along.
- Embedding happens before the lock is taken, so a slow model keeps no other process waiting.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from lancedb.db import DBConnection
from lancedb.expr import col, lit
from lancedb.index import FTS, Bitmap, BTree, IvfSq
from lancedb.table import Table

from agent.library.errors import LibraryError, speaking_of
from agent.library.place import Place
from agent.library.records import KINDS, Entry, Kind, Record, Video, check_span, check_video, clean
from agent.library.schema import VIDEO, dimension_of, entry_rows, settings_text, table_name, table_schema, video_row
from agent.library.search import MODES, Filter, Mode, find
from agent.library.summary import summarize
from agent.library.tables import open_table

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts to float32 (n, d)."""

INDICES: Mapping[str, FTS | BTree | Bitmap] = {
    # ICU finds words in scripts without spaces; stop words stay, since a line may have no other word.
    "text": FTS(base_tokenizer="icu", remove_stop_words=False),
    "video": BTree(),
    "kind": Bitmap(),
}

VECTOR_INDEX_ROWS = 50_000
"""Fewer rows than these are compared with a query one by one, which is exact."""

QUERY_CHARACTERS = 4096
"""What a query says after these is not searched for: each of its words costs time."""

_MOST_RECORDS = 10_000
_ATTEMPTS = 8

T = TypeVar("T")


class Collection:
    """A library's records with the vectors of `model`, any string that names a model and how it makes its vectors.

    embed: makes the vectors of texts; needed to add entries without one, and to search by vector or both.
    Every method raises LibraryError in one sentence.
    """

    def __init__(self, place: Place, connection: DBConnection, model: str, embed: Embed | None = None) -> None:
        self.model = clean(model)
        self._place, self._connection, self._embed = place, connection, embed
        self._table_name = table_name(model)

    def is_complete(self, video: str, settings: Mapping[str, Any]) -> bool:
        """Whether a video was indexed with exactly these settings, to the end."""
        check_video(video)
        table = self.open()
        if table is None:
            return False
        with speaking_of(self._place.name):
            of_video = (col("kind") == lit(VIDEO)) & (col("video") == lit(video))
            found = table.search().where(of_video).select(["settings"]).limit(1).to_arrow().to_pylist()
        return any(row["settings"] == settings_text(settings) for row in found)

    def replace(self, video: str, path: str | Path, settings: Mapping[str, Any], entries: Sequence[Entry]) -> None:
        """Make `entries` all passages and scenes of a video, which is complete with these settings from then on."""
        check_video(video)
        if any(entry.kind == "note" for entry in entries):
            raise LibraryError("A note is no part of a video's index; add it with add_notes.")
        said, now = settings_text(settings), time.time()
        vectors = self._vectors(entries)

        def put(table: Table) -> None:
            rows = entry_rows(table.schema, video, entries, vectors, now)
            about = video_row(table.schema, video, str(path), now, said, len(entries))
            of_index = (col("video") == lit(video)) & (col("kind") != lit("note"))
            merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            # "null" lets a video's own row have no vector; those of records are checked before.
            merge.when_not_matched_by_source_delete(of_index).execute(
                pa.concat_tables([about, rows]), on_bad_vectors="null"
            )

        self._write(put, vectors.shape[1])

    def add_notes(self, video: str, path: str | Path, notes: Sequence[Entry]) -> None:
        """Add notes about a video, indexed or not; a note that is held already, word for word, is not held twice."""
        check_video(video)
        if any(note.kind != "note" for note in notes):
            raise LibraryError("Only notes can be added to a video; passages and scenes are replaced together.")
        if not notes:
            return
        now, vectors = time.time(), self._vectors(notes)

        def put(table: Table) -> None:
            about = video_row(table.schema, video, str(path), now)
            table.merge_insert("id").when_not_matched_insert_all().execute(about, on_bad_vectors="null")
            rows = entry_rows(table.schema, video, notes, vectors, now)
            # The same note twice in one call would be two rows of one key.
            kept = {row_id: index for index, row_id in enumerate(rows["id"].to_pylist())}
            merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(rows.take(sorted(kept.values())))

        self._write(put, vectors.shape[1])

    def moved(self, video: str, path: str | Path) -> None:
        """Remember where a video's file is now; nothing where it is known so, or the video is not held."""
        check_video(video)
        now = clean(str(path))
        elsewhere = (col("kind") == lit(VIDEO)) & (col("video") == lit(video)) & (col("path") != lit(now))

        def put(table: Table) -> None:
            if table.count_rows(elsewhere.to_sql()):
                table.update(where=elsewhere, values={"path": now})

        self._write(put)

    def remove(self, video: str) -> int:
        """Remove all of a video, its notes too; how many passages, scenes and notes these were."""
        check_video(video)

        def take(table: Table) -> int:
            records = table.count_rows(Filter(video=video).expression().to_sql())
            table.delete(col("video") == lit(video))
            return records

        return self._write(take) or 0

    def videos(self) -> list[Video]:
        """What is held of each video, by path."""
        table = self.open()
        if table is None:
            return []
        with speaking_of(self._place.name):
            return summarize(table, self.model)

    def search(
        self,
        query: str,
        mode: Mode = "both",
        k: int = 10,
        *,
        video: str | None = None,
        kinds: Sequence[Kind] | None = None,
        span: tuple[float, float] | None = None,
    ) -> list[Record]:
        """The k best records for a query, best first; of its first QUERY_CHARACTERS, and none for a blank one.

        span: only records that overlap or touch it (seconds). How they are scored: `agent.library.search.find`.
        """
        if mode not in MODES:
            raise LibraryError(f"{mode!r} is no way to search; it is one of {', '.join(MODES)}.")
        if not 1 <= k <= _MOST_RECORDS:
            raise LibraryError(f"{k} records cannot be asked for; ask for 1 to {_MOST_RECORDS}.")
        if unknown := [kind for kind in kinds or () if kind not in KINDS]:
            raise LibraryError(f"{unknown[0]!r} is no kind of record; it is one of {', '.join(KINDS)}.")
        if video is not None:
            check_video(video)
        if span is not None:
            check_span(span)
        query, table = clean(query[:QUERY_CHARACTERS]), self.open()
        if table is None or not query.strip() or (kinds is not None and not kinds):
            return []
        vector = None if mode == "text" else self._embedded([query])[0]
        if vector is not None:
            self._check_dimension(table, len(vector))
        with speaking_of(self._place.name):
            return find(table, self.model, None if mode == "vector" else query, vector, k, Filter(video, kinds, span))

    def build_indices(self, vector_index_rows: int = VECTOR_INDEX_ROWS) -> None:
        """Bring the indices up to date and merge small files; from `vector_index_rows` rows on, index the vectors too.

        Searches find the same before and after, sooner after; the vector index may miss some of the nearest.
        """

        def build(table: Table) -> None:
            if table.count_rows() >= vector_index_rows and "vector" not in indexed_columns(table):
                table.create_index("vector", config=IvfSq(distance_type="cosine"))
            table.optimize()

        self._write(build)

    def open(self) -> Table | None:
        """The newest state of the table; None where nothing was ever written."""
        return open_table(self._place, self._connection, self._table_name)

    def _write(self, action: Callable[[Table], T], dimension: int | None = None) -> T | None:
        """Run an action on the table, again where another process was faster; dimension: makes the table if need be."""
        with self._place.writing(), speaking_of(self._place.name):
            for attempt in range(_ATTEMPTS):
                try:
                    table = self.open() if dimension is None else self._open_or_create(dimension)
                    return None if table is None else action(table)
                except (RuntimeError, ValueError, OSError) as error:
                    if attempt + 1 == _ATTEMPTS or not _of_concurrency(str(error)):
                        raise
                    time.sleep(random.uniform(0, 0.05 * 2**attempt))
        raise AssertionError("unreachable")

    def _open_or_create(self, dimension: int) -> Table:
        table = self.open()
        if table is None:
            schema = table_schema(self.model, dimension)
            table = self._connection.create_table(self._table_name, schema=schema)
        self._check_dimension(table, dimension)
        for column in INDICES.keys() - indexed_columns(table):
            table.create_index(column, config=INDICES[column])
        return table

    def _check_dimension(self, table: Table, dimension: int) -> None:
        if dimension != (held := dimension_of(table.schema)):
            raise LibraryError(
                f"The library at {self._place.name} holds vectors of {held} numbers made with {self.model!r}, but "
                f"these have {dimension}; a model that differs needs another name."
            )

    def _vectors(self, entries: Sequence[Entry]) -> np.ndarray:
        """float32 (n, d), those given and those embedded."""
        texts = [clean(entry.text) for entry in entries if entry.vector is None]
        # A film in which nothing was found has a row all the same, and the table needs a width for it.
        embedded = self._embedded(texts or ["nothing"]) if texts or not entries else np.empty((0, 0), np.float32)
        made = iter(embedded)
        vectors = [next(made) if entry.vector is None else _checked(entry.vector) for entry in entries]
        if len({len(vector) for vector in vectors}) > 1:
            raise LibraryError(f"The vectors of {self.model!r} must have one dimension; these have several.")
        return np.stack(vectors) if vectors else np.empty((0, embedded.shape[1]), np.float32)

    def _embedded(self, texts: Sequence[str]) -> np.ndarray:
        if self._embed is None:
            raise LibraryError("Vectors need the model that makes them; load it, or search by text.")
        vectors = np.asarray(self._embed(texts), np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise LibraryError(f"{self.model!r} gave vectors of shape {vectors.shape} for {len(texts)} texts.")
        for vector in vectors:
            _checked(vector)
        return vectors


def indexed_columns(table: Table) -> set[str]:
    return {column for index in table.list_indices() for column in index.columns}


def _checked(vector: np.ndarray) -> np.ndarray:
    vector = np.asarray(vector, np.float32)
    if vector.ndim != 1 or not np.isfinite(vector).all() or not vector.any():
        raise LibraryError("A vector must be one row of finite numbers, not all of them 0.")
    return vector


def _of_concurrency(message: str) -> bool:
    """Whether LanceDB says that another process committed first."""
    message = message.lower()
    return any(word in message for word in ("conflict", "concurrent", "already exists"))
