"""`iv3 agent`, `iv3 chat` and `iv3 replay`: their arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli_options import Debug, ModelOrTiny

if TYPE_CHECKING:
    from agent.act import Options

app = typer.Typer()

Backend = Annotated[str, typer.Option(help="mlx, torch or auto (MLX on Apple silicon, else PyTorch).")]
DType = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as stored by default.")]
FrameTokens = Annotated[int | None, typer.Option(min=1, help="Most tokens for a pair of frames.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option(min=1e-6, max=1, help="Sample from the likeliest tokens of this mass.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Makes sampled answers repeatable.")]
MaxTurns = Annotated[int, typer.Option(min=1, help="Most messages of the model to one question.")]
BudgetTokens = Annotated[int | None, typer.Option(min=1, help="Most tokens to read and write, in all.")]
BudgetFrames = Annotated[int | None, typer.Option(min=1, help="Most frames to look at, in all.")]
BudgetSeconds = Annotated[float | None, typer.Option(min=0, help="Most seconds.")]
Context = Annotated[
    int | None, typer.Option(min=1, help="Most tokens of context; then the oldest frames become a sentence each.")
]
Tools = Annotated[str | None, typer.Option(metavar="NAMES", help="Those that may be used, with commas; else all.")]
Library = Annotated[
    str | None,
    typer.Option(envvar="IV3_LIBRARY", help="Where notes are kept, and searched: see iv3 index."),
]
Speech = Annotated[
    str | None, typer.Option("--speech-model", metavar="NAME", help="A Whisper model, for videos without subtitles.")
]
Language = Annotated[str | None, typer.Option(help="The language spoken, for the speech model.")]
Report = Annotated[str | None, typer.Option(metavar="FILE.html", help="Write the run as one page.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one object.")]


@app.command(
    epilog="""\b
Examples:
  iv3 agent film.mp4 "Why did she leave?" -m ./InternVideo3-8B-Instruct
  iv3 agent film.mp4 "Who wins?" -m DIR --trace run.jsonl --report run.html
  iv3 agent --resume run.jsonl                  goes on with a run that was stopped
  iv3 agent film.mp4 "Who wins?" -m DIR --max-turns 8 --json | jq .evidence"""
)
def agent(
    video: Annotated[str | None, typer.Argument(help="The video.")] = None,
    question: Annotated[str | None, typer.Argument(help="What to find out.")] = None,
    model: ModelOrTiny = None,
    backend: Backend = "auto",
    dtype: DType = None,
    frame_tokens: FrameTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    max_turns: MaxTurns = 20,
    budget_tokens: BudgetTokens = None,
    budget_frames: BudgetFrames = None,
    budget_seconds: BudgetSeconds = None,
    context: Context = None,
    tools: Tools = None,
    library: Library = None,
    speech_model: Speech = None,
    language: Language = None,
    trace: Annotated[
        str | None, typer.Option(metavar="FILE.jsonl", help="Write every entry of the run as it happens.")
    ] = None,
    report: Report = None,
    resume: Annotated[
        str | None, typer.Option(metavar="TRACE", help="Go on with a run that was stopped; it says about what.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Look, reason and look again until a question is answered; cite what shows it, or say that it is not there.

    What the model does is shown on stderr while it happens; the answer, whether a fresh look confirms it, and its
    evidence are on stdout.
    """
    from agent import act

    if resume is not None:
        if video is not None or question is not None:
            raise typer.BadParameter("--resume knows its video and question from the trace; leave them out")
        act.go_on(resume, report=report, as_json=as_json)
        return
    if video is None or question is None:
        raise typer.BadParameter("a video and a question are missing, or --resume TRACE")
    options = _options(
        model, backend, dtype, frame_tokens, temperature, top_p, seed, max_turns, budget_tokens, budget_frames,
        budget_seconds, context, tools, library, speech_model, language,
    )  # fmt: skip
    act.agent(video, question, options, trace=trace, report=report, as_json=as_json)


@app.command(
    epilog="""\b
Examples:
  iv3 chat film.mp4 -m ./InternVideo3-8B-Instruct
  iv3 chat film.mp4 -m DIR --trace talk.jsonl"""
)
def chat(
    video: Annotated[str, typer.Argument(help="The video.")],
    model: ModelOrTiny = None,
    backend: Backend = "auto",
    dtype: DType = None,
    frame_tokens: FrameTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    max_turns: MaxTurns = 20,
    budget_tokens: BudgetTokens = None,
    budget_frames: BudgetFrames = None,
    budget_seconds: BudgetSeconds = None,
    context: Context = None,
    tools: Tools = None,
    library: Library = None,
    speech_model: Speech = None,
    language: Language = None,
    trace: Annotated[
        str | None, typer.Option(metavar="FILE.jsonl", help="Write every entry of the talk as it happens.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Ask one question after the other about a video; what was seen before is kept, and costs nothing again.

    Ctrl-C stops an answer, not the program; Ctrl-D ends it.
    """
    from agent.chat import chat as talk

    options = _options(
        model, backend, dtype, frame_tokens, temperature, top_p, seed, max_turns, budget_tokens, budget_frames,
        budget_seconds, context, tools, library, speech_model, language,
    )  # fmt: skip
    talk(video, options, trace=trace)


@app.command(
    epilog="""\b
Examples:
  iv3 replay run.jsonl
  iv3 replay run.jsonl --report run.html
  iv3 replay run.jsonl --rerun             runs it again and says where it departs"""
)
def replay(
    trace: Annotated[str, typer.Argument(metavar="TRACE", help="What iv3 agent --trace wrote.")],
    rerun: Annotated[
        bool, typer.Option("--rerun", help="Run it again and compare; exit code 1 if it departs.")
    ] = False,
    report: Report = None,
    debug: Debug = False,
) -> None:
    """Show a run again, or run it again."""
    from agent.replay import replay as show_again

    if not show_again(trace, rerun=rerun, report=report):
        raise typer.Exit(1)


def _options(
    model: str | None,
    backend: str,
    dtype: str | None,
    frame_tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int | None,
    max_turns: int,
    budget_tokens: int | None,
    budget_frames: int | None,
    budget_seconds: float | None,
    context: int | None,
    tools: str | None,
    library: str | None,
    speech_model: str | None,
    language: str | None,
) -> Options:
    from agent.act import Options
    from agent.budget import Budget
    from agent.packaged import or_packaged
    from ivcore.sampling import Sampling

    model, dtype = or_packaged(model, dtype)
    return Options(
        model=model,
        backend=backend,
        dtype=dtype,
        frame_tokens=frame_tokens,
        sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed),
        budget=Budget(
            turns=max_turns, tokens=budget_tokens, frames=budget_frames, seconds=budget_seconds, context=context
        ),
        tools=None if tools is None else tuple(name.strip() for name in tools.split(",")),
        library=library,
        speech_model=speech_model,
        language=language,
    )
