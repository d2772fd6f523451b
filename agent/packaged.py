"""The model that comes with the package, for who names none."""

from __future__ import annotations

import sys

IV3_TINY, IV3_TINY_DTYPE = "iv3-tiny", "float32"
"""It is stored in half precision, in which a CPU is slow; a model so small loses nothing by float32."""


def or_packaged(model: str | None, dtype: str | None) -> tuple[str, str | None]:
    """The model that was named and its dtype; without one iv3-tiny, with a word on stderr about what it is."""
    if model is None:
        print(
            f"iv3: {IV3_TINY} answers, which knows nothing but figures that move (docs/results.md); "
            "name another model with --model or IV3_MODEL.",
            file=sys.stderr,
        )
        model = IV3_TINY
    return model, dtype or (IV3_TINY_DTYPE if model == IV3_TINY else None)
