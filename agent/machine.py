"""The memory this machine has for a model, found without importing a deep-learning framework where that is slow."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

_NVIDIA = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]


@dataclass(frozen=True)
class Memory:
    """A kind of memory in bytes; available: what is free now, None where the system does not say."""

    name: str
    total: int
    available: int | None


def machine(backend: str | None) -> list[Memory]:
    """The memories of this machine; the first is where `backend` ("mlx", "torch", None for either) keeps a model."""
    if platform.system() == "Darwin":
        accelerator = _metal() if backend == "mlx" else None
    else:
        accelerator = _nvidia() if backend != "mlx" else None
    return [accelerator, _ram()] if accelerator else [_ram()]


def _ram() -> Memory:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return Memory("RAM", total, None)
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return Memory("RAM", total, int(fields["MemAvailable"].split()[0]) * 1024)


def _metal() -> Memory | None:
    """The part of unified memory that macOS lets the GPU keep resident."""
    import mlx.core as mx  # takes some 30 ms

    limit = mx.device_info().get("max_recommended_working_set_size")
    return Memory("GPU share of unified memory", int(limit), None) if limit else None


def _nvidia() -> Memory | None:
    """The first GPU that nvidia-smi lists, which is PyTorch's default on a machine of equal GPUs."""
    try:
        listed = subprocess.run(_NVIDIA, capture_output=True, text=True, timeout=5, check=True).stdout
        name, total, free = (field.strip() for field in listed.splitlines()[0].rsplit(",", 2))
        return Memory(name, int(total) * 2**20, int(free) * 2**20)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
