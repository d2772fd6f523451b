"""Weights: convert and quantise a checkpoint, verify a folder, compare two runs of a model layer by layer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.parity.compare import compare
    from convert.plan import Options
    from convert.run import convert
    from convert.verification import verify

__all__ = ["Options", "compare", "convert", "verify"]

_HOMES = {
    "Options": "convert.plan",
    "compare": "convert.parity.compare",
    "convert": "convert.run",
    "verify": "convert.verification",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
