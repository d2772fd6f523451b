"""Safetensors folders in Hugging Face layout: headers, memory-mapped reading, atomic writing with an index.

The headers are validated by the `safetensors` library; what it finds wrong becomes one sentence that names the file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ivcore.errors import CheckpointError
from ivcore.files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1}
DTYPE_BYTES |= {f"{sign}{8 * size}": size for sign in "IU" for size in (1, 2, 4, 8)}
FLOAT_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""A safetensors dtype as `load`, the frameworks and reports name it."""

FLOATS = tuple(FLOAT_NAMES)
STORED_AS = {"BF16": "uint16", "F16": "float16", "F32": "float32", "F64": "float64", "U32": "uint32"}
"""The NumPy dtype that holds a tensor's bytes; bfloat16, which NumPy has not, is its bits."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's shape and its safetensors dtype (`F32`, `BF16`, `F16`, `U32`, ...)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


class Checkpoint:
    """The tensors of a folder, found through its index or its single file, headers validated."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            what = "is not a folder" if self.path.exists() else "does not exist"
            raise CheckpointError(f"{self.path} {what}; name the folder of a checkpoint.")
        self.files: dict[str, Path] = {}
        self.specs: dict[str, TensorSpec] = {}
        for file in self._shards():
            for name, spec in read_header(file).items():
                if name in self.specs:
                    raise CheckpointError(
                        f"{file} and {self.files[name]} both hold {name}; remove the shard that is not of this model."
                    )
                self.specs[name], self.files[name] = spec, file

    @staticmethod
    def present(path: str | Path) -> bool:
        """Whether a folder has weights at all."""
        return (Path(path) / INDEX).exists() or (Path(path) / SINGLE).exists()

    def _shards(self) -> list[Path]:
        index = self.path / INDEX
        if not index.exists():
            if not (self.path / SINGLE).exists():
                raise CheckpointError(f"There are no weights ({SINGLE} or {INDEX}) in {self.path}.")
            return [self.path / SINGLE]
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index} has no valid weight_map; download it again.")
        names = sorted(set(weight_map.values()))
        if outside := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
            raise CheckpointError(
                f"{index} names {outside[0]!r}, which is not a safetensors file of this folder; do not use it."
            )
        if missing := [name for name in names if not (self.path / name).exists()]:
            raise CheckpointError(
                f"{index} names {len(missing)} shard(s) that are missing from {self.path}: {', '.join(missing)}; "
                "download them."
            )
        return [self.path / name for name in names]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in self.specs.items()}

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs.values())

    def read(self, name: str) -> np.ndarray:
        """A read-only view of a tensor's bytes in the memory-mapped file; bfloat16 comes as its uint16 bits."""
        spec, file = self.specs[name], self.files[name]
        return np.memmap(
            file, dtype=STORED_AS[spec.dtype], mode="r", offset=read_spans(file)[name][0], shape=spec.shape
        )


def read_header(file: Path) -> dict[str, TensorSpec]:
    """Name -> spec of a safetensors file; CheckpointError where the file cannot be read or its header lies."""
    try:
        with safe_open(file, framework="np") as tensors:
            specs = {}
            for name in tensors.keys():  # noqa: SIM118 (no mapping: it only has keys())
                view = tensors.get_slice(name)
                specs[name] = TensorSpec(tuple(view.get_shape()), str(view.get_dtype()))
                if specs[name].dtype not in DTYPE_BYTES:
                    raise CheckpointError(f"{file}: {name} is {specs[name].dtype}, which is not supported.")
            return specs
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise CheckpointError(f"{file} is damaged or not a safetensors file ({reason}); download it again.") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{file} cannot be read ({reason}); check the path and its permissions.") from None


def read_spans(file: Path) -> dict[str, tuple[int, int]]:
    """Name -> (first byte, byte after the last) of every tensor in a file whose header `read_header` has accepted."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    start = 8 + size
    return {
        name: (start + entry["data_offsets"][0], start + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def header_bytes(specs: Mapping[str, TensorSpec]) -> bytes:
    """The head of a safetensors file that holds these tensors in this order, without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [offset, offset + spec.nbytes]}
        offset += spec.nbytes
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def shard_names(count: int) -> list[str]:
    """The file names of a checkpoint in `count` shards."""
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def split(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Names in order, cut into shards of at most `shard_bytes`; one that is larger alone is a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, nbytes in sizes.items():
        if shards[-1] and filled + nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    return shards


def index_of(shards: Mapping[str, Mapping[str, TensorSpec]]) -> dict[str, Any]:
    """The index's content for file name -> its tensors."""
    total = sum(spec.nbytes for tensors in shards.values() for spec in tensors.values())
    return {
        "metadata": {"total_size": total},
        "weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors},
    }


def write_checkpoint(
    path: str | Path,
    config: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    shard_bytes: int = 5 * 2**30,
) -> None:
    """Write config.json and the tensors, which come one by one in the order of `specs`, in shards with an index.

    Every file is written beside and renamed when all are whole, the weights last. It takes the place of a checkpoint
    that was there before, of which shards with other names stay behind unread. Raises CheckpointError when the disk has
    no room, ValueError for other tensors than announced; nothing is changed by a failure before the renaming.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    names_by_shard = split({name: spec.nbytes for name, spec in specs.items()}, shard_bytes)
    shards = {
        file: {name: specs[name] for name in names}
        for file, names in zip(shard_names(len(names_by_shard)), names_by_shard, strict=True)
    }
    need, free = sum(spec.nbytes for spec in specs.values()), shutil.disk_usage(folder).free
    if need > free:
        raise CheckpointError(f"{folder} has {free / 1e9:.1f} GB of room, but {need / 1e9:.1f} GB are to be written.")
    texts: dict[str, Mapping[str, Any]] = {"config.json": config}
    if len(shards) > 1:
        texts[INDEX] = index_of(shards)
    parts = {name: folder / f"{name}.part" for name in (*texts, *shards)}
    source = iter(tensors)
    try:
        for name, shard in shards.items():
            _write_shard(parts[name], shard, source)
        if (extra := next(source, None)) is not None:
            raise ValueError(f"tensor {extra[0]} came, but no more were announced")
        for name, content in texts.items():
            parts[name].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        for old in {INDEX, SINGLE} - parts.keys():
            (folder / old).unlink(missing_ok=True)
        for name, part in parts.items():
            os.replace(part, folder / name)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error.strerror}); nothing was kept.") from None
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _write_shard(part: Path, shard: Mapping[str, TensorSpec], source: Iterator[tuple[str, np.ndarray]]) -> None:
    with part.open("wb") as stream:
        stream.write(header_bytes(shard))
        for expected in shard:
            name, array = next(source, ("nothing", np.zeros(0)))
            if name != expected or array.nbytes != shard[name].nbytes:
                raise ValueError(f"tensor {name} came where {expected} {shard[expected]} was announced")
            stream.write(np.ascontiguousarray(array).data)
        stream.flush()
        os.fsync(stream.fileno())
