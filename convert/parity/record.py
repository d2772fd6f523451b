"""Activations on disk: float32 rows, appended by name as a run makes them, read back in portions of any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np


class Recording:
    """The activations of one run, a file a point in `folder`, which is the caller's to remove."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._widths: dict[str, int] = {}

    def append(self, name: str, rows: np.ndarray) -> None:
        """Add rows (n, width) of a point after those it has."""
        self._widths[name] = rows.shape[-1]
        with self._file(name).open("ab") as stream:
            stream.write(np.ascontiguousarray(rows, np.float32).data)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of a point, a copy in memory; fewer where it has fewer."""
        width = self._widths[name]
        numbers = np.fromfile(
            self._file(name), np.float32, count=(stop - start) * width, offset=start * width * 4
        )  # fmt: skip
        return numbers.reshape(-1, width)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.f32"
