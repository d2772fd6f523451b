"""InternVideo3 in MLX: Metal on Apple silicon, CPU elsewhere. The twin of `ivtorch`, file by file."""

from ivmlx.load import load

__all__ = ["load"]
