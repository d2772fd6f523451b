"""Small files: JSON read with one-sentence errors, and written beside and renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
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


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write beside and rename, so that the file is either the old one or the new one."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, file)
