"""InternVideo3 in MLX: Metal on Apple silicon, CPU elsewhere. The twin of `ivtorch`, file by file."""

import os

# By default MLX rounds the operands of float32 products to TF32 where the GPU has matrix units for it (M5, CUDA);
# PyTorch does not. Read by MLX at its first product, so it can be overruled from outside.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

from ivmlx.load import load

__all__ = ["load"]
