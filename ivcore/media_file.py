"""The checks that every video and image passes before a decoder sees it."""

from __future__ import annotations

import stat
from pathlib import Path

from ivcore.errors import MediaError


def readable_file(path: str | Path) -> Path:
    """`path` as a Path to a regular file that is not empty; MediaError otherwise.

    Only regular files: a pipe or a device could keep a decoder waiting for ever.
    """
    path = Path(path)
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            path.open("rb").close()
    except FileNotFoundError:
        raise MediaError(f"There is no file {path}; check the path.") from None
    except PermissionError:
        raise MediaError(f"{path} cannot be read; change its permissions.") from None
    except (OSError, ValueError) as error:
        raise MediaError(f"{path} cannot be opened: {error}; check the path.") from None
    if stat.S_ISDIR(status.st_mode):
        raise MediaError(f"{path} is a folder; give a video or an image file inside it.")
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(f"{path} is not a regular file; save it to disk first.")
    if status.st_size == 0:
        raise MediaError(f"{path} is empty (0 bytes); copy or download it again.")
    return path
