"""conversion.json, the record that a converted folder carries, and the journal from which a stopped conversion goes on.

Neither holds a time or a path, so that converting twice gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from convert.plan import Plan
from convert.source import Source
from ivcore.errors import CheckpointError
from ivcore.files import read_json, write_beside

RECORD = "conversion.json"
FORMAT = 1
BLOCK = 2**20


@dataclass(frozen=True)
class ShardRecord:
    """sha256 of a whole file, and of the bytes of every tensor in it."""

    sha256: str
    nbytes: int
    tensors: dict[str, str] = field(default_factory=dict)


@dataclass
class Record:
    """What conversion.json says: what was asked of what (`request`), and hashes of all that was read and written.

    report: what was found in doing it, where there was something to find.
    """

    request: dict[str, Any]
    sources: dict[str, ShardRecord]
    shards: dict[str, ShardRecord]
    files: dict[str, str]
    report: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        content: dict[str, Any] = {"format": FORMAT, **self.request}
        if self.report:
            content["report"] = self.report
        content["sources"] = {name: _without_tensors(shard) for name, shard in sorted(self.sources.items())}
        content["shards"] = {name: asdict(shard) for name, shard in sorted(self.shards.items())}
        content["files"] = dict(sorted(self.files.items()))
        return content | {"sha256_of_this": _digest(content)}

    @classmethod
    def read(cls, folder: Path) -> Record:
        """The record of a folder; CheckpointError where it is damaged or of a newer version."""
        file = folder / RECORD
        content = read_json(file)
        if content.get("format") != FORMAT:
            raise CheckpointError(
                f"{file} has format {content.get('format')!r}, but this version knows {FORMAT}; "
                "use a newer version of ivmlx, or convert again."
            )
        if content.pop("sha256_of_this", None) != _digest(content):
            raise CheckpointError(f"{file} itself has been altered; convert again, or fetch the folder again.")
        del content["format"]
        sources = {name: ShardRecord(**shard) for name, shard in content.pop("sources").items()}
        shards = {name: ShardRecord(**shard) for name, shard in content.pop("shards").items()}
        return cls(content, sources, shards, content.pop("files"), content.pop("report", {}))


class Journal:
    """What a conversion has finished, a line each, in the folder that it writes to."""

    NAME = "journal.jsonl"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / self.NAME
        self.shards: dict[str, ShardRecord] = {}
        self.sources: dict[str, ShardRecord] = {}

    @classmethod
    def is_one(cls, file: Path) -> bool:
        """Whether a file is a journal: its first line is a request, or it was stopped before that was written."""
        if not file.is_file():
            return False
        with file.open("rb") as stream:
            line = stream.readline()
        return line.startswith(_BEGINNING[: len(line)])

    def exists(self) -> bool:
        """Whether something was begun that can be gone on with."""
        return self.file.is_file() and bool(_entries(self.file)[0])

    def begin(self, request: Mapping[str, Any], stamps: Mapping[str, int]) -> None:
        """Go on with what is noted, or begin anew. CheckpointError where it is of other work.

        stamps: when each source shard was last written, in ns; not part of the request, which a copy must not change.
        """
        entries, nbytes = _entries(self.file) if self.file.exists() else ([], 0)
        if not entries:
            self.file.unlink(missing_ok=True)
            self._append({"request": dict(request), "stamps": dict(stamps)})
            return
        check_same(entries[0]["request"], request, self.folder)
        if entries[0]["stamps"] != dict(stamps):
            raise CheckpointError(
                f"The source has been written to since {self.folder} was begun; use --force to start anew."
            )
        for entry in entries[1:]:
            known = self.shards if entry["what"] == "shard" else self.sources
            known[entry["name"]] = ShardRecord(entry["sha256"], entry["nbytes"], entry["tensors"])
        os.truncate(self.file, nbytes)

    def add_shard(self, name: str, shard: ShardRecord) -> None:
        self._append({"what": "shard", "name": name, **asdict(shard)})
        self.shards[name] = shard

    def add_source(self, name: str, shard: ShardRecord) -> None:
        self._append({"what": "source", "name": name, **asdict(shard)})
        self.sources[name] = shard

    def forget_damaged(self) -> None:
        """Drop the shards that are not there any more as they were written."""
        for name, shard in list(self.shards.items()):
            file = self.folder / name
            if not file.exists() or file.stat().st_size != shard.nbytes or sha256_of(file) != shard.sha256:
                del self.shards[name]

    def remove(self) -> None:
        """End it: everything that it promised is in the record."""
        self.file.unlink()

    def _append(self, entry: Mapping[str, Any]) -> None:
        # Unbuffered: on a full disk nothing may be left over that closing the file tries to write again.
        with self.file.open("ab", buffering=0) as stream:
            line = memoryview(json.dumps(entry).encode() + b"\n")
            while line:
                line = line[stream.write(line) :]
            os.fsync(stream.fileno())


def _entries(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The entries of a journal up to one that a kill cut off, and the bytes that they take.

    CheckpointError for a line that is whole and not a journal's.
    """
    entries: list[dict[str, Any]] = []
    nbytes = 0
    with file.open("rb") as stream:
        for line in stream:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            fields = _NOTE if entries else _REQUEST
            if not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in fields.items()):
                raise CheckpointError(
                    f"{file} has a line that no conversion has written; start anew with --force, or move "
                    f"{file.parent} elsewhere."
                )
            entries.append(entry)
            nbytes += len(line)
    return entries, nbytes


