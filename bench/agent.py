"""The agent on long films, beside one pass over each with as many visual tokens, into docs/agent-results.md.

    python -m bench.agent [--model iv3-tiny] [--films 100] [--absent 50] [--backends torch,mlx] [--jobs 2]

Films are rendered from held-out seeds of the toy world, ten minutes each, with an event of three seconds in it; in
those of `absent` there is none. Two single passes over each film with the event are made on the first backend: one with
as many visual tokens as the agent had, which takes much longer, and one with FEW. What was run is kept in OUT and not
run again, unless the model has other weights since.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from agent.indexing import weights_digest
from agent.oracle.dataset import film
from agent.spans import overlap
from bench.memory import environment
from ivcore.errors import IvError
from ivcore.files import write_beside
from ivcore.hub import resolve
from train.toyworld.questions import ask as question_of
from train.toyworld.score import is_right
from train.toyworld.script import seeds

if TYPE_CHECKING:
    from agent.ask import Request
    from agent.loop import Loop

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 600.0
FIRST = 500_000
"""Number of the first film among the held-out seeds."""

FRAMES_A_PATCH, PATCH_TOKENS = 2, 16
"""What a pair of frames of 64x64 pixels costs."""

FEW = 256
"""Visual tokens of the longest clips that iv3-tiny has learned to answer questions about in one pass."""

PART = 10
"""Films that a process runs, one after the other."""

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 28)}
"""What glibc reads: without it a third of one pass goes by in giving its temporaries back and taking them again."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="iv3-tiny")
    parser.add_argument("--films", type=int, default=100)
    parser.add_argument("--absent", type=int, default=50)
    parser.add_argument("--backends", default="torch,mlx")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("build/agent"))
    parser.add_argument("--page", type=Path, default=ROOT / "docs/agent-results.md")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task:
        backend, passes, numbers = json.loads(given.task)
        for seed, kind in numbers:
            run(given.out, given.model, backend, seed, kind, passes and kind == "rare")
        return
    films = [(seed, "rare") for seed in seeds("heldout", FIRST, given.films)]
    films += [(seed, "absent") for seed in seeds("heldout", FIRST + given.films, given.absent)]
    backends = given.backends.split(",")
    tasks = [(backend, films[first : first + PART]) for backend in backends for first in range(0, len(films), PART)]
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(partial(start, given), tasks))
    found = {backend: [kept(given.out, given.model, backend, seed) for seed, _ in films] for backend in backends}
    page = "\n".join(lines(given.model, found)) + "\n"
    write_beside(given.page, page.encode())
    print(page)


def start(given: argparse.Namespace, task: tuple[str, Sequence[tuple[int, str]]]) -> None:
    """Run a part of the films in a process of its own, but for those that were run."""
    backend, films = task
    left = [(seed, kind) for seed, kind in films if not file_of(given.out, given.model, backend, seed).exists()]
    if not left:
        return
    what = json.dumps([backend, backend == given.backends.split(",")[0], left])
    command = [sys.executable, "-m", "bench.agent", "--model", given.model, "--out", str(given.out), "--task", what]
    print(f"{backend}: {len(left)} films from {left[0][0]} on", file=sys.stderr, flush=True)
    subprocess.run(command, check=True, env={**environment(backend), **KEEP_MEMORY, "OMP_NUM_THREADS": "1"})


def run(out: Path, model: str, backend: str, seed: int, kind: str, passes: bool) -> None:
    """The agent's answer to a film's question, and that of one pass, where that is asked for."""
    from agent.act import Options, begin
    from agent.ask import Request
    from agent.entries import Result

    (out / "films").mkdir(parents=True, exist_ok=True)
    script, path = film(out, seed, kind, SECONDS)
    question = question_of(script)
    started = time.perf_counter()
    _, loop = begin(path, question.text, Options(model=model, backend=backend, dtype="float32"))
    entries = list(loop.ask(question.text))
    seconds = time.perf_counter() - started
    result = entries[-1]
    assert isinstance(result, Result)
    span = result.evidence[0].span if result.evidence else None
    said = {
        "kind": kind,
        "question": question.text,
        "truth": question.answer,
        "truth_span": question.span,
        "result": result.model_dump(mode="json"),
        "right": is_right(result.answer, question.answer),
        "overlaps": span is not None and question.span is not None and overlap(span, question.span) > 0,
        "seconds": seconds,
    }
    if passes:
        said |= passes_over(loop, Request([path], question.text, model, max_tokens=32), result.visual, question.answer)
    write_beside(file_of(out, model, backend, seed), json.dumps(said).encode())


