"""Options that several commands of `iv3` have."""

from __future__ import annotations

from typing import Annotated

import typer

_debug = False


def _set_debug(value: bool) -> bool:
    global _debug
    _debug = _debug or value
    return value


def debugging() -> bool:
    """Whether --debug was given, before the command or behind it."""
    return _debug


def reset_debugging() -> None:
    """Forget an earlier call's --debug."""
    global _debug
    _debug = False


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_set_debug)]
Model = Annotated[
    str, typer.Option("--model", "-m", envvar="IV3_MODEL", help="A folder, or a Hugging Face id (owner/name@revision).")
]
