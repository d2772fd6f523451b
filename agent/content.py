"""A video's name in the library: the hash of what is in its file, which stays when the file is moved or renamed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ivcore.errors import MediaError


def content_hash(path: str | Path) -> str:
    """The SHA-256 of all bytes of a file, 64 hexadecimal digits; nothing else (no name, no times) goes into it.

    The file is read once, in blocks of 256 KiB. MediaError where it cannot be read, or is being written meanwhile.
    """
    try:
        with open(path, "rb") as stream:
            before = os.fstat(stream.fileno())
            digest = hashlib.file_digest(stream, "sha256")
            after = os.fstat(stream.fileno())
    except (OSError, ValueError) as error:
        raise MediaError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}).") from None
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise MediaError(f"{path} is being written by something else; try again when it is whole.")
    return digest.hexdigest()