_BEGINNING = b'{"request": {'
_REQUEST = {"request": dict, "stamps": dict}
_NOTE = {"what": str, "name": str, "sha256": str, "nbytes": int, "tensors": dict}


def request_of(plan: Plan) -> dict[str, Any]:
    """What is asked: source, revision, options and versions, and the identity of what is read, its ends hashed."""
    options = asdict(plan.options)
    del options["adapter"]
    adapter = {file.name: sha256_of(file) for file in plan.adapter.files} if plan.adapter else None
    return {
        "source": plan.source.label,
        "revision": plan.source.revision,
        "options": options | {"keep": list(plan.options.keep)},
        "adapter": adapter,
        "versions": versions(),
        "inputs": ends_of(plan.source),
        "config_sha256": hashlib.sha256(json.dumps(plan.config, sort_keys=True).encode()).hexdigest(),
    }


def ends_of(source: Source) -> dict[str, dict[str, Any]]:
    """What tells one source from another without reading it whole: of every shard the size, and the SHA-256 of its
    header and of its last MiB, in which weights that were trained on differ."""
    ends = {}
    for file in source.shards:
        nbytes = source.stats[file].st_size
        with file.open("rb") as stream:
            size = stream.read(8)
            header = size + stream.read(int.from_bytes(size, "little"))
            stream.seek(max(len(header), nbytes - BLOCK))
            ends[file.name] = {"nbytes": nbytes, "ends_sha256": hashlib.sha256(header + stream.read()).hexdigest()}
    return ends


def versions() -> dict[str, str]:
    """Of what the numbers of a conversion depend on."""
    return {"ivmlx": _version(), "numpy": np.__version__}


def check_same(old: Any, new: Mapping[str, Any], folder: Path) -> None:
    """CheckpointError naming what differs, when a folder was begun for another request than the one at hand."""
    if old == new:
        return
    old = old if isinstance(old, dict) else {}
    then, now = ({**side, **side.get("options", {})} for side in (old, dict(new)))
    differing = next(
        (key for key in ("source", "revision", *new["options"], *new) if then.get(key) != now.get(key)), "request"
    )
    detail = (
        f"{differing} was {then.get(differing)!r} and is now {now.get(differing)!r}"
        if differing in ("source", "revision", *new["options"], "versions")
        else f"its {differing.removesuffix('_sha256')} has changed since"
    )
    raise CheckpointError(
        f"{folder} was begun for another conversion ({detail}); repeat that one, or use --force to start anew."
    )


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_hashed(file: Path, content: bytes) -> str:
    """Write a file beside and rename it; returns its SHA-256."""
    write_beside(file, content)
    return hashlib.sha256(content).hexdigest()


def to_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _without_tensors(shard: ShardRecord) -> dict[str, Any]:
    return {"sha256": shard.sha256, "nbytes": shard.nbytes}


def _version() -> str:
    try:
        return version("ivmlx")
    except PackageNotFoundError:  # a clone on the path that is not installed
        return "unknown"
