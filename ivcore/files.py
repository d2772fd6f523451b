"""Reading JSON files, with one-sentence errors."""

from __future__ import annotations

import json
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
