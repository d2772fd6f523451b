"""Shell patterns on the dotted parts of a module's name, by which a user picks modules."""

from __future__ import annotations

from fnmatch import fnmatchcase


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a module by any run of its dotted parts: `lm_head`, `layers.0`, `*_proj`."""
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")
