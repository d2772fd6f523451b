"""What both backends share: config, checkpoints, video, prompts, and `load`.

from ivcore import ModelConfig, ModelInputs, build_inputs, load
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ivcore.backend import load
    from ivcore.config import ModelConfig
    from ivcore.inputs import ModelInputs
    from ivcore.prompt import build_inputs

__all__ = ["ModelConfig", "ModelInputs", "build_inputs", "load"]

_HOMES = {"ModelConfig": "config", "ModelInputs": "inputs", "build_inputs": "prompt", "load": "backend"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the command line starts at once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ivcore' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ivcore.{_HOMES[name]}"), name)
