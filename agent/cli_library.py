"""`iv3 index`, `iv3 search` and `iv3 library`: their arguments."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

import typer

from agent.cli_options import DEFAULT_PLACE, TINY, Backend, Debug, DType, ModelOrTiny, Place, SpeechModel

app = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="Print one object or list with everything.")]


class RecordKind(StrEnum):
    passage = "passage"
    scene = "scene"
    note = "note"


@app.command(
    epilog="""\b
Examples:
  iv3 index ~/Films -m ./InternVideo3-8B-Instruct
  iv3 index talk.mp4 holiday/ -m DIR --speech-model small
  iv3 index ~/Films -m DIR --library s3://bucket/films --json"""
)
def index(
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="Videos, or folders to look for them in.")],
    model: ModelOrTiny = TINY,
    library: Place = DEFAULT_PLACE,
    backend: Backend = "auto",
    dtype: DType = None,
    speech_model: SpeechModel = None,
    fps: Annotated[float | None, typer.Option(min=0.001, help="Frames of a scene to sample a second.")] = None,
    max_frames: Annotated[int, typer.Option(min=1, help="Most frames of a scene.")] = 8,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Put videos into the library: what is said in them, and a caption of every scene.

    What is there already is skipped; after a stop, or a kill, the same command goes on. Exit code 1 where a file could
    not be read; the others are indexed.
    """
    from agent.library_view import IndexOptions
    from agent.library_view import index as run

    options = IndexOptions(fps=fps, max_frames=max_frames, speech_model=speech_model)
    if run(paths, library, model, backend=backend, dtype=dtype, options=options, as_json=as_json):
        raise typer.Exit(1)


@app.command(
    epilog="""\b
Examples:
  iv3 search "the red circle"
  iv3 search "when does she leave?" --mode both --kind passage -k 5
  iv3 search "a dog" --video film.mp4 --sheet dogs.png
  iv3 search goal --json | jq '.[].span'"""
)
def search(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    library: Place = DEFAULT_PLACE,
    mode: Annotated[
        Literal["text", "vector", "both"],
        typer.Option(help="text looks for words and loads no model; vector compares meanings; both does both."),
    ] = "text",
    count: Annotated[int, typer.Option("-k", min=1, max=1000, help="Most records to show.")] = 10,
    kind: Annotated[list[RecordKind] | None, typer.Option(help="Only these; may be repeated.")] = None,
    video: Annotated[
        str | None, typer.Option(metavar="VIDEO", help="Only in this one: a path, a file's name, or its hash.")
    ] = None,
    sheet: Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw the hits as thumbnails.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The model the videos were indexed with, where there are several."),
    ] = None,
    backend: Backend = "auto",
    dtype: DType = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Search all videos of the library.

    vector and both load the model that the videos were indexed with: the library knows which.
    """
    from agent.library_view import search as run

    run(
        query, library, mode=mode, count=count, kinds=[each.value for each in kind or ()], video=video, model=model,
        backend=backend, dtype=dtype, sheet=sheet, as_json=as_json,
    )  # fmt: skip


library_app = typer.Typer(
    name="library",
    help="List, remove and check what iv3 index made.",
    rich_markup_mode=None,
    epilog="""\b
Examples:
  iv3 library list
  iv3 library remove film.mp4
  iv3 library verify --rebuild""",
)
app.add_typer(library_app)


@library_app.callback(invoke_without_command=True)
def _library(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@library_app.command(
    "list",
    epilog="""\b
Examples:
  iv3 library list
  iv3 library list --library s3://bucket/films --json""",
)
def list_videos(library: Place = DEFAULT_PLACE, as_json: Json = False, debug: Debug = False) -> None:
    """Say which videos are in the library, what it holds of them, and with which model it was made."""
    from agent.library_view import show_list

    show_list(library, as_json)


@library_app.command(
    epilog="""\b
Examples:
  iv3 library remove film.mp4
  iv3 library remove 3f2a90c41d77"""
)
def remove(
    videos: Annotated[list[str], typer.Argument(metavar="VIDEO", help="Paths, files' names, or hashes.")],
    library: Place = DEFAULT_PLACE,
    debug: Debug = False,
) -> None:
    """Remove all that the library holds of videos, notes too; the files stay."""
    from agent.library_view import remove as run

    run(library, videos)


@library_app.command(
    epilog="""\b
Examples:
  iv3 library verify
  iv3 library verify --rebuild"""
)
def verify(
    library: Place = DEFAULT_PLACE,
    anew: Annotated[
        bool, typer.Option("--rebuild", help="Begin a new library where this one is damaged; the old one is kept.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Read everything in the library; exit code 1 where something is wrong."""
    from agent.library_view import verify as run

    if run(library, anew):
        raise typer.Exit(1)
