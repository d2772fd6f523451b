"""What a table holds of each video, counted."""

from __future__ import annotations

import json
from collections import Counter

from lancedb.expr import col, lit
from lancedb.table import Table

from agent.library.records import Video
from agent.library.schema import VIDEO


def summarize(table: Table, model: str) -> list[Video]:
    """The videos of a table, by path; reads two columns of all rows, and all of the videos' own."""
    counts: Counter[tuple[str, str]] = Counter()
    for batch in table.search().select(["video", "kind"]).to_batches():
        counts.update(zip(batch["video"].to_pylist(), batch["kind"].to_pylist(), strict=True))
    columns = ["video", "path", "settings", "time"]
    rows = table.search().where(col("kind") == lit(VIDEO)).select(columns).to_arrow().to_pylist()
    found = [
        Video(
            video=row["video"],
            path=row["path"],
            model=model,
            passages=counts[row["video"], "passage"],
            scenes=counts[row["video"], "scene"],
            notes=counts[row["video"], "note"],
            settings=None if row["settings"] is None else json.loads(row["settings"]),
            time=row["time"],
        )
        for row in rows
    ]
    return sorted(found, key=lambda video: (video.path, video.video))
