"""Text as a terminal may have it."""

from __future__ import annotations

from unicodedata import category


def printable(text: str) -> str:
    """Text without control characters: a model could write an escape sequence that its video showed it.

    Joiners and marks of direction stay; emoji, Persian and Hindi are written with them.
    """
    return "".join(character for character in text if category(character) != "Cc" or character in "\n\t")
