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
TINY = "iv3-tiny"
"""`ivcore.hub.PACKAGED`, which is not imported for --help."""

_A_MODEL = "A folder, or a Hugging Face id (owner/name@revision)"
Model = Annotated[str, typer.Option("--model", "-m", envvar="IV3_MODEL", help=f"{_A_MODEL}.")]
ModelOrTiny = Annotated[
    str,
    typer.Option("--model", "-m", envvar="IV3_MODEL", help=f"{_A_MODEL}; iv3-tiny comes with iv3, for toy films."),
]
"""Of a command that answers out of the box."""
Backend = Annotated[str, typer.Option(help="mlx, torch or auto (MLX on Apple silicon, else PyTorch).")]
DType = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as stored by default.")]
Place = Annotated[
    str,
    typer.Option(
        "--library",
        envvar="IV3_LIBRARY",
        help="What videos and notes are kept in: a folder, or an address that LanceDB opens (s3://, gs://).",
    ),
]
DEFAULT_PLACE = "~/.cache/ivmlx/library"
SpeechModel = Annotated[str | None, typer.Option(metavar="NAME", help="A Whisper model, for videos without subtitles.")]