def passes_over(loop: Loop, request: Request, visual: int, truth: str) -> dict[str, Any]:
    """What single passes over a film say, with as many visual tokens as the agent had, and with FEW."""
    said: dict[str, Any] = {}
    for name, most in (("once", visual), ("few", FEW)):
        text, tokens = pass_once(loop, request, most)
        said |= {name: text, f"{name}_right": is_right(text, truth), f"{name}_visual": tokens}
    return said


def pass_once(loop: Loop, request: Request, visual: int) -> tuple[str, int]:
    """The answer of one pass over a film with as many visual tokens, and how many it had."""
    from agent.ask import Answer
    from agent.phases import Phases
    from ivcore.prompt import build_inputs

    most = max(4, visual // PATCH_TOKENS * FRAMES_A_PATCH)
    inputs = build_inputs(
        loop.workspace.tokenizer, request.messages(), fps=most / SECONDS, max_frames=most, min_frames=most
    )
    passed = Answer(loop.workspace.model, loop.workspace.tokenizer, inputs, request, Phases())
    return "".join(passed), passed.visual_tokens


def lines(model: str, found: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """The page."""
    yield "# The agent on films of ten minutes\n"
    yield f"```\npython -m bench.agent --model {model}\n```\n"
    yield (
        "An event of three seconds in a film of ten minutes, asked about once; one pass has as many visual tokens as "
        f"the agent's whole run, its fresh looks included, or {FEW}, as many as the longest clips that iv3-tiny has "
        "learned to answer questions about. float32.\n"
    )
    yield "| | " + " | ".join(found) + " |\n|" + "---|" * (1 + len(found))
    rows: list[tuple[str, Any]] = [
        ("films with the event", lambda all_: len(_of(all_, "rare"))),
        ("agent: right", lambda all_: _share([each["right"] for each in _of(all_, "rare")])),
        (
            "one pass: right",
            lambda all_: _share([each["once_right"] for each in _of(all_, "rare") if "once_right" in each]),
        ),
        (
            f"one pass, {FEW} visual tokens: right",
            lambda all_: _share([each["few_right"] for each in _of(all_, "rare") if "few_right" in each]),
        ),
        ("agent: verified", lambda all_: _share([_verified(each) for each in _of(all_, "rare")])),
        ("of the verified: right", lambda all_: _share([each["right"] for each in all_ if _verified(each)])),
        ("films without it", lambda all_: len(_of(all_, "absent"))),
        ("agent: says not found", lambda all_: _share([_not_found(each) for each in _of(all_, "absent")])),
        ("turns, mean", lambda all_: f"{mean(each['result']['turns'] for each in all_):.1f}"),
        ("tokens read, mean", lambda all_: f"{mean(each['result']['prefilled'] for each in all_):,.0f}"),
        ("visual tokens, mean", lambda all_: f"{mean(each['result']['visual'] for each in all_):,.0f}"),
        ("seconds, mean", lambda all_: f"{mean(each['seconds'] for each in all_):.1f}"),
    ]
    for name, value in rows:
        yield f"| {name} | " + " | ".join(str(value(each)) for each in found.values()) + " |"


def kept(out: Path, model: str, backend: str, seed: int) -> dict[str, Any]:
    """What was found for a film."""
    content: dict[str, Any] = json.loads(file_of(out, model, backend, seed).read_text(encoding="utf-8"))
    return content


def file_of(out: Path, model: str, backend: str, seed: int) -> Path:
    """Where it is kept."""
    folder = out / "runs" / f"{_named(model)}-{backend}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{seed}.json"


@cache
def _named(model: str) -> str:
    return f"{Path(model).name}-{weights_digest(resolve(model))}"


def _of(found: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [each for each in found if each["kind"] == kind]


def _verified(each: dict[str, Any]) -> bool:
    return bool(each["result"]["status"] == "verified")


def _not_found(each: dict[str, Any]) -> bool:
    return bool(each["result"]["status"] == "not found")


def _share(values: Sequence[bool]) -> str:
    return f"{100 * mean(values):.1f} % ({sum(values)} of {len(values)})" if values else "-"


if __name__ == "__main__":
    try:
        main()
    except IvError as error:
        sys.exit(f"bench.agent: {error}")
