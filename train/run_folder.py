"""The folder of a run: its recipe, its metrics, and checkpoints from which it goes on.

    recipe.toml                 the recipe with every value
    run.json                    the model, the data, the backend: what `--resume` must find the same
    metrics.jsonl               a line a step; evaluations.jsonl, a line an evaluation; rejected.jsonl, unusable rows
    checkpoints/step-000100/    state.safetensors (weights, optimiser), position.json (data, step), adapter/
    adapter/ or model/          the result, when the run is done

A checkpoint is written beside and renamed, so the last good one survives a kill or a full disk. Who trains holds a lock
on the folder itself, so nothing more lies in it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakValueDictionary, finalize

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ivcore.errors import CheckpointError, TrainingError
from ivcore.files import write_beside

RECIPE, RUN, METRICS, CHECKPOINTS = "recipe.toml", "run.json", "metrics.jsonl", "checkpoints"
EVALUATIONS = "evaluations.jsonl"
STATE, POSITION = "state.safetensors", "position.json"
_CHECKPOINT = re.compile(r"step-\d{6,}")


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from: a Trainer's state, and where the data stood after `step` steps."""

    step: int
    state: dict[str, np.ndarray]
    position: dict[str, Any]


class RunFolder:
    """One run's files; TrainingError with one sentence for a folder that cannot be used.

    From the first check on, a folder that exists is this process's: another one that comes to train in it is refused.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: _Lock | None = None

    def begin(self, recipe: str, about: Mapping[str, Any]) -> None:
        """Make the folder of a new run."""
        self.check_free()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.check_free()  # Another process may have come in between; from here on none can.
            (self.path / CHECKPOINTS).mkdir(exist_ok=True)
            self._write(RECIPE, recipe)
            self._write(RUN, json.dumps(dict(about), indent=1) + "\n")
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be written ({error.strerror}); check the path.") from None

    def check_free(self) -> None:
        """TrainingError where something else is there than what a run leaves that was killed as it began."""
        if not self.path.exists():
            return
        begun = {CHECKPOINTS, RECIPE, f"{RECIPE}.part", f"{RUN}.part"}
        if self.path.is_dir():
            self._hold()
        if not self.path.is_dir() or {file.name for file in self.path.iterdir()} - begun:
            raise TrainingError(f"{self.path} exists already; go on with --resume, or name another folder.")

    def check_same(self, recipe: str, about: Mapping[str, Any]) -> None:
        """Whether this run was begun with the same recipe, model and data; names the first difference."""
        if not (self.path / RUN).exists():
            raise TrainingError(f"{self.path} is not the folder of a run; leave --resume out to begin one.")
        self._hold()
        try:
            then = json.loads((self.path / RUN).read_text(encoding="utf-8"))
            before = tomllib.loads((self.path / RECIPE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TrainingError(f"{self.path} is damaged: {RUN} or {RECIPE} cannot be read ({error}).") from None
        for name, value in about.items():
            if then.get(name) != value:
                raise TrainingError(
                    f"{self.path} was begun with {name} {then.get(name)!r}, not {value!r}; resume with the same."
                )
        now, before = _flat(tomllib.loads(recipe)), _flat(before)
        for name in sorted({*now, *before}):
            if now.get(name) != before.get(name):
                was, new = (json.dumps(each.get(name), default=str) for each in (before, now))
                raise TrainingError(f"{self.path} was begun with {name} {was}, not {new}; resume with the same recipe.")

    def log(self, name: str, entry: Mapping[str, Any]) -> None:
        """Append a line to a JSONL file; a number that is not finite is null."""
        line = json.dumps({key: _finite(value) for key, value in entry.items()}) + "\n"
        try:
            with (self.path / name).open("a", encoding="utf-8") as stream:
                stream.write(line)
        except OSError as error:
            raise TrainingError(f"{self.path / name} cannot be written ({error.strerror}).") from None

    def save(
        self, step: int, state: Mapping[str, np.ndarray], position: Mapping[str, Any], write_weights: Any, keep: int
    ) -> None:
        """Write a checkpoint and remove all but the last `keep`. write_weights(folder) adds what a user would load."""
        folder = self._checkpoint(step)
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir(parents=True)
            save_file({name: np.asarray(array, order="C") for name, array in state.items()}, part / STATE)
            write_weights(part)
            (part / POSITION).write_text(json.dumps({"step": step, **position}), encoding="utf-8")
            _sync(part)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(part, folder)
        except (OSError, SafetensorError, CheckpointError) as error:
            shutil.rmtree(part, ignore_errors=True)
            last = self.steps()
            kept = f"the last good checkpoint is {self._checkpoint(last[-1]).name}" if last else "there is none before"
            reason = getattr(error, "strerror", None) or str(error).rstrip(".")
            raise TrainingError(f"The checkpoint of step {step} cannot be written ({reason}); {kept}.") from None
        self.prune(keep)

    def prune(self, keep: int) -> None:
        """Remove all checkpoints but the last `keep`."""
        for old in self.steps()[:-keep]:
            # Renamed first: half removed, it must not look like a checkpoint.
            gone = self._checkpoint(old).with_suffix(".part")
            os.rename(self._checkpoint(old), gone)
            shutil.rmtree(gone, ignore_errors=True)

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are whole, ascending."""
        folder = self.path / CHECKPOINTS
        names = (file.parent.name for file in folder.glob(f"step-*/{POSITION}"))
        return sorted(int(name.removeprefix("step-")) for name in names if _CHECKPOINT.fullmatch(name))

    def last(self) -> Checkpoint | None:
        """The newest checkpoint; what was logged after it is forgotten, since it will be done again."""
        for part in (self.path / CHECKPOINTS).glob("step-*.part"):
            shutil.rmtree(part, ignore_errors=True)
        steps = self.steps()
        if not steps:
            self._forget_after(0)
            return None
        folder = self._checkpoint(steps[-1])
        try:
            state, position = load_file(folder / STATE), json.loads((folder / POSITION).read_text(encoding="utf-8"))
            if not isinstance(position, dict) or not {"step", "data", "norms"} <= position.keys():
                raise ValueError(f"{POSITION} lacks values")
        except (SafetensorError, ValueError, OSError) as error:
            raise TrainingError(
                f"{folder} is damaged ({error}); remove it to go on from an earlier checkpoint."
            ) from None
        self._forget_after(steps[-1])
        return Checkpoint(steps[-1], state, position)

    def _forget_after(self, step: int) -> None:
        for file in self.path.glob("*.jsonl"):
            lines = file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if (found := _object(line)) is not None and found.get("step", 0) <= step]
            self._write(file.name, "".join(f"{line}\n" for line in kept))

    def _hold(self) -> None:
        try:
            self._lock = _Lock.on(self.path)
        except BlockingIOError:
            raise TrainingError(f"Another process is training in {self.path}; wait for it, or name another.") from None

    def _checkpoint(self, step: int) -> Path:
        return self.path / CHECKPOINTS / f"step-{step:06d}"

    def _write(self, name: str, text: str) -> None:
        write_beside(self.path / name, text.encode())


class _Lock:
    """A lock on a folder, which this process has until nothing refers to it or the process ends.

    It is the process's and not the object's: a run that was stopped may go on in the same process while something, such
    as a traceback, still refers to the first one's folder.
    """

    _held: ClassVar[WeakValueDictionary[tuple[int, int], _Lock]] = WeakValueDictionary()

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        finalize(self, os.close, descriptor)

    @classmethod
    def on(cls, folder: Path) -> _Lock:
        """Lock a folder; BlockingIOError when another process has."""
        lock = cls(os.open(folder, os.O_RDONLY))
        found = os.fstat(lock._descriptor)
        held = cls._held.get((found.st_dev, found.st_ino))
        if held is not None:
            return held
        try:
            fcntl.flock(lock._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass  # A file system without locks, as some over a network: nobody is kept from training for that.
        cls._held[found.st_dev, found.st_ino] = lock
        return lock


def _flat(table: Any, prefix: str = "") -> dict[str, Any]:
    """Every value by its dotted key."""
    items = table.items() if isinstance(table, dict) else enumerate(table)
    found: dict[str, Any] = {}
    for key, value in items:
        nested = isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict))
        found |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def _object(line: str) -> dict[str, Any] | None:
    """What a line says; None where it was cut off."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
