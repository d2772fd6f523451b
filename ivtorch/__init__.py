"""InternVideo3 in PyTorch: CUDA where there is one, CPU elsewhere. The twin of `ivmlx`, file by file."""

from ivtorch.load import load

__all__ = ["load"]
