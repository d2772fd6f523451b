"""Where a conversion reads from: a folder whose config, tensors and other files have all been checked.

Notable:
- A shard or a tokenizer that is a link out of the folder is refused, lest a stranger's folder carry a private file into
  the copy; only the Hugging Face cache's own links, from a snapshot to its blobs, are followed.
- A packed module of an MLX folder counts as one matrix with the form it is stored in.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from convert.policy import Form
from ivcore.checkpoint import check_specs
from ivcore.config import ModelConfig
from ivcore.errors import CheckpointError
from ivcore.files import read_json, side_files
from ivcore.hub import resolve
from ivcore.shards import FLOATS, Checkpoint, TensorSpec, read_spans

READABLE = (*FLOATS, "F64")


@dataclass(frozen=True)
class Matrix:
    """A tensor as the model means it: its dense shape, the float dtype it is stored in, its form where it is packed."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    form: Form | None
    stored: tuple[str, ...]
    """The names of the tensors that hold it: itself, or weight, scales and biases."""


@dataclass(frozen=True)
class Source:
    """A checked checkpoint. label, revision: how to name it to others; never a path of this machine."""

    label: str
    revision: str | None
    path: Path
    config: ModelConfig
    checkpoint: Checkpoint
    spans: dict[str, tuple[int, int]]
    stats: dict[Path, os.stat_result]
    side_files: tuple[Path, ...]

    @property
    def shards(self) -> list[Path]:
        return sorted(set(self.checkpoint.files.values()))

    def matrices(self) -> list[Matrix]:
        """Every tensor of the model in the order of the files, so that one pass over them reads all."""
        specs, quantization = self.checkpoint.specs, self.config.quantization
        found = []
        for name in sorted(specs, key=lambda name: (self.checkpoint.files[name], self.spans[name])):
            module, _, kind = name.rpartition(".")
            scales = specs.get(f"{module}.scales")
            setting = quantization.of_module(module) if quantization and scales else None
            if scales is None or setting is None:
                found.append(Matrix(name, specs[name].shape, specs[name].dtype, None, (name,)))
            elif kind == "weight":
                form = Form(*setting)
                biases = specs[f"{module}.biases"]
                if biases.dtype != scales.dtype or scales.dtype not in FLOATS:
                    raise CheckpointError(
                        f"{self.path}: {module}.scales is {scales.dtype} and {module}.biases {biases.dtype}, which "
                        "cannot be read; both must be F32, or F16, or BF16."
                    )
                shape = (scales.shape[0], scales.shape[1] * form.group_size)
                stored = (name, f"{module}.scales", f"{module}.biases")
                found.append(Matrix(name, shape, scales.dtype, form, stored))
            elif kind not in ("scales", "biases"):
                found.append(Matrix(name, specs[name].shape, specs[name].dtype, None, (name,)))
        return found


def open_source(model: str | Path) -> Source:
    """The checkpoint in a folder or of a Hugging Face id, which is downloaded.

    Raises CheckpointError or ConfigError: damaged headers, tensors that do not fit the config, dtypes that cannot be
    read, links out of the folder.
    """
    path = resolve(model)
    is_id = not Path(model).expanduser().is_dir()
    raw = read_json(path / "config.json")
    checkpoint = Checkpoint(path)
    beside = side_files(path)
    if dangling := [file for file in beside if not file.exists()]:
        raise CheckpointError(f"{dangling[0]} is a link to a file that is not there; fetch the folder again.")
    beside = [file for file in beside if file.is_file()]
    for file in (path / "config.json", *set(checkpoint.files.values()), *beside):
        _refuse_link(file, path)
    _refuse_dtypes(checkpoint.specs, path)
    config = ModelConfig.from_dict(raw, shapes=checkpoint.shapes(), source=str(path / "config.json"))
    check_specs(checkpoint.specs, config, str(path), floats=READABLE)
    spans, stats = {}, {}
    for file in set(checkpoint.files.values()):
        spans.update(read_spans(file))
        stats[file] = file.stat()
    label = str(model).partition("@")[0] if is_id else path.resolve().name
    revision = path.name if is_id else None
    return Source(label, revision, path, config, checkpoint, spans, stats, tuple(beside))


def _refuse_link(file: Path, folder: Path) -> None:
    target, home = file.resolve(), folder.resolve()
    if target.is_relative_to(home):
        return
    cache = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    if not cache:
        raise CheckpointError(
            f"{file} is a link to {target}, out of its folder; put the file itself there if it belongs to the model."
        )


def _refuse_dtypes(specs: Mapping[str, TensorSpec], path: Path) -> None:
    unread = {name: spec.dtype for name, spec in specs.items() if spec.dtype not in (*READABLE, "U32")}
    if unread:
        name, dtype = min(unread.items())
        kinds = ", ".join(sorted(set(unread.values())))
        count = f"{len(unread)} tensors" if len(unread) > 1 else "a tensor"
        raise CheckpointError(
            f"{path} holds {count} of {kinds} (the first is {name}, {dtype}), which cannot be converted; "
            "use a release in float, or one quantised by MLX."
        )
