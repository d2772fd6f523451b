"""Loading a checkpoint folder into the MLX network: strict, by name, one tensor at a time, no second copy."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from ivcore.allocator import return_freed_blocks
from ivcore.checkpoint import check_specs, stored_dtype
from ivcore.config import ModelConfig
from ivcore.errors import BackendError, CheckpointError
from ivcore.sampling import stop_ids
from ivcore.shards import FLOAT_NAMES, Checkpoint
from ivmlx.generate import Model
from ivmlx.model import Network

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def load(path: str | Path, dtype: str | None = None) -> Model:
    """The model in a checkpoint folder.

    dtype: "float32", "bfloat16" or "float16"; None takes what most of it is stored in. Raises ConfigError,
    CheckpointError (tensors that do not fit the config, are damaged, or hold NaN or infinity) or BackendError.
    """
    if dtype is not None and dtype not in DTYPES:
        raise BackendError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    config = ModelConfig.from_dir(path)
    checkpoint = Checkpoint(path)
    check_specs(checkpoint.specs, config, str(path))
    dtype = dtype or FLOAT_NAMES[stored_dtype(checkpoint.specs)]
    if mx.default_device() == mx.cpu:
        return_freed_blocks()
    network = Network(config)
    _quantize(network, config, checkpoint)
    for file in sorted(set(checkpoint.files.values())):
        tensors = cast(dict[str, mx.array], mx.load(str(file)))
        for name in list(tensors):
            array = tensors.pop(name)
            if config.tie_word_embeddings and name.startswith("lm_head."):
                continue
            if mx.issubdtype(array.dtype, mx.floating):
                stored, array = array, array.astype(DTYPES[dtype])
                if not mx.isfinite(array).all().item():
                    if mx.isfinite(stored).all().item():
                        raise BackendError(f"{file}: {name} has values beyond {dtype}; use float32 or bfloat16.")
                    raise CheckpointError(f"{file}: {name} holds NaN or infinity; convert or download it again.")
            network.load_weights([(name, array)], strict=False)
    network.eval()
    return Model(network, config, dtype, stop_ids(path))


def _quantize(network: Network, config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Swap in packed layers where the checkpoint holds scales."""
    block = config.quantization
    if block is None:
        return

    def setting(name: str, module: nn.Module) -> bool | dict[str, int]:
        of_module = block.of_module(name) if f"{name}.scales" in checkpoint.specs else None
        return {"bits": of_module[0], "group_size": of_module[1]} if of_module else False

    nn.quantize(network, class_predicate=setting)
