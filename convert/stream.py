"""Reading, converting, hashing and writing at once, in blocks of rows, with little in memory.

Notable:
- Every source file is read once from end to end: its hash and its tensors come from the same bytes.
- The largest tensor, an embedding of 1.2 GB in the release, is never whole in memory: a block is some 8 MB, and a few
  are in flight. Reading does not map the file, or its pages would count as resident memory.
- Blocks are converted by several threads (NumPy lets go of the interpreter's lock) and written in their order by one.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np

from convert.affine import Packed, dequantize, quantize
from convert.plan import Job, Plan
from convert.record import Journal, ShardRecord
from convert.writer import Parts, ShardWriter, drop_from_cache
from ivcore.adapter import Adapter
from ivcore.errors import CheckpointError
from ivcore.floats import cast, finite, narrow, widen
from ivcore.shards import FLOAT_NAMES, STORED_AS, Checkpoint

BLOCK_BYTES = 8 * 2**20
WORKERS = min(4, os.cpu_count() or 1)
IN_FLIGHT = WORKERS + 4

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Block:
    """Rows of a job's matrix, as stored; last: whether no more come."""

    job: Job
    rows: slice
    stored: Parts
    last: bool


class Conversion:
    """Writes the shards of a plan that the journal has not: the caller reads, others convert, hash and write."""

    def __init__(self, plan: Plan, folder: Path, journal: Journal) -> None:
        self.plan = plan
        self.folder = folder
        self.journal = journal
        self._shard_of = {job.matrix.name: shard for shard, jobs in plan.shards.items() for job in jobs}
        self._last_of = {shard: jobs[-1] for shard, jobs in plan.shards.items()}
        self._writer: ShardWriter | None = None
        self._failed = False

    def run(self, on_progress: Progress | None = None) -> None:
        """on_progress(done, total) counts bytes of the source.

        Raises CheckpointError for NaN, infinity and values beyond the dtype, naming file and tensor, or OSError; the
        shards finished until then stay.
        """
        total = sum(stat.st_size for stat in self.plan.source.stats.values())
        done = 0
        pending: deque[tuple[int, Future[None]]] = deque()
        pool, hashing, writing = (ThreadPoolExecutor(threads) for threads in (WORKERS, 1, 1))
        try:
            for nbytes, task in self._tasks(pool, hashing, writing):
                pending.append((nbytes, task))
                while len(pending) > IN_FLIGHT or (pending and pending[0][1].done()):
                    nbytes, task = pending.popleft()
                    task.result()
                    done += nbytes
                    if on_progress:
                        on_progress(done, total)
            for nbytes, task in pending:
                task.result()
                done += nbytes
            if on_progress:
                on_progress(done, total)
        except BaseException:
            self._failed = True
            raise
        finally:
            for executor in (pool, hashing, writing):
                executor.shutdown(cancel_futures=True)
            if self._writer:
                self._writer.abandon()

    def _tasks(
        self, pool: ThreadPoolExecutor, hashing: ThreadPoolExecutor, writing: ThreadPoolExecutor
    ) -> Iterator[tuple[int, Future[None]]]:
        """Read on, giving every block away; yields (bytes read, what will be done when they are dealt with)."""
        for file in self.plan.source.shards:
            wanted = {
                job.matrix.name: job
                for job in self.plan.jobs
                if self.plan.source.checkpoint.files[job.matrix.name] == file
                and self._shard_of[job.matrix.name] not in self.journal.shards
            }
            size = self.plan.source.stats[file].st_size
            known = file.name in self.journal.sources
            if known and not wanted:
                yield size, _done()
                continue
            digest = hashlib.sha256()
            for content, block in _read(file, self.plan.source.checkpoint, self.plan.source.spans, wanted):
                hashed = _done() if known else hashing.submit(digest.update, content.data)
                made = pool.submit(convert_block, block, self.plan.adapter, file) if block else None
                yield len(content), writing.submit(self._write, block, made, hashed)
            if not known:
                yield 0, writing.submit(self._end_source, file.name, size, digest)

    def _write(self, block: Block | None, made: Future[Parts] | None, hashed: Future[None]) -> None:
        hashed.result()
        if block is None or made is None:
            return
        shard = self._shard_of[block.job.matrix.name]
        try:
            parts = made.result()
            if self._failed:
                return
            self._writer = self._writer or ShardWriter(self.folder / shard, self.plan.specs(shard))
            self._writer.add(block.job.outputs, parts, block.last)
            if block.last and block.job is self._last_of[shard]:
                record = self._writer.finish()
                self._writer = None
                self.journal.add_shard(shard, record)
        except BaseException:
            # What is queued behind must not be written after a gap.
            self._failed = True
            raise

    def _end_source(self, name: str, nbytes: int, digest: hashlib._Hash) -> None:
        if not self._failed:
            self.journal.add_source(name, ShardRecord(digest.hexdigest(), nbytes))


