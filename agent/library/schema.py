"""A table of the library: its columns, its version, and records as rows of it.

Notable:
- A table holds what was made with one model. A vector column has one width, an index over it one geometry, and
  distances between vectors of two models mean nothing: apart, they cannot be mixed by a filter that somebody forgot.
- Beside passages, scenes and notes it has one row a video, of kind "video": the path, the settings and the count of
  the index. It is written in the same commit as the records, so it being there means that they all are.
- `id` is the table's primary key, by which LanceDB tells that two commits at the same time touch the same rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from agent.library.errors import LibraryError
from agent.library.records import Entry, clean

SCHEMA_VERSION = 1
"""Raised when older programs would misread a table; every later version keeps this number where it is now."""

VIDEO = "video"
_PREFIX = "records_"
_VERSION, _MODEL = b"ivmlx.library.version", b"ivmlx.library.model"
_PRIMARY_KEY = {"lance-schema:unenforced-primary-key": "true"}


def table_name(model: str) -> str:
    """The table of a model: its id is hashed, since a table's name may not hold every character."""
    return f"{_PREFIX}{hashlib.sha256(clean(model).encode()).hexdigest()[:16]}"


def table_schema(model: str, dimension: int) -> pa.Schema:
    """The columns of a table for vectors float32 (dimension,)."""
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False, metadata=_PRIMARY_KEY),
            pa.field("video", pa.string(), nullable=False),
            pa.field("kind", pa.string(), nullable=False),
            pa.field("span_start", pa.float64(), nullable=False),
            pa.field("span_end", pa.float64(), nullable=False),
            pa.field("text", pa.string()),
            pa.field("source", pa.string()),
            pa.field("time", pa.float64(), nullable=False),
            pa.field("vector", pa.list_(pa.float32(), dimension)),
            pa.field("path", pa.string()),
            pa.field("settings", pa.string()),
            pa.field("count", pa.int64()),
        ],
        metadata={_VERSION: str(SCHEMA_VERSION), _MODEL: clean(model)},
    )


def model_of(schema: pa.Schema, table: str, location: str) -> str:
    """The model of a table; LibraryError where a newer program, or none of this project, has written it."""
    about = schema.metadata or {}
    version = about.get(_VERSION, b"").decode(errors="replace")
    if not version.isdecimal():
        raise LibraryError(f"{location} holds a LanceDB table, {table}, that is not of a video library; name another.")
    if int(version) > SCHEMA_VERSION:
        raise LibraryError(
            f"The library at {location} was written by a newer version of this program (its schema is {version}, this "
            f"one knows {SCHEMA_VERSION}); update the program, or name another library."
        )
    return about[_MODEL].decode()


def dimension_of(schema: pa.Schema) -> int:
    return int(schema.field("vector").type.list_size)


def settings_text(settings: Mapping[str, Any]) -> str:
    """The one spelling of settings, whatever their order; LibraryError for what JSON cannot hold."""
    try:
        return json.dumps(dict(settings), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise LibraryError(f"The settings of an index must be plain values ({error}).") from None


def entry_rows(schema: pa.Schema, video: str, entries: Sequence[Entry], vectors: np.ndarray, now: float) -> pa.Table:
    """Rows of entries with their vectors, float32 (n, d). A note's id is its content's, so it is held once."""
    texts = [clean(entry.text) for entry in entries]
    sources = [clean(entry.source) for entry in entries]
    ids = [
        f"{video}:note:{_digest(entry.span, text, source)}" if entry.kind == "note" else f"{video}:{entry.kind}:{index}"
        for index, (entry, text, source) in enumerate(zip(entries, texts, sources, strict=True))
    ]
    numbers = pa.array(np.ascontiguousarray(vectors).reshape(-1), pa.float32())
    return _rows(
        schema,
        len(entries),
        {
            "id": ids,
            "video": [video] * len(entries),
            "kind": [entry.kind for entry in entries],
            "span_start": [float(entry.span[0]) for entry in entries],
            "span_end": [float(entry.span[1]) for entry in entries],
            "text": texts,
            "source": sources,
            "time": [now] * len(entries),
            "vector": pa.FixedSizeListArray.from_arrays(numbers, dimension_of(schema)),
        },
    )


def video_row(
    schema: pa.Schema, video: str, path: str, now: float, settings: str | None = None, count: int = 0
) -> pa.Table:
    """The row of a video; settings: None where it has not been indexed."""
    columns = {"id": f"{video}:video", "video": video, "kind": VIDEO, "span_start": 0.0, "span_end": 0.0}
    columns |= {"time": now, "path": clean(path), "settings": settings, "count": count}
    return _rows(schema, 1, {name: [value] for name, value in columns.items()})


def _rows(schema: pa.Schema, count: int, columns: Mapping[str, Any]) -> pa.Table:
    absent = {field.name: pa.nulls(count, field.type) for field in schema if field.name not in columns}
    return pa.table({**columns, **absent}, schema=schema)


def _digest(span: tuple[float, float], text: str, source: str) -> str:
    return hashlib.sha256(json.dumps([*map(float, span), text, source]).encode()).hexdigest()[:32]
