"""Models of steps that the repository keeps, so that what follows them can be made without what came before.

train/tiny/kept/NAME/ is a copy of the step's model, kept/steps.jsonl has the lines of `make tiny`'s log about them.
They are not in the wheel.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

KEPT = Path(__file__).with_name("kept")


def restore(name: str, folder: Path) -> bool:
    """Copy a kept model to `folder`, unless that is there; whether one was copied."""
    if folder.exists() or not (KEPT / name).is_dir():
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(KEPT / name, part)
    part.rename(folder)
    return True


def lines() -> dict[str, str]:
    """The log's lines about kept models, by the step's name."""
    if not (log := KEPT / "steps.jsonl").exists():
        return {}
    return {json.loads(line)["step"]: line for line in log.read_text(encoding="utf-8").splitlines()}
