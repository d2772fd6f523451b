"""conversion.json, the record that a converted folder carries, and the journal from which a stopped conversion goes on.

Neither holds a time or a path, so that converting twice gives the same bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import numpy as np

from convert.plan import Plan
from ivcore.errors import CheckpointError
from ivcore.files import read_json

RECORD = "conversion.json"
FORMAT = 1
BLOCK = 16 * 2**20


@dataclass(frozen=True)
class ShardRecord:
    """sha256 of a whole file, and of the bytes of every tensor in it."""

    sha256: str
    nbytes: int
    tensors: dict[str, str] = field(default_factory=dict)


@dataclass
class Record:
    """What conversion.json says: what was asked of what (`request`), and hashes of all that was read and written."""

    request: dict[str, Any]
    sources: dict[str, ShardRecord]
    shards: dict[str, ShardRecord]
    files: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        content: dict[str, Any] = {"format": FORMAT, **self.request}
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
        return cls(content, sources, shards, content.pop("files"))


class Journal:
    """What a conversion has finished, a line each, in the folder it writes to; one process at a time holds it."""

    NAME = "journal.jsonl"

    def __init__(self, folder: Path, request: Mapping[str, Any], stamps: Mapping[str, int], *, fresh: bool) -> None:
        """Open the folder's journal, or begin one. CheckpointError when another process has it, or it is of other work.

        stamps: when each source shard was last written, in ns; not part of the request, which a copy must not change.
        fresh: forget all that is in the folder.
        """
        self.file = folder / self.NAME
        self.shards: dict[str, ShardRecord] = {}
        self.sources: dict[str, ShardRecord] = {}
        self._stream: IO[bytes] = self.file.open("a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._stream.close()
            raise CheckpointError(
                f"Another process is writing {folder}; wait for it, or name another folder."
            ) from None
        try:
            if fresh:
                clear(folder)
                self._stream.truncate(0)
            self._read(dict(request), dict(stamps), folder)
        except BaseException:
            self._stream.close()
            raise

    def _read(self, request: dict[str, Any], stamps: dict[str, int], folder: Path) -> None:
        self._stream.seek(0)
        kept = 0
        entries = []
        for line in self._stream:
            try:
                entries.append(json.loads(line))
            except ValueError:
                break  # cut off by a kill; what follows was never promised
            if not line.endswith(b"\n"):
                entries.pop()
                break
            kept += len(line)
        self._stream.truncate(kept)
        self._stream.seek(kept)
        if not entries:
            self._append({"request": request, "stamps": stamps})
            return
        check_same(entries[0].get("request"), request, folder)
        if entries[0].get("stamps") != stamps:
            raise CheckpointError(
                f"The source has been written to since {folder} was begun; use --force to start anew."
            )
        for entry in entries[1:]:
            known = self.shards if entry["what"] == "shard" else self.sources
            known[entry["name"]] = ShardRecord(entry["sha256"], entry["nbytes"], entry["tensors"])

    def add_shard(self, name: str, shard: ShardRecord) -> None:
        self.shards[name] = shard
        self._append({"what": "shard", "name": name, **asdict(shard)})

    def add_source(self, name: str, shard: ShardRecord) -> None:
        self.sources[name] = shard
        self._append({"what": "source", "name": name, **asdict(shard)})

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(entry).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def remove(self) -> None:
        """End it: everything that it promised is in the record, or is forgotten."""
        self.file.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()


def clear(folder: Path) -> None:
    """Remove the files of an unfinished conversion but the journal, which tells what the folder is."""
    for file in folder.iterdir():
        if file.name != Journal.NAME:
            file.unlink()


def request_of(plan: Plan) -> dict[str, Any]:
    """What is asked: source, revision, options and versions, and the identity of what is read, headers hashed."""
    options = asdict(plan.options)
    del options["adapter"]
    inputs = {}
    for file in plan.source.shards:
        with file.open("rb") as stream:
            size = stream.read(8)
            header = size + stream.read(int.from_bytes(size, "little"))
        inputs[file.name] = {"nbytes": file.stat().st_size, "header_sha256": hashlib.sha256(header).hexdigest()}
    adapter = {file.name: sha256_of(file) for file in plan.adapter.files} if plan.adapter else None
    return {
        "source": plan.source.label,
        "revision": plan.source.revision,
        "options": options | {"keep": list(plan.options.keep)},
        "adapter": adapter,
        "versions": {"ivmlx": _version(), "numpy": np.__version__},
        "inputs": inputs,
        "config_sha256": hashlib.sha256(json.dumps(plan.config, sort_keys=True).encode()).hexdigest(),
    }


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


def write_beside(file: Path, content: bytes) -> str:
    """Write a file beside and rename it; returns its SHA-256."""
    part = file.with_name(f"{file.name}.part")
    with part.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, file)
    return hashlib.sha256(content).hexdigest()


def to_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _without_tensors(shard: ShardRecord) -> dict[str, Any]:
    return {"sha256": shard.sha256, "nbytes": shard.nbytes}


def _version() -> str:
    try:
        return version("ivmlx")
    except PackageNotFoundError:  # a clone on the path that is not installed
        return "unknown"
