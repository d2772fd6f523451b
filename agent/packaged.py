"""What is said where nobody named a model: that of the package answers, which knows little."""

from __future__ import annotations

import sys

from ivcore.hub import PACKAGED


def say_if_packaged(model: str) -> None:
    """On a terminal, one line about the packaged model where `model` names it."""
    if model == PACKAGED and sys.stderr.isatty():
        print(
            f"iv3: {PACKAGED} answers, which knows films of coloured shapes; name another with --model.",
            file=sys.stderr,
        )
