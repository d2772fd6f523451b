"""Small files: JSON read with one-sentence errors, files written beside and renamed, what lies beside weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ivcore.errors import ConfigError


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ConfigError in one sentence when there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no {file.name} in {file.parent}; name the folder of a checkpoint.") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); check the path and its permissions.") from None
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON ({error}); download it again.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no JSON object; download it again.")
    return content


SIDE_FILES = ("*.json", "*.jinja", "*.txt", "LICENSE*", "NOTICE*")
"""What a folder holds beside weights that a copy of it needs: tokenizer, templates, processor configs, the licence."""


def side_files(folder: Path) -> list[Path]:
    """The files beside the weights in a checkpoint's folder, config, indices and conversion.json apart; links too."""
    found = {file for pattern in SIDE_FILES for file in folder.glob(pattern)}
    made = ("config.json", "conversion.json")
    return sorted(file for file in found if file.name not in made and not file.name.endswith(".index.json"))


def write_beside(file: Path, content: bytes) -> None:
    """Write a file beside, make it durable and rename it; OSError when it cannot be written."""
    part = file.with_name(f"{file.name}.part")
    with part.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, file)
