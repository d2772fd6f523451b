"""Clips of several figures at once, each of which goes its own way, told in a few words or asked about.

Which way a figure goes shows in two pictures of it at least. Where only one figure is there, what changes tells it;
where there are several, the same one has to be found twice, and that is learned from these.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from ivcore.files import write_beside
from train.toyworld.compose import still
from train.toyworld.dataset import clip_name, in_processes
from train.toyworld.questions import about
from train.toyworld.render import write_clip
from train.toyworld.script import Script, Split, random_of, seeds
from train.toyworld.turns import messages_of

_REQUEST = "Describe how the figures move."


def write_moves(folder: str | Path, split: Split, first: int, count: int, *, workers: int = 1) -> Path:
    """Write a clip for each of the seeds number first..first+count of a split, and two rows about each.

    Descriptions are in `folder`/`split`.jsonl, which is returned, questions beside it in talks.jsonl. workers: as of
    `dataset.write_dataset`.
    """
    folder = Path(folder)
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    rows = in_processes(partial(_write, folder), seeds(split, first, count), workers)
    for name, lines in zip(("talks", split), zip(*rows, strict=True), strict=True):
        write_beside(folder / f"{name}.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines).encode())
    return folder / f"{split}.jsonl"


def description(script: Script) -> dict[str, Any]:
    """A row about a script of `still`: its figures in an order of chance, each with its direction."""
    rng = random_of(script.seed, 14)
    listed = [script.figures[index] for index in rng.permutation(len(script.figures))]
    return _row(script, [(_REQUEST, "; ".join(f"{figure.name} {figure.direction}" for figure in listed))])


def talk(script: Script) -> dict[str, Any]:
    """As `description`, but every figure is asked about."""
    rng = random_of(script.seed, 15)
    listed = [script.figures[index] for index in rng.permutation(len(script.figures))]
    questions = [about(rng, "direction", figure) for figure in listed]
    return _row(script, [(question.text, question.answer) for question in questions])


def _row(script: Script, turns: list[tuple[str, str]]) -> dict[str, Any]:
    clip = {"type": "video", "video": clip_name(script)}
    messages = messages_of(turns, lambda asked: [clip, {"type": "text", "text": asked}])
    return {"messages": messages, "kind": "moves", "duration": script.duration, "seed": script.seed}


def _write(folder: Path, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows of a seed, its clip written unless it is there."""
    script = still(seed)
    if not (clip := folder / clip_name(script)).exists():
        write_clip(clip, script)
    return talk(script), description(script)
