"""Which runs to compare, every folder on every backend in every dtype, and whether they can be compared."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert.parity.report import ParityError
from convert.parity.run import Run
from ivcore.backend import choose
from ivcore.checkpoint import check_specs, stored_dtype
from ivcore.config import ModelConfig
from ivcore.errors import BackendError, CheckpointError
from ivcore.hub import resolve
from ivcore.shards import FLOAT_NAMES, Checkpoint

SEAMS = (
    "text_config.hidden_size",
    "text_config.num_hidden_layers",
    "text_config.vocab_size",
    "vision_config.hidden_size",
    "vision_config.depth",
    "vision_config.deepstack_visual_indexes",
    "vision_config.patch_size",
    "vision_config.temporal_patch_size",
    "vision_config.spatial_merge_size",
    "image_token_id",
    "video_token_id",
)
"""Fields in which compared models must be equal, so that their activations and prompts have the same shapes."""


def plan_runs(
    a: str | Path, b: str | Path | None, backends: Sequence[str] | None, dtypes: Sequence[str] | None
) -> list[Run]:
    """The runs in order; by default one folder runs on both backends, two folders on one, in the dtype they are stored.

    Raises ParityError when that is one run only, BackendError for a backend or dtype that is not there, CheckpointError
    or ConfigError for a folder that cannot be loaded or is not of the same body as the first.
    """
    for dtype in dtypes or ():
        if dtype not in FLOAT_NAMES.values():
            raise BackendError(f"dtype {dtype!r} is not one of {', '.join(FLOAT_NAMES.values())}.")
    if backends is None:
        installed = [name for name in ("mlx", "torch") if importlib.util.find_spec(name)]
        backends = installed if b is None and len(dtypes or ()) < 2 and installed else ["auto"]
    names = dict.fromkeys(choose(name) for name in backends)
    runs = []
    for model in (a,) if b is None else (a, b):
        folder = resolve(model)
        config, checkpoint = ModelConfig.from_dir(folder), Checkpoint(folder)
        check_specs(checkpoint.specs, config, str(model))
        stored = FLOAT_NAMES[stored_dtype(checkpoint.specs)]
        for backend in names:
            for dtype in dict.fromkeys(dtypes or (stored,)):
                runs.append(Run(str(model), folder, backend, dtype, config, checkpoint.specs))
    if len(runs) < 2:
        raise ParityError(
            f"There is nothing to compare {a} with: name a second folder, a second backend (here is {runs[0].backend}; "
            "--backends mlx,torch needs both installed) or a second dtype (--dtype float32,bfloat16)."
        )
    for run in runs:
        _check_seams(runs[0], run)
    return runs


def _check_seams(reference: Run, run: Run) -> None:
    differences = []
    for field in SEAMS:
        ours, theirs = _field(reference.config, field), _field(run.config, field)
        if ours != theirs:
            differences.append(f"{field} is {_shown(ours)} and {_shown(theirs)}")
    if differences:
        raise CheckpointError(
            f"{reference.model} and {run.model} are not of one body, so they cannot be compared layer by layer: "
            f"{'; '.join(differences)}."
        )


def _field(config: ModelConfig, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _shown(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value)
