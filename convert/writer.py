"""One output shard: written beside and renamed, hashed as it is written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np

from convert.record import ShardRecord
from ivcore.shards import TensorSpec, header_bytes

SYNC_BYTES = 64 * 2**20
"""Written to the disk at once: waiting for the end of a shard would make it wait for 5 GB."""

Parts = tuple[np.ndarray, ...]
"""Rows of the tensors that hold a matrix: itself, or weight, scales and biases."""


class ShardWriter:
    """Takes the blocks of one matrix after the other, in the order of the specs."""

    def __init__(self, file: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.file = file
        self._part = file.with_name(f"{file.name}.part")
        self._stream: IO[bytes] = self._part.open("wb")
        self._hash = hashlib.sha256()
        self._first_tensor = hashlib.sha256()
        self._tensors: dict[str, str] = {}
        self._held: list[list[np.ndarray]] | None = None
        self._written = self._durable = 0
        self._write(header_bytes(specs))

    def add(self, outputs: Mapping[str, TensorSpec], parts: Parts, last: bool) -> None:
        """Append a block: rows of the first tensor are written at once, the others, which are small, with the last."""
        first, *others = outputs
        if self._held is None:
            self._held = [[] for _ in others]
            self._first_tensor = hashlib.sha256()
        rows = _bytes(parts[0])
        self._write(rows)
        self._first_tensor.update(rows)
        for held, part in zip(self._held, parts[1:], strict=True):
            held.append(part)
        if not last:
            return
        self._tensors[first] = self._first_tensor.hexdigest()
        for name, held in zip(others, self._held, strict=True):
            content = _bytes(np.concatenate(held))
            self._write(content)
            self._tensors[name] = hashlib.sha256(content).hexdigest()
        self._held = None

    def finish(self) -> ShardRecord:
        """Make the file durable and give it its name."""
        self._sync()
        self._stream.close()
        os.replace(self._part, self.file)
        return ShardRecord(self._hash.hexdigest(), self._written, self._tensors)

    def abandon(self) -> None:
        """Leave nothing of an unfinished file."""
        with suppress(OSError):  # on a full disk, what is still buffered cannot be written
            self._stream.close()
        self._part.unlink(missing_ok=True)

    def _write(self, content: bytes | memoryview) -> None:
        self._stream.write(content)
        self._hash.update(content)
        self._written += len(content)
        if self._written - self._durable >= SYNC_BYTES:
            self._sync()

    def _sync(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        drop_from_cache(self._stream.fileno(), self._durable, self._written - self._durable)
        self._durable = self._written


def drop_from_cache(descriptor: int, start: int, nbytes: int) -> None:
    """Let the system's cache go of a part of a file that is not read again soon.

    Filling memory with 18 GB that pass once pushes everything else out, and on some machines costs more than the disk.
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS
        with suppress(OSError):  # not on every file system
            os.posix_fadvise(descriptor, start, nbytes, os.POSIX_FADV_DONTNEED)


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data
