"""Clips and JSONL rows on disk: a function of split, numbers and shares, so what is already there is not made again.

A row has the messages of a question and its answer in the form that `ask` and `build_inputs` take, the clip's path
relative to the JSONL's folder, and what a verifiable reward needs: `choices` and the right one's index as `answer`, or
a `span`.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ivcore.files import write_beside
from train.toyworld.compose import KINDS, make_script
from train.toyworld.questions import Question, ask, kinds_of
from train.toyworld.render import write_clip
from train.toyworld.script import SHORT_SECONDS, WORLD_VERSION, Script, Split, random_of, seeds
from train.toyworld.subtitles import transcript

T = TypeVar("T")

# Without "before_after", the new kind of question to be learned later, "rare", which takes a long clip, and "absent".
BASE_SHARES: Mapping[str, float] = {
    "colour": 0.13,
    "shape": 0.17,
    "direction": 0.17,
    "count": 0.13,
    "order": 0.17,
    "when": 0.17,
    "said": 0.06,
}
LONG_SHARES: Mapping[str, float] = {**{kind: 0.9 * share for kind, share in BASE_SHARES.items()}, "rare": 0.1}


def write_dataset(
    folder: str | Path,
    split: Split,
    first: int,
    count: int,
    *,
    shares: Mapping[str, float] = BASE_SHARES,
    duration: float = SHORT_SECONDS,
    all_kinds: bool = False,
    workers: int = 1,
) -> Path:
    """Write clips number first..first+count of a split and their rows; returns the JSONL, `folder`/`split`.jsonl.

    shares: of the kinds of question, in any unit. duration: of every clip, in seconds. all_kinds: a row for every kind
        that a clip answers, not only for the one it was made for. workers: processes that render; they are spawned, so
        the main module must be safe to import.
    The JSONL is replaced when all clips are there; clips that an earlier call left are kept.
    """
    folder = Path(folder)
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    rows = in_processes(partial(_write_rows, folder, shares, duration, all_kinds), seeds(split, first, count), workers)
    file = folder / f"{split}.jsonl"
    write_beside(file, "".join(rows).encode())
    return file


def in_processes(make: Callable[[int], T], seeds: Sequence[int], workers: int) -> list[T]:
    """What `make` makes of each seed, in their order."""
    if workers == 1:
        return [make(seed) for seed in seeds]
    # A forked child of a process with threads may hang.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(make, seeds, chunksize=16))


def write_about(
    file: Path, make: Callable[[Script], dict[str, Any] | None], split: Split, first: int, count: int, *,
    shares: Mapping[str, float], duration: float,
) -> None:  # fmt: skip
    """Write the rows that `make` makes of the scripts behind a data set, at most one a clip; beside its JSONL."""
    rows = (make(make_script(seed, kind_of(seed, shares), duration)) for seed in seeds(split, first, count))
    write_beside(file, "".join(f"{json.dumps(row)}\n" for row in rows if row is not None).encode())


def write_of_seeds(file: Path, make: Callable[[int], dict[str, Any]], split: Split, first: int, count: int) -> Path:
    """Write the row that `make` makes of each of the seeds number first..first+count of a split; returns the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_beside(file, "".join(f"{json.dumps(make(seed))}\n" for seed in seeds(split, first, count)).encode())
    return file


def kind_of(seed: int, shares: Mapping[str, float]) -> str:
    """The kind of question that a seed gets."""
    weights = np.array(list(shares.values()), float)
    if not set(shares) <= set(KINDS) or not weights.sum() > 0 or weights.min() < 0:
        raise ValueError(f"{dict(shares)!r} are not shares of the kinds {KINDS}")
    return str(random_of(seed, 2).choice(list(shares), p=weights / weights.sum()))


def row(script: Script, question: Question, clip: str) -> dict[str, Any]:
    """The JSONL's object for a question about a script whose clip is at the path `clip`.

    What is to be read is quoted before the question. `evidence` is where the answer is to be seen or read.
    """
    text = f"Subtitles:\n{transcript(script.lines)}\n\n{question.text}" if question.read else question.text
    content = [{"type": "video", "video": clip}, {"type": "text", "text": text}]
    made: dict[str, Any] = {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": question.answer}],
        "kind": question.kind,
    }
    if question.choices:
        made |= {"choices": question.choices, "answer": question.choices.index(question.answer)}
    elif question.span is not None:
        made["span"] = question.span
    return {**made, "evidence": question.span, "duration": script.duration, "seed": script.seed}


def clip_name(script: Script) -> str:
    """Where a script's clip lies, beside its rows."""
    return f"clips/v{WORLD_VERSION}-{script.seed:07}-{script.kind}-{script.duration:g}s.mp4"


def _write_rows(folder: Path, shares: Mapping[str, float], duration: float, all_kinds: bool, seed: int) -> str:
    """The rows of a seed, a line each, its clip written unless it is there."""
    script = make_script(seed, kind_of(seed, shares), duration)
    clip = clip_name(script)
    if not (folder / clip).exists():
        write_clip(folder / clip, script)
    kinds = kinds_of(script) if all_kinds else (script.kind,)
    return "".join(f"{json.dumps(row(script, ask(script, kind), clip))}\n" for kind in kinds)
