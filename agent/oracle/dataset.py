"""Films of the toy world and what there is to learn from each: a run, windows to find it in, claims to check, and for
rl the question by itself.

    python -m agent.oracle.dataset OUT [--films 1200] [--longest-films 240]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from agent.answering import offered
from agent.oracle.rows import FILMS, OF_A_FILM, OF_A_LONGEST, claims_of, question_of, windows_of
from agent.oracle.runs import FOLLOW_UPS, Oracle
from agent.tools.box import NAMES
from agent.workspace import Workspace
from ivcore.files import write_beside
from train.toyworld.compose import make_script
from train.toyworld.dataset import kind_of
from train.toyworld.questions import ask
from train.toyworld.render import write_clip
from train.toyworld.script import Script, Split, pick, random_of, seeds

SHARES: Mapping[str, float] = {
    "rare": 0.35, "colour": 0.08, "shape": 0.08, "direction": 0.09, "when": 0.1, "said": 0.15, "absent": 0.15,
}  # fmt: skip
DURATIONS = (60.0, 60.0, 90.0, 90.0, 120.0, 180.0, 300.0)
"""Seconds of the films to learn from, each as frequent as it stands here; short ones are made sooner."""

LONGEST, LONGEST_SHARES = 600.0, {"rare": 0.25, "said": 0.3, "absent": 0.45}
"""Seconds of the longest films, whose transcripts fill a run; most have something to read, or to miss."""

FIRST, FILMS_TO_LEARN_FROM, LONGEST_FILMS = 200_000, 1_200, 240
"""Number of the first film among the training seeds, and how many there are; the longest come behind them."""

LONGEST_FOLDER = "longest"
"""The folder of what is made of the longest films, beside the rows of the others."""

FILES = ("runs", "windows", "claims", "questions")
"""What there is of a film; `questions` are the rows of `environment.Acting`."""


def write_acts(
    folder: str | Path, split: Split, first: int, count: int, *, longest: bool = False, workers: int = 1
) -> dict[str, Path]:
    """Render films number first..first+count of a split and write a JSONL for each of FILES.

    Films that an earlier call left are kept. longest: of LONGEST seconds, with runs of two questions, for which there
    is room.
    """
    folder = Path(folder)
    (folder / FILMS).mkdir(parents=True, exist_ok=True)
    make = partial(_rows, folder, longest)
    # A forked child of a process with threads may hang.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        made = list(pool.map(make, seeds(split, first, count), chunksize=4))
    files = {}
    for name in FILES:
        files[name] = folder / f"{name}.jsonl"
        write_beside(files[name], "".join(line for rows in made for line in rows[name]).encode())
    return files


def film(folder: Path, seed: int, kind: str, duration: float) -> tuple[Script, Path]:
    """A film's script and its file, rendered unless it is there."""
    script = make_script(seed, kind, duration)
    path = folder / FILMS / f"{seed:07}-{kind}-{duration:g}s.mp4"
    if not path.exists():
        write_clip(path, script)
    return script, path


def _rows(folder: Path, longest: bool, seed: int) -> dict[str, list[str]]:
    duration = LONGEST if longest else pick(random_of(seed, 5), DURATIONS)
    script, path = film(folder, seed, kind_of(seed, LONGEST_SHARES if longest else SHARES), duration)
    question = ask(script)
    workspace = Workspace(path, None, None)  # type: ignore[arg-type]  # nothing here asks a model
    drawn = OF_A_LONGEST if longest else OF_A_FILM
    about, by_chance = (script, question, workspace), [random_of(seed, 5, number) for number in (1, 2, 3)]
    rows: dict[str, list[dict[str, Any]]] = {
        "runs": [_run(Oracle(*about, by_chance[0]), script, 1 if longest else FOLLOW_UPS)],
        "windows": list(windows_of(*about, by_chance[1], drawn)),
        "claims": list(claims_of(*about, by_chance[2], drawn)),
        "questions": [question_of(*about)],
    }
    return {name: [f"{json.dumps({**row, 'seed': seed})}\n" for row in each] for name, each in rows.items()}


def _run(oracle: Oracle, script: Script, follow_ups: int) -> dict[str, Any]:
    messages = oracle.run(follow_ups)
    for part in (part for message in messages if isinstance(message["content"], list) for part in message["content"]):
        if part["type"] == "video":
            part["video"] = f"{FILMS}/{Path(part['video']).name}"
    shown = offered(oracle.workspace, NAMES if oracle.has_library else None)
    return {"messages": messages, "tools": shown, "kind": f"run {script.kind}", "duration": script.duration}


def main() -> None:
    """Write the films and rows to learn from."""
    parser = argparse.ArgumentParser(description="Render films and write what there is to learn from each.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--films", type=int, default=FILMS_TO_LEARN_FROM)
    parser.add_argument("--longest-films", type=int, default=LONGEST_FILMS)
    given = parser.parse_args()
    workers = os.cpu_count() or 1
    write_acts(given.out, "train", FIRST, given.films, workers=workers)
    behind = FIRST + FILMS_TO_LEARN_FROM
    write_acts(given.out / LONGEST_FOLDER, "train", behind, given.longest_films, longest=True, workers=workers)


if __name__ == "__main__":
    main()
