"""What `iv3 train plot` draws: the curves that runs have, and which of them share a panel; the drawing: `train.plot`.

- Of one run, what belongs together shares a panel (rewards by kind, held-out kinds of question). Of several runs, each
  of these has a panel of its own.
- A smoothed curve is a mean over the steps after a place as well as before it, so it does not lag behind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ivcore.errors import TrainingError
from train.rewards import RewardKind
from train.run_folder import EVALUATIONS, METRICS, RUN

PLACES = 400
"""At most so many of a smoothed curve."""

HELD_OUT = "held out"
"""The panel of evaluations; the key of a kind is this, a colon and its name."""


@dataclass(frozen=True)
class Panel:
    """What is drawn together: the name of each curve by its key in the metrics.

    scale: what values are multiplied with. zero: the axis begins there; top: where it ends. log: it may be logarithmic.
    smooth: values jump about, so that a mean says more. dots: they are few, and marked.
    """

    title: str
    curves: dict[str, str]
    scale: float = 1.0
    zero: bool = False
    top: float | None = None
    log: bool = False
    smooth: bool = True
    dots: bool = False


PANELS = (
    Panel("loss", {"loss": ""}, log=True),
    Panel("reward", {"reward": "all", **{f"reward_{kind}": kind for kind in get_args(RewardKind)}}),
    Panel(HELD_OUT, {}, zero=True, top=1.0, smooth=False, dots=True),
    Panel("KL (nats)", {"kl": "", "forward_kl": "forward"}, log=True),
    Panel("entropy (nats)", {"entropy": ""}, zero=True),
    Panel("gradient norm", {"gradient_norm": ""}, log=True),
    Panel("learning rate", {"learning_rate": ""}, zero=True, smooth=False),
    Panel("tokens of an answer", {"answer_tokens": "mean", "longest_answer": "longest"}, zero=True),
    Panel("shares", {"cut_off": "answers cut off", "clipped": "tokens clipped"}, zero=True),
    Panel("groups without spread", {"skipped_groups": ""}, zero=True),
    Panel("tokens a step", {"tokens": ""}, zero=True),
    Panel("tokens a second", {"tokens_per_second": ""}, zero=True),
    Panel("peak memory (GiB)", {"peak_bytes": ""}, scale=2.0**-30, zero=True, smooth=False),
)


@dataclass(frozen=True)
class Run:
    """What a run's folder says. curves: steps (n,) and values (n,) by key; phases: names, each with its last step."""

    name: str
    about: dict[str, str]
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    phases: tuple[tuple[str, int], ...]

    @property
    def last(self) -> int:
        return self.phases[-1][1]


def read_run(folder: Path, name: str) -> Run:
    """The metrics and evaluations of a run, which may still be going on; TrainingError where there are none."""
    entries = _entries(folder / METRICS)
    if not entries:
        raise TrainingError(f"{folder} has no {METRICS} with a step in it; name the folder of a run that has begun.")
    found: dict[str, list[tuple[int, float]]] = {}
    phases: list[tuple[str, int]] = []
    for entry in entries:
        phase = str(entry.get("phase", ""))
        if phases and phases[-1][0] == phase:
            phases.pop()
        phases.append((phase, entry["step"]))
        _collect(found, entry["step"], entry)
    for entry in _entries(folder / EVALUATIONS):
        kinds = {f"{HELD_OUT}: {kind}": of["value"] for kind, of in entry["kinds"].items()}
        mean = {f"{HELD_OUT}: mean": entry["mean"]} if len(kinds) > 1 else {}
        _collect(found, entry["step"], mean | kinds)
    curves = {}
    for key, points in found.items():
        steps, values = zip(*points, strict=True)
        curves[key] = np.array(steps), np.array(values, np.float64)
    return Run(name, _about(folder), curves, tuple(phases))


def _entries(file: Path) -> list[dict[str, Any]]:
    """The lines that say a step; the last one may be half written."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            found.append(entry)
    return found


def _collect(found: dict[str, list[tuple[int, float]]], step: int, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, int | float):
            found.setdefault(key, []).append((step, value))


def _about(folder: Path) -> dict[str, str]:
    try:
        about = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: str(value) for key, value in about.items()} if isinstance(about, dict) else {}


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of different paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    ends = (["/".join(each[-length:]) for each in parts] for length in range(1, max(map(len, parts)) + 1))
    return next(names for names in ends if len(set(names)) == len(names))


def panels_of(runs: Sequence[Run]) -> Iterator[Panel]:
    """The panels for which a run has values; of several runs, each with one curve."""
    keys = list(dict.fromkeys(key for run in runs for key in run.curves))
    held_out = {key: key.removeprefix(f"{HELD_OUT}: ") for key in keys if key.startswith(HELD_OUT)}
    for panel in PANELS:
        named = held_out if panel.title == HELD_OUT else panel.curves
        curves = {key: name for key, name in named.items() if key in keys}
        if len(runs) == 1 and len(curves) > 1:
            yield replace(panel, curves=curves)
            continue
        for key, name in curves.items():
            yield replace(panel, title=f"{panel.title}: {name}" if name else panel.title, curves={key: name})


def smooth(steps: np.ndarray, values: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Some of the steps (m,), the first and the last among them, and there the means of values (n,).

    A Gaussian that is `width` steps wide weighs neighbours; steps (n,) ascend and may have gaps.
    """
    places = steps[np.linspace(0, len(steps) - 1, min(PLACES, len(steps))).round().astype(int)]
    means = np.empty(len(places))
    for number, place in enumerate(places):
        near = slice(np.searchsorted(steps, place - 3 * width), np.searchsorted(steps, place + 3 * width, side="right"))
        weights = np.exp(-0.5 * ((steps[near] - place) / width) ** 2)
        means[number] = weights @ values[near] / weights.sum()
    return places, means
