"""`convert_attention`: a Qwen3-VL checkpoint with grouped-query attention becomes one with M2LA, all or nothing.

Calibration goes layer by layer and leaves a file each; then the cache is spent over the layers, the shards are written,
and the result is measured beside its source before it takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from convert.m2la.budget import spend, uniform
from convert.m2la.calibrate import calibrate
from convert.m2la.evaluate import compare_models
from convert.m2la.options import Options
from convert.m2la.plan import AttentionPlan, make_plan
from convert.m2la.search import Choice
from convert.m2la.sensitivity import sensitivities
from convert.m2la.work import Work
from convert.m2la.write import Writer, layer_report
from convert.place import Place, clear, reason_of, sync
from convert.plan import DEFAULT_SHARD_BYTES
from convert.record import RECORD, Journal, Record, to_json, write_hashed
from convert.run import copy_side_files
from convert.source import open_source
from ivcore.backend import choose
from ivcore.errors import CheckpointError, IvError
from ivcore.inputs import ModelInputs
from ivcore.shards import INDEX, index_of

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def convert_attention(
    source: str | Path,
    target: str | Path,
    options: Options,
    calibration: Sequence[ModelInputs],
    held_out: Sequence[ModelInputs] | None = None,
    *,
    backend: str = "auto",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    resume: bool = False,
    force: bool = False,
    on_plan: Callable[[AttentionPlan], None] | None = None,
    on_progress: Progress | None = None,
) -> Record:
    """Write the checkpoint with M2LA to `target`; returns what conversion.json says, the report on the cost included.

    source: a folder or a Hugging Face id (`@revision`), grouped-query, in float. calibration: prompts of the kind that
    the model is for, text and media; held_out: others that the result is measured on, every fifth of them by default.
    backend: runs the source's layers. resume, force: as in `convert.run.convert`; a run that was stopped goes on with
    the first layer that was not finished.

    Raises ConfigError, PromptError, BackendError or CheckpointError, before anything is written where the cause can be
    known then.
    """
    place = Place(target)
    plan = make_plan(open_source(source), options, calibration, held_out, choose(backend), shard_bytes)
    request = plan.request()
    place.check_apart_from([plan.source.path])
    if done := place.check(request, resume, force):
        return done
    place.check_room(plan.nbytes)
    if on_plan:
        on_plan(plan)
    with place.locked():
        place.check_again(force)
        if not (resume and place.part_is_whole(request)):
            _write(plan, place, request, resume, on_progress)
        return place.install(force)


def choose_layers(plan: AttentionPlan, work: Work, weights: Sequence[float]) -> list[Choice]:
    """What every layer becomes; weights: of the layers' errors."""
    layers = [work.layer(layer)[2] for layer in range(len(weights))]
    if plan.spends:
        return spend(layers, plan.width * len(layers), weights)
    return uniform(layers, plan.width, weights)


def _weigh_layers(plan: AttentionPlan, work: Work, on_progress: Progress | None) -> list[float]:
    """How much each layer's error matters; 1 where the cache is not spent by it."""
    if not plan.spends:
        return [1.0] * plan.source.config.text.num_hidden_layers
    if (known := work.sensitivities()) is not None:
        return known
    if on_progress:
        on_progress("weighing layers", 0, 1)
    weights = sensitivities(plan)
    work.write_sensitivities(weights)
    return weights


def _write(
    plan: AttentionPlan, place: Place, request: dict[str, Any], resume: bool, on_progress: Progress | None
) -> None:
    """Everything into the folder beside the target."""
    journal = Journal(place.part)
    lengths = [len(prompt.visual) for prompt in plan.calibration]
    work = Work(place.part, plan.source.config.text.hidden_size, lengths)
    try:
        if not resume or not journal.exists():
            clear(place.part)
        journal.begin(request, {file.name: plan.source.stats[file].st_mtime_ns for file in plan.source.shards})
    except OSError as error:
        place.leave_nothing()
        raise CheckpointError(f"{place.part} cannot be written ({reason_of(error)}); nothing was kept.") from None
    try:
        journal.forget_damaged()
        calibrate(plan, work, on_progress)
        weights = _weigh_layers(plan, work, on_progress)
        chosen = choose_layers(plan, work, weights)
        writer = Writer(plan, work, chosen, journal)
        writer.run(on_progress)
        files = _write_small_files(plan, place.part, writer)
        if on_progress:
            on_progress("comparing", 0, 1)
        report = _report(
            plan, chosen, weights, compare_models(plan.source.path, place.part, plan.held_out, plan.backend)
        )
        _finish(place.part, work, Record(request, journal.sources, journal.shards, files, report), journal)
    except OSError as error:
        kept = _keep(place, work)
        advice = f"once that is mended, go on with --resume from the layers in {place.part}" if kept else (
            "nothing was kept"
        )  # fmt: skip
        raise CheckpointError(f"{place.folder} cannot be written ({reason_of(error)}); {advice}.") from None
    except IvError:
        place.leave_nothing()
        raise
    except BaseException:
        _keep(place, work)
        raise


def _write_small_files(plan: AttentionPlan, part: Path, writer: Writer) -> dict[str, str]:
    """config.json, the index and what lies beside weights; file name -> SHA-256."""
    files = {"config.json": write_hashed(part / "config.json", to_json(writer.config))}
    if len(writer.shards) > 1:
        files[INDEX] = write_hashed(part / INDEX, to_json(index_of(writer.shards)))
    return files | copy_side_files(plan.source, part)


def _report(
    plan: AttentionPlan, chosen: Sequence[Choice], weights: Sequence[float], model: dict[str, Any]
) -> dict[str, Any]:
    before, _ = plan.cache_bytes()
    full = plan.source.config.text.geometry.gqa_cache_width * len(chosen)
    after = sum(choice.width for choice in chosen)
    return {
        "cache_bytes_per_token": {"source": before, "converted": before * after // full},
        "model": model,
        "layers": [
            layer_report(layer, choice, weight)
            for layer, (choice, weight) in enumerate(zip(chosen, weights, strict=True))
        ],
    }


def _finish(part: Path, work: Work, record: Record, journal: Journal) -> None:
    write_hashed(part / RECORD, to_json(record.to_dict()))
    work.clear()
    sync(part)
    journal.remove()
    sync(part)


def _keep(place: Place, work: Work) -> bool:
    """Keep what a later run can use."""
    kept = work.begun()
    if not kept:
        place.leave_nothing()
    return kept