def convert_block(block: Block, adapter: Adapter | None, file: Path) -> Parts:
    """The tensors that a block's rows become; CheckpointError for NaN, infinity and what the dtype cannot hold."""
    job, matrix = block.job, block.job.matrix
    if job.copies and matrix.form:
        if not all(finite(part, matrix.dtype) for part in block.stored[1:]):
            raise CheckpointError(f"{file}: the scales or biases of {matrix.name} hold NaN or infinity; get it again.")
        return block.stored
    stored = block.stored[0]
    if matrix.form:
        stored = dequantize(Packed(*block.stored), matrix.form.bits, matrix.form.group_size, matrix.dtype)
    if job.adapted and adapter:
        delta = adapter.delta(matrix.name.removesuffix(".weight"), block.rows)
        result = narrow(widen(stored, matrix.dtype) + delta, job.dtype)
    else:
        result = cast(stored, matrix.dtype, job.dtype)
    packed = quantize(result, job.form.bits, job.form.group_size, job.dtype) if job.form else None
    # One number that is not finite makes its group's scale so: checking scales is checking everything, 64 times faster.
    if finite(packed.scales if packed else result, job.dtype):
        return tuple(packed) if packed else (result,)
    if not finite(stored, matrix.dtype):
        raise CheckpointError(f"{file}: {matrix.name} holds NaN or infinity; download it again.")
    raise CheckpointError(
        f"{file}: {matrix.name} has values beyond {FLOAT_NAMES[job.dtype]}; use --dtype bf16 or fp32, or --keep it."
    )


def _read(
    file: Path, checkpoint: Checkpoint, spans: dict[str, tuple[int, int]], wanted: dict[str, Job]
) -> Iterator[tuple[np.ndarray, Block | None]]:
    """A file's bytes from first to last as (bytes, the block that they are, None where no job wants them)."""
    names = sorted((name for name in spans if checkpoint.files[name] == file), key=lambda name: spans[name])
    try:
        opened = file.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(file, error) from None
    with opened as stream:
        start = spans[names[0]][0] if names else os.fstat(opened.fileno()).st_size
        for content in _pieces(stream, file, start):
            yield content, None
        for name in names:
            begin, end = spans[name]
            job = wanted.get(name)
            if job is None:
                for content in _pieces(stream, file, end - begin):
                    yield content, None
                continue
            spec = checkpoint.specs[name]
            row_bytes = max(spec.nbytes // spec.shape[0], 1)
            step = max(BLOCK_BYTES // row_bytes, 1)
            try:
                groups = [checkpoint.read(stored) for stored in job.matrix.stored[1:]]
            except OSError as error:
                raise _unreadable(file, error) from None
            for first in range(0, spec.shape[0], step):
                rows = slice(first, min(first + step, spec.shape[0]))
                content = _exactly(stream, file, (rows.stop - rows.start) * row_bytes)
                shape = (rows.stop - rows.start, *spec.shape[1:])
                main = content.view(STORED_AS[spec.dtype]).reshape(shape)
                stored = (main, *(np.array(group[rows]) for group in groups))
                yield content, Block(job, rows, stored, rows.stop == spec.shape[0])


def _pieces(stream: FileIO, file: Path, nbytes: int) -> Iterator[np.ndarray]:
    while nbytes > 0:
        yield _exactly(stream, file, min(nbytes, BLOCK_BYTES))
        nbytes -= BLOCK_BYTES


def _exactly(stream: FileIO, file: Path, nbytes: int) -> np.ndarray:
    content = np.empty(nbytes, np.uint8)
    view = content.data
    while view:
        try:
            count = stream.readinto(view)
        except OSError as error:
            raise _unreadable(file, error) from None
        if not count:
            raise CheckpointError(f"{file} ended while it was read; download it again.")
        view = view[count:]
    drop_from_cache(stream.fileno(), stream.tell() - nbytes, nbytes)
    return content


def _unreadable(file: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{file} cannot be read ({error.strerror}); check the source and convert again.")


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future
