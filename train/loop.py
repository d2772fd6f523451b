"""The loop: phases of steps, the schedule, metrics, checkpoints; the same for every stage and both backends.

Notable:
- A checkpoint holds the Trainer's state and where the data stands; going on from it gives the very bytes of a run that
  was never stopped, because nothing else is random.
- A loss or a gradient that is not a number, or a gradient far beyond those before it, stops the run with the step and
  the rows, before anything of it is saved.
- Several processes go through it side by side (see `train.processes`); only process 0 writes the run's folder.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from ivcore.backend import BackendName, load
from ivcore.errors import TrainingError
from ivcore.files import side_files, write_beside
from ivcore.hub import resolve
from ivcore.prompt import build_inputs
from ivcore.shards import write_checkpoint
from ivcore.tokenizer import Tokenizer
from train.clips import ClipCache
from train.distill import DistillStage, check_teachers, load_guides, teacher_framing
from train.environment import MakeEnvironment, Setting, SingleTurn
from train.evaluate import evaluate
from train.order import RowStream, joined
from train.processes import ALONE, Processes, agreed, join
from train.recipe import CptRecipe, DistillRecipe, Recipe, ResolvedPhase, RlRecipe, SftRecipe
from train.recipe_file import to_toml
from train.rl import PolicyStage, load_reference
from train.rollouts import prompt_budget
from train.rows import Rows, read_rows
from train.run_folder import EVALUATIONS, METRICS, RunFolder
from train.samples import Framing, SampleBuilder
from train.supervised import Supervised
from train.trainer import Trainer, Update, make_trainer

EXPLOSION = 100.0
"""A gradient of so many times the median norm of the steps before it stops the run."""

KNOWN_NORMS, LEAST_NORMS = 100, 20
"""Steps whose norms are remembered, and how many must be known to judge one."""

Progress = Callable[[int, int, Mapping[str, Any]], None]


class Stage(Protocol):
    """What a stage does in a step, and where it stands."""

    def step(self, trainer: Trainer, update: Update) -> dict[str, float]: ...
    def blame(self) -> str: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Job:
    """What `iv3 train` is told.

    model: a folder or id; data: a file of rows; held_out: one whose rows are asked and judged every `evaluate_every`
    steps and at the end; cache: a folder for decoded clips; environment: where rl's rollouts come from.
    """

    recipe: Recipe
    model: str
    data: str
    out: Path
    backend: BackendName = "auto"
    dtype: str | None = None
    cache: Path | None = None
    held_out: str | None = None
    environment: MakeEnvironment = SingleTurn


def train(job: Job, *, resume: bool = False, on_progress: Progress | None = None) -> RunFolder:
    """Run a stage to its end; returns the run's folder.

    on_progress(step, steps, metrics) is called after every step. Raises ConfigError, TrainingError or CheckpointError
    with one sentence. What torchrun or mlx.launch has started joins the others; process 0 alone calls on_progress, and
    where one process fails all do, the others with OtherProcessError.
    """
    processes = join(job.backend)
    recipe, folder, text = job.recipe, RunFolder(job.out), to_toml(job.recipe)
    with agreed(processes):
        path = resolve(job.model)
        rows = read_rows(job.data, recipe.stage)
        if not len(rows):
            raise TrainingError(f"{job.data} has no row to train on: {rows.summary()}")
        with open(job.data, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        about = {"stage": recipe.stage, "model": str(path.resolve())}
        about |= {"data": f"{Path(job.data).resolve()}, sha256 {digest}"}
        # Looked at before the model is loaded, which may take minutes.
        if processes.rank == 0:
            if resume:
                folder.check_same(text, about)
            else:
                folder.check_free()
        tokenizer = Tokenizer.from_dir(path)
        model = load(path, job.backend, job.dtype)
        about |= {"backend": model.backend, "dtype": model.dtype}
    started = processes.gather([text, digest, model.dtype])
    with agreed(processes):
        if any(each != started[0] for each in started):
            raise TrainingError("The processes were given different recipes, data or dtypes; start all with the same.")
        trainer = make_trainer(model, recipe, processes)
        for phase in recipe.plan():  # a mix that a later phase misspells is better known now
            RowStream(rows, phase.batch, seed=0, shares=phase.data.mix, rank=processes.rank, world=processes.world)
        if isinstance(recipe, DistillRecipe):
            check_teachers(recipe.teacher, rows.datasets)
        if processes.rank == 0:
            if resume:
                folder.check_same(text, about)
            else:
                folder.begin(text, about)
    return Loop(job, folder, rows, tokenizer, trainer, path, processes).run(on_progress)


class Loop:
    """One run from where its folder stands to its end."""

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        rows: Rows,
        tokenizer: Tokenizer,
        trainer: Trainer,
        base: Path,
        processes: Processes = ALONE,
    ) -> None:
        self.job, self.folder, self.rows, self.trainer, self.base = job, folder, rows, trainer, base
        self.processes, self._tokenizer = processes, tokenizer
        limit = int(job.recipe.data.cache_gib * 2**30)
        with agreed(processes):
            try:
                self._videos = ClipCache(job.cache or job.out / "clips", limit) if limit else None
            except OSError as error:
                raise TrainingError(f"The cache {job.cache} cannot be used ({error.strerror}).") from None
            self._held_out = read_rows(job.held_out, "rl") if job.held_out is not None else None
        self._listed = 0
        self._known: set[str] = set()
        self._norms: deque[float] = deque(maxlen=KNOWN_NORMS)

    def run(self, on_progress: Progress | None) -> RunFolder:
        recipe, steps = self.job.recipe, 0
        done, position = self._go_on()
        phases = recipe.plan()
        schedule = recipe.learning_rate.schedule(sum(phase.steps for phase in phases))
        total = sum(phase.steps for phase in phases)
        for number, phase in enumerate(phases):
            first, steps = steps, steps + phase.steps
            if done >= steps:
                continue
            with agreed(self.processes):
                stage = self._stage(phase, number)
                if done > first:
                    stage.load_state(position["data"])
            for step in range(max(done, first) + 1, steps + 1):
                metrics = self._step(stage, step, schedule(step - 1))
                self._list_rejected()
                self._log(METRICS, {"step": step, "phase": phase.name, **metrics})
                if step == total or (recipe.evaluate_every and step % recipe.evaluate_every == 0):
                    self._evaluate(step, phase)
                if step == total or (recipe.save_every and step % recipe.save_every == 0):
                    self._save(step, stage)
                if on_progress and self.processes.rank == 0:
                    on_progress(step, total, metrics)
        self._finish()
        return self.folder

    def _go_on(self) -> tuple[int, dict[str, Any]]:
        """Take up the last checkpoint, if there is one; returns the steps that are done, and its position."""
        saved = None
        with agreed(self.processes):
            if self.processes.rank == 0:
                saved = self.folder.last()
                listed = self.folder.path / "rejected.jsonl"
                if listed.exists():
                    self._known = set(listed.read_text(encoding="utf-8").splitlines())
        done, position = self.processes.gather((saved.step, saved.position) if saved else (0, {}))[0]
        if done:
            with agreed(self.processes):
                self.trainer.load_state(saved.state if saved else {})
            self._norms.extend(position["norms"])
        return done, position

    def _stage(self, phase: ResolvedPhase, number: int) -> Stage:
        data, job, recipe = phase.data, self.job, self.job.recipe
        framing = Framing(data.fps, data.min_frames, data.max_frames, data.frame_tokens, data.max_tokens)
        seed = recipe.seed + number
        if isinstance(recipe, CptRecipe | SftRecipe):
            return Supervised(recipe, phase, self.rows, self._builder(framing, self._tokenizer), seed, self.processes)
        framing = replace(framing, max_tokens=prompt_budget(data.max_tokens, recipe.rollout))
        builder = self._builder(framing, self._tokenizer)
        if isinstance(recipe, RlRecipe):
            reference = load_reference(recipe, self.trainer, self.base, job.backend, job.dtype)
            setting = Setting(recipe, phase, self.rows, builder, self._tokenizer, seed, self.processes)
            return PolicyStage(recipe, phase, job.environment(setting), reference, self.processes)
        shown = partial(self._builder, teacher_framing(recipe.teacher, framing))
        guides = load_guides(recipe, self.trainer, self.base, job.backend, job.dtype, self.rows.datasets, shown)
        return DistillStage(recipe, phase, self.rows, builder, guides, seed, self.processes)

    def _evaluate(self, step: int, phase: ResolvedPhase) -> None:
        if self._held_out is None:
            return
        data = phase.data
        framing = Framing(data.fps, data.min_frames, data.max_frames, data.frame_tokens)
        builder = self._builder(framing, self._tokenizer)
        with self.trainer.unsharded():
            found = evaluate(self.trainer.model, self._tokenizer, self._held_out, builder, processes=self.processes)
        self._log(EVALUATIONS, {"step": step, "phase": phase.name, **found.to_dict()})

    def _builder(self, framing: Framing, tokenizer: Tokenizer) -> SampleBuilder:
        return SampleBuilder(tokenizer, framing, partial(build_inputs, videos=self._videos))

    def _step(self, stage: Stage, step: int, learning_rate: float) -> dict[str, Any]:
        started = time.perf_counter()
        norms: list[float] = []

        def update() -> None:
            norms.append(self._guarded_apply(learning_rate, stage))

        try:
            metrics = stage.step(self.trainer, update)
        except TrainingError as error:
            last = self.folder.steps()
            kept = f"the last good checkpoint is that of step {last[-1]}" if last else "there is no checkpoint yet"
            raise TrainingError(f"Step {step} went wrong: {str(error).rstrip('.')}; {kept}.") from None
        seconds = time.perf_counter() - started
        return {
            **metrics,
            "learning_rate": learning_rate,
            "gradient_norm": max(norms, default=None),
            "seconds": round(seconds, 4),
            "tokens_per_second": round(metrics["tokens"] / seconds, 1),
            "peak_bytes": max(self.processes.gather(self.trainer.model.peak_bytes())),
        }

    def _guarded_apply(self, learning_rate: float, stage: Stage) -> float:
        with agreed(self.processes):
            try:
                norm = self.trainer.apply(learning_rate, self.job.recipe.optimizer.max_norm)
            except TrainingError as error:
                raise TrainingError(f"{str(error).rstrip('.')} ({self._blame(stage)})") from None
            if len(self._norms) >= LEAST_NORMS and norm > EXPLOSION * median(self._norms):
                usual = f"{median(self._norms):.3g}"
                raise TrainingError(f"the gradient of {self._blame(stage)} has norm {norm:.3g}, where {usual} is usual")
        self._norms.append(norm)
        return norm

    def _blame(self, stage: Stage) -> str:
        """The rows of the step, those of all processes, which all come to ask for them."""
        return ", ".join(self.processes.gather(stage.blame()))

    def _log(self, name: str, entry: Mapping[str, Any]) -> None:
        with agreed(self.processes):
            if self.processes.rank == 0:
                self.folder.log(name, entry)

    def _save(self, step: int, stage: Stage) -> None:
        def weights(folder: Path) -> None:
            if self.trainer.lora is not None:
                self.trainer.save_adapter(folder / "adapter")

        position = {"data": joined(self.processes.gather(stage.state())), "norms": list(self._norms)}
        with agreed(self.processes):
            state = self.trainer.state()
            if self.processes.rank == 0:
                self.folder.save(step, state, position, weights, self.job.recipe.keep)

    def _finish(self) -> None:
        """The result, where a user looks for it."""
        with agreed(self.processes), self.trainer.unsharded():
            if self.processes.rank == 0:
                self.folder.prune(self.job.recipe.keep)
                if self.trainer.lora is not None:
                    self.trainer.save_adapter(self.folder.path / "adapter")
                else:
                    write_model(self.trainer, self.base, self.folder.path / "model")
        self._list_rejected()

    def _list_rejected(self) -> None:
        """Append what is not listed yet, of all processes."""
        new = [rejected.__dict__ for rejected in self.rows.rejected[self._listed :]]
        self._listed = len(self.rows.rejected)
        found = [rejected for part in self.processes.gather(new) for rejected in part]
        with agreed(self.processes):
            for rejected in found:
                if self.processes.rank == 0 and (line := json.dumps(rejected)) not in self._known:
                    self._known.add(line)
                    self.folder.log("rejected.jsonl", rejected)


def write_model(trainer: Trainer, base: Path, folder: Path) -> None:
    """A fully trained checkpoint, with the tokenizer and the configs of the one it began from."""
    if not base.is_dir():
        raise TrainingError(f"{base} is gone, and with it the tokenizer of the model; put it back, and use --resume.")
    write_checkpoint(folder, trainer.model.config.to_dict(), trainer.specs(), trainer.tensors())
    for file in side_files(base):
        try:
            write_beside(folder / file.name, file.read_bytes())
        except OSError as error:
            raise TrainingError(f"{folder / file.name} cannot be written ({error.strerror}).") from None
