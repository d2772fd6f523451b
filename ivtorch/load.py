"""Loading a checkpoint folder into the PyTorch network: strict, by name, one tensor at a time, no second copy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from ivcore.allocator import return_freed_blocks
from ivcore.checkpoint import check_specs, stored_dtype
from ivcore.config import ModelConfig
from ivcore.errors import BackendError, CheckpointError
from ivcore.sampling import stop_ids
from ivcore.shards import FLOAT_NAMES, Checkpoint
from ivtorch.generate import Model
from ivtorch.model import Network

UNPACK_ROWS = 512
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(path: str | Path, dtype: str | None = None) -> Model:
    """The model in a checkpoint folder, on CUDA where there is one.

    dtype: "float32", "bfloat16" or "float16"; None takes what most of it is stored in. Raises ConfigError,
    CheckpointError (tensors that do not fit the config, are damaged, or hold NaN or infinity) or BackendError.
    """
    if dtype is not None and dtype not in DTYPES:
        raise BackendError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    config = ModelConfig.from_dir(path)
    checkpoint = Checkpoint(path)
    check_specs(checkpoint.specs, config, str(path))
    dtype = dtype or FLOAT_NAMES[stored_dtype(checkpoint.specs)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return_freed_blocks()
    with torch.device("meta"):
        network = Network(config)
    for file in sorted(set(checkpoint.files.values())):
        with safe_open(file, framework="pt", device=device) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping: it only has keys())
                module, _, kind = name.rpartition(".")
                packed = kind == "weight" and f"{module}.scales" in checkpoint.specs
                if kind in ("scales", "biases") or (config.tie_word_embeddings and name.startswith("lm_head.")):
                    continue
                if packed:
                    array = _dequantize(checkpoint, config, module, DTYPES[dtype]).to(device)
                else:
                    array = tensors.get_tensor(name).to(DTYPES[dtype])
                if not torch.isfinite(array).all():
                    stored = (
                        _dequantize(checkpoint, config, module, torch.float32) if packed else tensors.get_tensor(name)
                    )
                    if torch.isfinite(stored).all():
                        raise BackendError(f"{file}: {name} has values beyond {dtype}; use float32 or bfloat16.")
                    raise CheckpointError(f"{file}: {name} holds NaN or infinity; convert or download it again.")
                network.load_state_dict({name: array}, strict=False, assign=True)
    network.eval().requires_grad_(False)
    return Model(network, config, dtype, stop_ids(path))


def _dequantize(checkpoint: Checkpoint, config: ModelConfig, module: str, dtype: torch.dtype) -> torch.Tensor:
    """The dense matrix of a module in MLX's affine form: codes, a stream of bits from the lowest on, times a group's
    scale plus its bias. Rounded once, to `dtype`, as MLX's products in it have it."""
    setting = config.quantization.of_module(module) if config.quantization else None
    if setting is None:
        raise CheckpointError(f"{checkpoint.path}: {module} is packed, but config.json has no quantization for it.")
    bits, group_size = setting
    scales, biases = (_read(checkpoint, f"{module}.{name}") for name in ("scales", "biases"))
    packed = checkpoint.read(f"{module}.weight").view(np.uint8)
    places = (1 << np.arange(bits)).astype(np.uint8)
    dense = torch.empty(scales.shape[0], scales.shape[1] * group_size, dtype=dtype)
    for start in range(0, len(packed), UNPACK_ROWS):
        rows = slice(start, start + UNPACK_ROWS)
        stream = np.unpackbits(packed[rows], axis=1, bitorder="little").reshape(-1, bits)
        codes = torch.from_numpy(stream @ places).reshape(-1, scales.shape[1], group_size)
        dense[rows] = (codes * scales[rows, :, None].float() + biases[rows, :, None].float()).flatten(1).to(dtype)
    return dense


def _read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    with safe_open(checkpoint.files[name], framework="pt") as tensors:
        return tensors.get_tensor(name)
