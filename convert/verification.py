"""`verify`: is a folder still what was written? Every shard against its header, the manifest, and conversion.json.

Unlike loading, which stops at the first damage, this lists all of it. A folder without conversion.json (a download, or
made by other tools) is checked as far as headers and manifest say; its contents cannot be vouched for then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from convert.record import BLOCK, RECORD, Record, ShardRecord, sha256_of
from ivcore.checkpoint import check_specs
from ivcore.config import ModelConfig
from ivcore.errors import CheckpointError, IvError
from ivcore.files import read_json
from ivcore.shards import INDEX, SINGLE, TensorSpec, read_header, read_spans

Kind = Literal["missing", "extra", "truncated", "altered", "unfit"]


@dataclass(frozen=True)
class Problem:
    """kind: what is wrong with a file, or with one tensor of it where `tensor` names one."""

    kind: Kind
    file: str
    tensor: str | None
    detail: str

    def __str__(self) -> str:
        return f"{self.kind} {self.file}{f': {self.tensor}' if self.tensor else ''} ({self.detail})"


@dataclass(frozen=True)
class Verification:
    """What was found; hashed: whether contents were compared with conversion.json."""

    path: str
    hashed: bool
    shards: int
    tensors: int
    nbytes: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def verify(path: str | Path, on_progress: Callable[[int, int], None] | None = None) -> Verification:
    """Check a folder; raises CheckpointError only where there is no folder or no checkpoint in it to check.

    on_progress(done, total) counts the bytes of the shards.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; name the folder of a checkpoint.")
    present = {file.name for file in folder.glob("*.safetensors") if file.is_file()}
    if not present and not (folder / INDEX).exists() and not (folder / RECORD).exists():
        raise CheckpointError(f"There is no checkpoint in {folder}: neither weights nor an index.")
    return _Check(folder, present, on_progress).run()


