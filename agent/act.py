"""`iv3 agent` and `iv3 chat`: a model, a video and a loop, their entries shown and traced as they happen."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.budget import Budget
from agent.content import content_hash
from agent.entries import Entry, Result, Run
from agent.loop import MESSAGE_TOKENS, Loop
from agent.packaged import say_if_packaged
from agent.phases import Phases
from agent.run_view import lines_of
from agent.tools.box import NAMES, OF_LIBRARY, check_names
from agent.trace import Trace, TraceError, read_trace, resumed
from agent.workspace import Workspace
from ivcore.backend import choose, load
from ivcore.hub import resolve
from ivcore.media_file import readable_file
from ivcore.sampling import Sampling
from ivcore.tokenizer import Tokenizer
from ivcore.video import probe

if TYPE_CHECKING:
    from agent.library import Collection


@dataclass(frozen=True)
class Options:
    """Of both commands; None leaves a choice to the checkpoint, to the model or to this machine."""

    model: str
    backend: str = "auto"
    dtype: str | None = None
    frame_tokens: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    system: str | None = None
    max_tokens: int = MESSAGE_TOKENS
    sampling: Sampling = field(default_factory=Sampling)
    budget: Budget = field(default_factory=Budget)
    tools: tuple[str, ...] | None = None
    library: str | None = None
    speech_model: str | None = None
    language: str | None = None

    def traced(self) -> dict[str, Any]:
        """What a rerun needs to know, for the trace."""
        return {**asdict(self), "tools": None if self.tools is None else list(self.tools)}

    @classmethod
    def of(cls, run: Run) -> Options:
        """Those of a traced run; TraceError where they are not those of this version."""
        given = dict(run.options)
        try:
            given |= {"sampling": Sampling(**given["sampling"]), "budget": Budget(**given["budget"])}
            return cls(**{**given, "tools": None if given["tools"] is None else tuple(given["tools"])})
        except (KeyError, TypeError):
            raise TraceError("The trace's run has options that this version does not know; run it anew.") from None


def agent(
    video: str,
    question: str,
    options: Options,
    *,
    trace: str | None = None,
    report: str | None = None,
    as_json: bool = False,
) -> None:
    """Answer on stdout, with status and evidence; the turns on stderr, as they happen."""
    path = readable_file(video)
    with prepared(trace, report) as file:
        run, loop = begin(path, question, options)
        entries = follow(chain([run], loop.ask(question)), file)
    _finish(entries, report, as_json)


def go_on(trace: str, *, report: str | None = None, as_json: bool = False) -> None:
    """As `agent`, from where a trace ends."""
    entries = read_trace(trace)
    run = entries[0]
    assert isinstance(run, Run)  # read_trace lets nothing else be the first
    if isinstance(entries[-1], Result):
        raise TraceError(f"{trace} has its result already; see it with iv3 replay {trace}.")
    kept, mark = resumed(entries[1:])
    if not kept and not run.question:  # a talk that was stopped before its first question
        raise TraceError(f"{trace} has no question yet, so there is nothing to go on with; ask with iv3 chat.")
    path = readable_file(run.path)
    with prepared(trace, report, resume=True) as file:
        _, loop = begin(path, run.question, Options.of(run), entries=[*kept, mark], video=run.video)
        show([run, *kept])
        rest = loop.go_on() if kept else loop.ask(run.question)
        new = follow(chain([mark], rest), file)
    _finish([run, *kept, *new], report, as_json)


def begin(
    path: Path, question: str, options: Options, *, entries: Sequence[Entry] = (), video: str | None = None
) -> tuple[Run, Loop]:
    """The model loaded and a loop about the video, with the trace's first entry.

    question: empty for a talk. entries, video: of a run to go on from, and the content hash that its file must still
    have.
    """
    check_names(options.tools)
    content = content_hash(path)
    if video is not None and video != content:
        raise TraceError(f"{path} is another video than the run's; put the one back that it was about.")
    say_if_packaged(options.model)
    phases = Phases()
    with phases, phases.phase("load"):
        folder = resolve(options.model)
        tokenizer = Tokenizer.from_dir(folder)
        duration = probe(path).duration
        model = load(folder, choose(options.backend), options.dtype)
        model.stop_ids |= tokenizer.stop_ids
    workspace = Workspace(
        path,
        model,
        tokenizer,
        content=content,
        speech_model=options.speech_model,
        language=options.language,
        frame_tokens=options.frame_tokens,
        most_fps=options.fps,
        most_frames=options.max_frames,
    )
    workspace.notes = _collection(options, workspace)
    run = Run(
        path=str(path),
        video=workspace.content,
        duration=duration,
        question=question,
        model=options.model,
        backend=model.backend,
        dtype=model.dtype,
        options=options.traced(),
    )
    loop = Loop(
        workspace,
        options.budget,
        sampling=options.sampling,
        message_tokens=options.max_tokens,
        system=options.system,
        tools=options.tools,
        entries=entries,
    )
    return run, loop


@contextmanager
def prepared(trace: str | None, report: str | None = None, *, resume: bool = False) -> Iterator[Trace | None]:
    """The trace, open; a file that cannot be written is better known before a model is loaded."""
    if report is not None:
        from agent.report import check_writable

        check_writable(report)
    if trace is None:
        yield None
    else:
        with Trace(trace, resume=resume) as file:
            yield file


def follow(entries: Iterable[Entry], file: Trace | None) -> list[Entry]:
    """Take entries as they come, each into the trace first and then onto the terminal; gives them all."""
    taken = []
    for entry in entries:
        if file is not None:
            file.append(entry)
        show([entry])
        taken.append(entry)
    return taken


def show(entries: Iterable[Entry]) -> None:
    """Entries on stderr, a Result apart, which is the answer."""
    for entry in entries:
        if not isinstance(entry, Result):
            for line in lines_of(entry):
                print(line, file=sys.stderr, flush=True)


def _finish(entries: Sequence[Entry], report: str | None, as_json: bool) -> None:
    result = entries[-1]
    assert isinstance(result, Result)
    if as_json:
        print(json.dumps(result.model_dump(mode="json"), ensure_ascii=False))
    else:
        print("\n".join(lines_of(result)), flush=True)
    if report is not None:
        from agent.report import write_report

        write_report(report, entries)


def _collection(options: Options, workspace: Workspace) -> Collection | None:
    """Where notes are kept; None without a library, or a tool that uses one."""
    if options.library is None or OF_LIBRARY.isdisjoint(NAMES if options.tools is None else options.tools):
        return None
    from agent.embedding import Embedder, collection_name
    from agent.library import Library

    library = Library(options.library, create=True)
    return library.collection(collection_name(options.model), Embedder(workspace.model, workspace.tokenizer).texts)
