"""Films of the toy world with their questions, and what is so about their figures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from agent.oracle import dataset
from agent.workspace import Workspace
from train.row import Row, parse_row
from train.toyworld.questions import Question, ask
from train.toyworld.script import Script, seeds
from train.toyworld.words import DIRECTIONS


class Made:
    """A film of a kind, with its question and a workspace whose model nobody asks."""

    def __init__(self, folder: Path, kind: str, seed: int) -> None:
        (folder / "films").mkdir(exist_ok=True)
        self.folder, self.kind = folder, kind
        self.script, path = dataset.film(folder, seed, kind, 60.0)
        self.question = ask(self.script)
        self.workspace = Workspace(path, None, None)  # type: ignore[arg-type]

    @property
    def about(self) -> tuple[Script, Question, Workspace]:
        return self.script, self.question, self.workspace

    def row(self, raw: dict[str, Any], stage: str = "sft") -> Row:
        """The row as training reads it."""
        return parse_row(json.loads(json.dumps(raw)), self.folder, stage)  # type: ignore[arg-type]


def make_films(folder: Path) -> list[Made]:
    """One of every kind that the oracle acts on, of a minute each; two without an answer, one of them about a line."""
    (read,) = [each for each in seeds("train", 0, 40) if absent_read(each, True)][:1]
    (seen,) = [each for each in seeds("train", 0, 40) if absent_read(each, False)][:1]
    kinds = ["rare", "colour", "shape", "direction", "when", "said"]
    return [Made(folder, kind, number) for kind, number in zip(kinds, seeds("train", 7, 6), strict=True)] + [
        Made(folder, "absent", read), Made(folder, "absent", seen),
    ]  # fmt: skip


def absent_read(seed: int, read: bool) -> bool:
    """Whether the film of this seed is asked about a line that is not there, or about a figure."""
    return ask(dataset.make_script(seed, "absent", 60.0)).read == read


def in_parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def subject_of(claim: str) -> set[str]:
    """What tells the figure that a claim is about."""
    return set(re.split(" is | moves ", claim.removesuffix("."))[0].removeprefix("The ").split()) - {"figure"}


def holds(claim: str, figure: Any) -> bool:
    """Whether a claim about a figure is so, read word by word."""
    words = set(re.findall(r"[a-z]+", claim))
    if directions := words & set(DIRECTIONS):
        return directions == {figure.direction}
    return {figure.name.colour, figure.name.shape} <= words
