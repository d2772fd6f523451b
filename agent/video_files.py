"""The videos that paths name: files as they are, folders for what is in them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

VIDEO_SUFFIXES = frozenset({
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg",
    ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv",
})  # fmt: skip


def video_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files that paths name, in their order, each once; of a folder the videos in it, at any depth, by name.

    A file that is named itself is taken whatever its suffix is, and whether or not it is there: reading it says so.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        files = _videos_below(path) if path.is_dir() else [path]
        found |= dict.fromkeys(Path(os.path.abspath(file)) for file in files)
    return list(found)


def _videos_below(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            # macOS keeps "._film.mp4" beside "film.mp4" on foreign disks.
            if not name.startswith(".") and Path(name).suffix.lower() in VIDEO_SUFFIXES:
                yield Path(parent, name)
