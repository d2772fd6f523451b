"""The command `iv3`: arguments and errors; every command's work is in a module of its own, imported when it runs."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

app = typer.Typer(
    name="iv3",
    help="Ask questions about videos with InternVideo3 (or Qwen3-VL) on your own machine.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_debug = False


def _set_debug(value: bool) -> bool:
    global _debug
    _debug = _debug or value
    return value


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_set_debug)]
Model = Annotated[
    str, typer.Option("--model", "-m", envvar="IV3_MODEL", help="A folder, or a Hugging Face id (owner/name@revision).")
]


@app.callback(invoke_without_command=True)
def _main(context: typer.Context, debug: Debug = False) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@app.command(
    epilog="""\b
Examples:
  iv3 ask clip.mp4 "What happens?" -m ./InternVideo3-8B-Instruct
  iv3 ask a.jpg b.jpg "What has changed?" -m DIR --max-tokens 80
  iv3 ask film.mp4 "Who wins?" -m DIR --fps 0.5 --json | jq .answer"""
)
def ask(
    media: Annotated[list[str], typer.Argument(metavar="VIDEO_OR_IMAGE...", help="Files, in the order to show them.")],
    question: Annotated[str, typer.Argument(help="What to ask about them.")],
    model: Model,
    backend: Annotated[str, typer.Option(help="mlx, torch or auto (MLX on Apple silicon, else PyTorch).")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as stored by default.")] = None,
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
  iv3 convert yanziang/InternVideo3-8B-Instruct ./iv3-4bit --bits 4
  iv3 convert ./release ./iv3-mixed --recipe mixed_4_6 --dry-run
  iv3 convert ./iv3-4bit ./iv3-float --dtype bf16
  iv3 convert ./release ./merged --adapter ./my-lora"""
)
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A folder, or a Hugging Face id (owner/name@revision).")],
    target: Annotated[str, typer.Argument(metavar="DST", help="The folder to write; both backends load it.")],
    bits: Annotated[int | None, typer.Option(help="Quantise to 4 or 8 bits (MLX's affine form).")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="32, 64 (the default) or 128 columns share a scale and a bias.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32; as stored by default. Without --bits it dequantises.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Modules to leave in float, as in lm_head, layers.0 or '*.mlp.*'; may be repeated. The vision tower, "
            "the projector, norms and biases always stay; kv_b_proj gets 8 bits.",
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Mixed bit widths: mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(metavar="DIR", help="A LoRA adapter (PEFT's form) to merge.")] = None,
    shard_size: Annotated[str, typer.Option(help="Most bytes in a shard, as in 5GB or 500MB.")] = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, write nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a conversion that was stopped.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace DST, or start a stopped conversion anew.")] = False,
    debug: Debug = False,
) -> None:
    """Cast, quantise or dequantise weights, or merge an adapter, all or nothing."""
    from agent.convert import convert as run_convert
    from agent.convert import parse_size
    from convert.plan import Options

    options = Options(
        bits=bits,
        group_size=group_size,
        dtype=dtype,
        keep=tuple(keep or ()),
        recipe=recipe,
        adapter=adapter,
        shard_bytes=parse_size(shard_size),
    )
    run_convert(source, target, options, dry_run=dry_run, resume=resume, force=force)


@app.command(
    epilog="""\b
Examples:
  iv3 verify ./iv3-4bit
  iv3 verify ./iv3-4bit --json | jq .problems"""
)
def verify(
    path: Annotated[str, typer.Argument(metavar="DIR", help="The folder of a checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one object with all that was found.")] = False,
    debug: Debug = False,
) -> None:
    """Check every shard against its header, the manifest and conversion.json; exit 1 if anything is wrong."""
    from agent.convert import verify as run_verify

    run_verify(path, as_json)


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


class _TrainCommands(TyperGroup):
    """The commands of `iv3 train`; one that does not exist is told what there is."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands:
            *names, last = self.commands
            ctx.fail(f"iv3 train has no command {args[0]!r}, only {', '.join(names)} and {last}")
        return super().resolve_command(ctx, args)


train = typer.Typer(
    name="train",
    help="Train a LoRA, or all weights, by a recipe; draw the curves of runs.",
    cls=_TrainCommands,
    rich_markup_mode=None,
    epilog="""\b
Examples:
  iv3 train sft --recipe mac16-sft --model ./iv3-4bit --data rows.jsonl --out runs/first
  iv3 train sft --recipe mac16-sft -m ./iv3-4bit --data rows.jsonl --out runs/first --resume
  iv3 train plot runs/first""",
)
app.add_typer(train)

STAGES = {
    "cpt": "Continue pretraining: next-token loss on the assistant's words.",
    "sft": "Fine-tune on answers, in phases where a curriculum has them.",
    "rl": "Sample answers and learn from rewards that rules give.",
    "distill": "Sample answers and learn from a teacher's scores of them.",
}


@train.callback(invoke_without_command=True)
def _train(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def _add_stage(stage: str, purpose: str) -> None:
    def run(
        recipe: Annotated[str, typer.Option(help="A TOML file, or the name of a recipe that comes with iv3.")],
        model: Model,
        data: Annotated[str, typer.Option(help="JSONL rows, an upstream meta file, or grounding annotations.")],
        out: Annotated[str, typer.Option(help="The run's folder.")],
        backend: Annotated[str, typer.Option(help="mlx, torch or auto (MLX on Apple silicon, else PyTorch).")] = "auto",
        dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; as stored by default.")] = None,
        held_out: Annotated[
            str | None,
            typer.Option(metavar="FILE", help="Rows to ask and judge, every evaluate_every steps and last."),
        ] = None,
        overrides: Annotated[
            list[str] | None,
            typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe's value; may be repeated."),
        ] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
        tensorboard: Annotated[
            bool, typer.Option("--tensorboard", help="Write what TensorBoard shows to RUN/tensorboard.")
        ] = False,
        debug: Debug = False,
    ) -> None:
        from agent.train import train as run_train

        run_train(
            stage, recipe, model, data, out,
            backend=backend, dtype=dtype, overrides=list(overrides or ()), resume=resume, held_out=held_out,
            tensorboard=tensorboard,
        )  # fmt: skip

    examples = f"""\b
Examples:
  iv3 train {stage} --recipe mac16-{stage} --model ./iv3-4bit --data rows.jsonl --out runs/{stage}
  iv3 train {stage} --recipe my.toml -m DIR --data rows.jsonl --out runs/{stage} --set learning_rate.peak=1e-5
  iv3 train {stage} --recipe my.toml -m DIR --data rows.jsonl --out runs/{stage} --resume"""
    train.command(stage, help=purpose, epilog=examples)(run)


for _stage, _purpose in STAGES.items():
    _add_stage(_stage, _purpose)


@train.command(
    epilog="""\b
Examples:
  iv3 train plot runs/first
  iv3 train plot runs/first runs/second runs/third --out compared.png"""
)
def plot(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs, finished or not.")],
    out: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="The picture; RUN/curves.png where there is one run.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Draw the curves of one or several runs to a PNG."""
    from train.plot import draw

    print(draw(runs, out))


def main(arguments: list[str] | None = None) -> None:
    """Run a command; exit 0, 2 for bad usage, 1 for a failed job, 130 for Ctrl-C. Errors are one line on stderr."""
    global _debug
    _debug = False
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
        if _debug:
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
