"""`iv3 agent`, `iv3 chat` and `iv3 replay`: their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.cli_options import DEFAULT_PLACE, TINY, Backend, Debug, DType, ModelOrTiny, Place, SpeechModel

if TYPE_CHECKING:
    from agent.act import Options

app = typer.Typer()

Fps = Annotated[float | None, typer.Option(min=0.001, help="Most frames a second of any look.")]
MaxFrames = Annotated[int | None, typer.Option(min=1, help="Most frames of any look.")]
FrameTokens = Annotated[int | None, typer.Option(min=1, help="Most tokens for a pair of frames.")]
System = Annotated[str | None, typer.Option(help="What the model is told besides the rules of the loop.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens of a message.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option(min=1e-6, max=1, help="Sample from the likeliest tokens of this mass.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Makes sampled answers repeatable.")]
MaxTurns = Annotated[int, typer.Option(min=1, help="Most messages of the model for a question.")]
BudgetTokens = Annotated[int | None, typer.Option(min=1, help="Most tokens to read and write for a question.")]
BudgetFrames = Annotated[int | None, typer.Option(min=1, help="Most frames to look at for a question.")]
BudgetSeconds = Annotated[float | None, typer.Option(min=0, help="Most seconds of work on a question.")]
Context = Annotated[
    int | None, typer.Option(min=1, help="Most tokens of context; then the oldest frames become a sentence each.")
]
Tools = Annotated[str | None, typer.Option(metavar="NAMES", help="Those that may be used, with commas; else all.")]
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
    given: typer.Context,
    video: Annotated[str | None, typer.Argument(help="The video.")] = None,
    question: Annotated[str | None, typer.Argument(help="What to find out.")] = None,
    model: ModelOrTiny = TINY,
    backend: Backend = "auto",
    dtype: DType = None,
    fps: Fps = None,
    max_frames: MaxFrames = None,
    frame_tokens: FrameTokens = None,
    system: System = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    max_turns: MaxTurns = 20,
    budget_tokens: BudgetTokens = None,
    budget_frames: BudgetFrames = None,
    budget_seconds: BudgetSeconds = None,
    context: Context = None,
    tools: Tools = None,
    library: Place = DEFAULT_PLACE,
    speech_model: SpeechModel = None,
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
        ours = {"resume", "report", "as_json", "debug"}
        named = [each for each in given.params if each not in ours and _on_command_line(given, each)]
        if named:
            name = named[0] if named[0] in ("video", "question") else f"--{named[0].replace('_', '-')}"
            raise typer.BadParameter(f"--resume knows the run's video, question and options; leave out {name}")
        act.go_on(resume, report=report, as_json=as_json)
        return
    if video is None or question is None:
        raise typer.BadParameter("a video and a question are missing, or --resume TRACE")
    if not question.strip():
        raise typer.BadParameter("the question is empty")
    options = _options(given.params)
    act.agent(video, question, options, trace=trace, report=report, as_json=as_json)


@app.command(
    epilog="""\b
Examples:
  iv3 chat film.mp4 -m ./InternVideo3-8B-Instruct
  iv3 chat film.mp4 -m DIR --trace talk.jsonl"""
)
def chat(
    given: typer.Context,
    video: Annotated[str, typer.Argument(help="The video.")],
    model: ModelOrTiny = TINY,
    backend: Backend = "auto",
    dtype: DType = None,
    fps: Fps = None,
    max_frames: MaxFrames = None,
    frame_tokens: FrameTokens = None,
    system: System = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    max_turns: MaxTurns = 20,
    budget_tokens: BudgetTokens = None,
    budget_frames: BudgetFrames = None,
    budget_seconds: BudgetSeconds = None,
    context: Context = None,
    tools: Tools = None,
    library: Place = DEFAULT_PLACE,
    speech_model: SpeechModel = None,
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

    options = _options(given.params)
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


def _on_command_line(given: typer.Context, name: str) -> bool:
    source = given.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _options(given: Mapping[str, Any]) -> Options:
    """The options that `agent` and `chat` share, from their parameters by name."""
    from agent.act import Options
    from agent.budget import Budget
    from ivcore.sampling import Sampling

    same = "backend", "fps", "max_frames", "frame_tokens", "system", "max_tokens", "speech_model", "language"
    tools, library = given["tools"], given["library"]
    if library == DEFAULT_PLACE and find_spec("lancedb") is None:
        library = None
    return Options(
        model=given["model"],
        dtype=given["dtype"],
        sampling=Sampling(temperature=given["temperature"], top_p=given["top_p"], seed=given["seed"]),
        budget=Budget(
            turns=given["max_turns"],
            tokens=given["budget_tokens"],
            frames=given["budget_frames"],
            seconds=given["budget_seconds"],
            context=given["context"],
        ),
        tools=None if tools is None else tuple(name.strip() for name in tools.split(",")),
        library=library,
        **{name: given[name] for name in same},
    )
