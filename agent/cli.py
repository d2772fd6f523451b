"""The command `iv3`: arguments and errors; every command's work is in a module of its own, imported when it runs."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from agent import cli_agent, cli_library, cli_train, cli_weights
from agent.cli_options import TINY, Backend, Debug, DType, ModelOrTiny, debugging, reset_debugging

app = typer.Typer(
    name="iv3",
    help="Ask questions about videos with InternVideo3 (or Qwen3-VL) on your own machine.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _main(context: typer.Context, debug: Debug = False) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@app.command(
    epilog="""\b
Examples:
  iv3 ask clip.mp4 "Which shape came first?"
  iv3 ask clip.mp4 "What happens?" -m ./InternVideo3-8B-Instruct
  iv3 ask a.jpg b.jpg "What has changed?" -m DIR --max-tokens 80
  iv3 ask film.mp4 "Who wins?" -m DIR --fps 0.5 --json | jq .answer"""
)
def ask(
    media: Annotated[list[str], typer.Argument(metavar="VIDEO_OR_IMAGE...", help="Files, in the order to show them.")],
    question: Annotated[str, typer.Argument(help="What to ask about them.")],
    model: ModelOrTiny = TINY,
    backend: Backend = "auto",
    dtype: DType = None,
    fps: Annotated[float | None, typer.Option(min=0.001, help="Frames to sample a second.")] = None,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Most frames to sample.")] = None,
    frame_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens for a pair of frames or an image.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=1e-6, max=1, help="Sample from the likeliest tokens of this mass.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes a sampled answer repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object with answer, counts and timings.")] = False,
    debug: Debug = False,
) -> None:
    """Ask about videos and images; the answer streams to stdout."""
    from agent.ask import Request, run
    from ivcore.sampling import Sampling

    request = Request(
        media=media,
        question=question,
        model=model,
        backend=backend,
        dtype=dtype,
        fps=fps,
        max_frames=max_frames,
        frame_tokens=frame_tokens,
        system=system,
        max_tokens=max_tokens,
        sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed),
    )
    run(request, as_json=as_json)


@app.command(
    epilog="""\b
Examples:
  iv3 info ./InternVideo3-8B-Instruct --context 65536
  iv3 info owner/name@revision      reads the headers, downloads no weights"""
)
def info(
    model: Annotated[str, typer.Argument(help="A folder, or a Hugging Face id (owner/name@revision).")],
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of context to plan memory for.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object with all numbers.")] = False,
    debug: Debug = False,
) -> None:
    """Say what a checkpoint is, whether it runs here, and what memory it takes."""
    from agent.info import info as show

    show(model, context, as_json)


@app.command(
    epilog="""\b
Examples:
  iv3 parity ./InternVideo3-8B-Instruct --backends mlx,torch
  iv3 parity ./InternVideo3-8B-Instruct ./iv3-4bit --plot 4bit.png --max-kl 0.05
  iv3 parity DIR --dtype float32,bfloat16 --backends torch --json > report.json
  iv3 parity DIR --video clip.mp4 --question "What happens?" --tokens 64"""
)
def parity(
    a: Annotated[str, typer.Argument(metavar="A", help="The reference: a folder, or a Hugging Face id.")],
    b: Annotated[str | None, typer.Argument(metavar="B", help="A second model of the same body.")] = None,
    backends: Annotated[str | None, typer.Option(metavar="NAMES", help="mlx, torch or mlx,torch.")] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAMES", help="float32, bfloat16 or float16, or several with commas.")
    ] = None,
    video: Annotated[str | None, typer.Option(metavar="FILE", help="A video or image to compare on.")] = None,
    question: Annotated[str | None, typer.Option(metavar="TEXT", help="What to ask about it.")] = None,
    tokens: Annotated[int, typer.Option(min=0, help="Greedy tokens to decode after the prompt.")] = 16,
    max_kl: Annotated[float | None, typer.Option(min=0, help="Fail above this mean KL in nats.")] = None,
    min_agreement: Annotated[
        float | None, typer.Option(min=0, max=1, help="Fail below this share of equal top tokens.")
    ] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw error against depth.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object with all numbers.")] = False,
    debug: Debug = False,
) -> None:
    """Compare runs of a model layer by layer and name the layer at fault.

    Every folder runs on every backend in every dtype, one at a time; all are compared with the first. By default one
    folder runs on both backends, two folders on one, and what is read is a built-in clip, image and text.
    """
    if (video is None) != (question is None):
        raise typer.BadParameter("--video and --question go together; give both or neither")
    from agent.parity import run

    run(
        a,
        b,
        backends=backends.split(",") if backends else None,
        dtypes=dtype.split(",") if dtype else None,
        video=video,
        question=question,
        tokens=tokens,
        max_kl=max_kl,
        min_agreement=min_agreement,
        plot=plot,
        as_json=as_json,
    )


app.add_typer(cli_weights.app)
app.add_typer(cli_train.train)
app.add_typer(cli_agent.app)
app.add_typer(cli_library.app)


def main(arguments: list[str] | None = None) -> None:
    """Run a command; exit 0, 2 for bad usage, 1 for a failed job, 130 for Ctrl-C. Errors are one line on stderr."""
    reset_debugging()
    code, message = _outcome(arguments)
    if message:
        print(f"iv3: {message}", file=sys.stderr)
    sys.exit(code)


def _outcome(arguments: list[str] | None) -> tuple[int, str]:
    try:
        code: Any = app(args=arguments, standalone_mode=False, prog_name="iv3")
        sys.stdout.flush()
        return (code if isinstance(code, int) else 0), ""
    except (KeyboardInterrupt, typer.Abort):
        return 130, "stopped."
    except BrokenPipeError:
        # The reader of the pipe has gone; nothing may be flushed into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, ""
    except Exception as error:
        # Typer's own errors; by their form, because some versions bring a copy of click and some import it.
        if isinstance(code := getattr(error, "exit_code", None), int) and hasattr(error, "format_message"):
            return code, _usage(error)
        if debugging():
            raise
        return 1, _sentence(error)


def _usage(error: Any) -> str:
    message = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    return f"{message.rstrip('.')}; see {context.command_path if context else 'iv3'} --help."


def _sentence(error: Exception) -> str:
    from ivcore.errors import IvError

    if isinstance(error, IvError):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory: use a smaller --max-frames or --frame-tokens, or quantised weights."
    if isinstance(error, OSError):
        return f"{error.filename or 'writing the output'}: {error.strerror or error}; free some room or check the path."
    return f"unexpected {type(error).__name__}: {error}; run again with --debug to see where."


if __name__ == "__main__":
    main()