class _Check:
    def __init__(self, folder: Path, present: set[str], on_progress: Callable[[int, int], None] | None) -> None:
        self.folder = folder
        self.present = present
        self.on_progress = on_progress
        self.problems: list[Problem] = []
        self.specs: dict[str, TensorSpec] = {}
        self.holders: dict[str, str] = {}
        self.done = 0
        self.total = sum((folder / name).stat().st_size for name in present)

    def run(self) -> Verification:
        record = self._record()
        weight_map = self._weight_map()
        named = set(weight_map.values()) if weight_map is not None else {SINGLE} if SINGLE in self.present else set()
        expected = named | (set(record.shards) if record else set())
        for name in sorted(expected - self.present):
            self._found("missing", name, None, f"named by {RECORD if record and name in record.shards else INDEX}")
        for file in sorted(self.folder.glob("*.safetensors")):
            if file.name not in self.present | expected:
                self._found("extra", file.name, None, "it is a link to nothing, or no file")
        if self.present and not expected and not (self.folder / INDEX).exists():
            self._found("missing", INDEX, None, "nothing says which shards belong together")
        known = set(record.shards) if record else expected
        for name in sorted(self.present - known):
            by = f"{RECORD} does not know it" if name in expected else "no index names it; it is not read"
            self._found("extra", name, None, by)
        expected &= known
        for name in sorted(expected & self.present):
            self._shard(name, record.shards.get(name) if record else None, weight_map)
        self._index(weight_map)
        if record:
            self._files(record)
        # What the record finds wrong with a shard, the manifest would only say again.
        if not self.problems or (record is None and all(problem.tensor for problem in self.problems)):
            self._manifest()
        return Verification(
            str(self.folder), record is not None, len(expected & self.present), len(self.specs), self.total,
            tuple(self.problems),
        )  # fmt: skip

    def _found(self, kind: Kind, file: str, tensor: str | None, detail: str) -> None:
        self.problems.append(Problem(kind, file, tensor, detail))

    def _record(self) -> Record | None:
        if not (self.folder / RECORD).exists():
            return None
        try:
            return Record.read(self.folder)
        except IvError as error:
            self._found("altered", RECORD, None, str(error).rstrip("."))
            return None

    def _weight_map(self) -> dict[str, str] | None:
        """Tensor -> shard of the index; None where there is no index that can be read."""
        if not (self.folder / INDEX).exists():
            return None
        try:
            weight_map = read_json(self.folder / INDEX).get("weight_map")
        except IvError as error:
            self._found("altered", INDEX, None, str(error).rstrip("."))
            return None
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            self._found("altered", INDEX, None, "it has no valid weight_map")
            return None
        if outside := sorted({name for name in weight_map.values() if Path(name).name != name}):
            self._found("altered", INDEX, None, f"it names {outside[0]!r}, which is not a file of this folder")
        return {tensor: name for tensor, name in weight_map.items() if Path(name).name == name}

    def _shard(self, name: str, record: ShardRecord | None, weight_map: dict[str, str] | None) -> None:
        file = self.folder / name
        size = file.stat().st_size
        declared = _declared_size(file)
        # A header that is whole says itself how long the file is; only of a cut one the record has to.
        whole = declared or (record.nbytes if record else 0)
        cut = whole if size < whole else None
        specs: dict[str, TensorSpec] = {}
        try:
            specs = read_header(file)
        except CheckpointError as error:
            if cut is None:
                self._found("altered", name, None, str(error).rstrip("."))
        if cut is not None:
            self._found("truncated", name, None, f"{size:,} of {cut:,} bytes")
        for tensor, spec in specs.items():
            if tensor in self.holders:
                self._found("extra", name, tensor, f"{self.holders[tensor]} holds it too")
            elif weight_map is not None and weight_map.get(tensor, name) != name:
                self._found("altered", INDEX, tensor, f"it is in {name}, not in {weight_map[tensor]}")
            self.specs[tensor], self.holders[tensor] = spec, name
        if record and specs and cut is None:
            self._contents(file, record, specs)
        self.done += size
        self._progress(0)

    def _contents(self, file: Path, record: ShardRecord, specs: dict[str, TensorSpec]) -> None:
        """Compare a shard's hashes; on a difference, name the tensors that differ."""
        if self._hash(file) == record.sha256:
            return
        before = len(self.problems)
        for tensor in sorted(record.tensors.keys() - specs.keys()):
            self._found("missing", file.name, tensor, "the header does not hold it")
        for tensor in sorted(specs.keys() - record.tensors.keys()):
            self._found("extra", file.name, tensor, f"{RECORD} does not know it")
        spans = read_spans(file) if specs else {}
        for tensor in sorted(specs.keys() & record.tensors.keys()):
            if _hash_span(file, *spans[tensor]) != record.tensors[tensor]:
                self._found("altered", file.name, tensor, f"its bytes are not those of {RECORD}")
        if len(self.problems) == before:
            self._found("altered", file.name, None, f"its header is not that of {RECORD}")

    def _hash(self, file: Path) -> str:
        digest = hashlib.sha256()
        buffer, read = memoryview(bytearray(BLOCK)), 0
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                digest.update(buffer[:count])
                read += count
                self._progress(read)
        return digest.hexdigest()

    def _progress(self, read: int) -> None:
        if self.on_progress:
            self.on_progress(self.done + read, self.total)

    def _index(self, weight_map: dict[str, str] | None) -> None:
        for tensor, name in sorted((weight_map or {}).items()):
            if name in self.present and tensor not in self.specs and not self._damaged(name):
                self._found("missing", name, tensor, f"{INDEX} says that it is there")

    def _damaged(self, name: str) -> bool:
        return any(problem.file == name and problem.tensor is None for problem in self.problems)

    def _files(self, record: Record) -> None:
        for name, digest in record.files.items():
            file = self.folder / name
            if not file.exists():
                self._found("missing", name, None, f"named by {RECORD}")
            elif sha256_of(file) != digest and not self._damaged(name):
                self._found("altered", name, None, f"its bytes are not those of {RECORD}")

    def _manifest(self) -> None:
        """Tensors against the config."""
        try:
            shapes = {name: spec.shape for name, spec in self.specs.items()}
            file = self.folder / "config.json"
            config = ModelConfig.from_dict(read_json(file), shapes=shapes, source=str(file))
            check_specs(self.specs, config, str(self.folder))
        except IvError as error:
            self._found("unfit", "config.json", None, str(error).rstrip("."))


def _declared_size(file: Path) -> int | None:
    """The size that a header promises; None where the header itself cannot be read."""
    with file.open("rb") as stream:
        head = stream.read(8)
        size = int.from_bytes(head, "little")
        if len(head) < 8 or size > file.stat().st_size:
            return None
        try:
            header = json.loads(stream.read(size))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return 8 + size + max(ends, default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return None


def _hash_span(file: Path, begin: int, end: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        stream.seek(begin)
        while begin < end and (content := stream.read(min(BLOCK, end - begin))):
            digest.update(content)
            begin += len(content)
    return digest.hexdigest()
