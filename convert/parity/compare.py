"""`compare`: the runs one after the other on one prompt, each beside the first, and a report on all of them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from convert.parity.findings import comparison
from convert.parity.plan import plan_runs
from convert.parity.points import Point, points
from convert.parity.probe import build, same_text
from convert.parity.record import Recording
from convert.parity.report import Comparison, ParityError, PromptSize, Report
from convert.parity.run import Prompt, Run, Tick, greedy, record, run_forced, run_freely
from ivcore.backend import Model
from ivcore.config import ModelConfig
from ivcore.errors import CheckpointError
from ivcore.inputs import ModelInputs
from ivcore.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

TEXT_POSITIONS, VISUAL_POSITIONS = 768, 256
"""Most positions of each kind whose logits are compared: with a vocabulary of 152k, 0.6 GB on disk."""


def compare(
    a: str | Path,
    b: str | Path | None = None,
    *,
    backends: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    video: str | Path | None = None,
    question: str | None = None,
    inputs: ModelInputs | None = None,
    tokens: int = 16,
    work_dir: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Report:
    """Compare runs of a model layer by layer on one prompt; the first of them is the reference of all others.

    a, b: folders or Hugging Face ids. The runs are every folder on each of `backends` ("mlx", "torch") in each of
        `dtypes` ("float32", "bfloat16", "float16"). By default one folder runs on both backends, two folders on the one
        that suits the machine, each in the dtype that it is stored in.
    video, question: a video or image file and what to ask; the built-in probe without them, or `inputs` as they are.
    tokens: greedy steps after the prompt.
    work_dir: where the reference's activations go until the end; None is the system's folder for temporary files.
    on_progress: called with words for what is done now, and done and total counts of it.

    Raises ParityError (nothing to compare, no room on disk), CheckpointError (folders that do not load or are not of
    one body), BackendError, PromptError, MediaError or ConfigError.
    """
    runs = plan_runs(a, b, backends, dtypes)
    reference = runs[0]
    source, stop_ids = "inputs", frozenset[int]()
    if inputs is None:
        source = "probe" if video is None else str(video)
        inputs, messages = build(reference.folder, video, question)
        stop_ids = Tokenizer.from_dir(reference.folder).stop_ids
        _check_tokenizers(runs, messages)
    prompt = make_prompt(inputs, reference.config)
    with tempfile.TemporaryDirectory(prefix="iv3-parity-", dir=work_dir) as folder:
        comparisons = _run_all(runs, prompt, tokens, stop_ids, Path(folder), on_progress)
    size = PromptSize(source, len(prompt.visual), int(prompt.visual.sum()))
    return Report(reference.name, size, tuple(comparisons))


def make_prompt(inputs: ModelInputs, config: ModelConfig) -> Prompt:
    """The prompt with the positions whose logits are compared: of each kind all, or as many as it may have, evenly.

    Raises PromptError where the inputs do not fit the model.
    """
    inputs.check(config)
    visual = np.isin(inputs.token_ids, (config.image_token_id, config.video_token_id))
    chosen = [
        places[np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(int)]
        for places, most in ((np.flatnonzero(~visual), TEXT_POSITIONS), (np.flatnonzero(visual), VISUAL_POSITIONS))
    ]
    return Prompt(inputs, visual, np.sort(np.concatenate(chosen)))


def _check_tokenizers(runs: Sequence[Run], messages: Sequence[Mapping[str, Any]]) -> None:
    reference = runs[0]
    for run in runs[1:]:
        if run.folder != reference.folder and not same_text(reference.folder, run.folder, messages):
            raise CheckpointError(
                f"{reference.model} and {run.model} make other tokens of the same text, so they cannot be compared; "
                "copy tokenizer.json and the chat template from one to the other."
            )


def _run_all(
    runs: Sequence[Run],
    prompt: Prompt,
    tokens: int,
    stop_ids: frozenset[int],
    folder: Path,
    on_progress: Progress | None,
) -> list[Comparison]:
    """One run after the other; the activations of the first go to `folder`."""
    reference, recording = runs[0], Recording(folder)
    rows = _rows(prompt, reference.config)
    passing = sum(rows.values())
    _check_room(folder, sum(4 * count * point.width for point, count in rows.items()))

    def ticker(number: int, what: str, total: int) -> Tick:
        run = runs[number]
        return _ticker(on_progress, f"run {number + 1} of {len(runs)}, {run.backend} {run.dtype}: {what}", total)

    def read_reference(model: Model) -> tuple[frozenset[int], tuple[int, ...]]:
        record(model, prompt, recording, ticker(0, "reading the prompt", passing))
        stops = model.stop_ids | stop_ids
        return stops, greedy(model, prompt.inputs, tokens, stops, ticker(0, "decoding", tokens))

    ticker(0, "loading", 1)
    stops, reference_ids = reference.with_model(read_reference)

    def read(number: int, model: Model) -> Comparison:
        free = run_freely(model, prompt, recording, ticker(number, "reading the prompt", passing))
        forced = run_forced(model, prompt, recording, ticker(number, "each layer's own error", passing))
        ids = greedy(model, prompt.inputs, tokens, stops, ticker(number, "decoding", tokens))
        return comparison(reference, runs[number], prompt, list(rows), free, forced, (reference_ids, ids))

    comparisons = []
    for number in range(1, len(runs)):
        ticker(number, "loading", 1)
        comparisons.append(runs[number].with_model(partial(read, number)))
    return comparisons


def _rows(prompt: Prompt, config: ModelConfig) -> dict[Point, int]:
    """The points that a prompt reaches, in causal order, and how many rows each has."""
    inputs = prompt.inputs
    patches = 0 if inputs.grid_thw is None else int(np.prod(inputs.grid_thw, axis=1).sum())
    counts = {
        "patches": patches,
        "vision blocks": patches,
        "mergers": patches // config.vision.spatial_merge_size**2,
        "head": len(prompt.positions),
    }
    rows = {point: counts.get(point.stack, len(prompt.visual)) for point in points(config)}
    return {point: count for point, count in rows.items() if count}


def _check_room(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if need > free:
        raise ParityError(
            f"The reference's activations take {need / 1e9:.1f} GB, but {folder.parent} has {free / 1e9:.1f} GB free; "
            "set TMPDIR to a folder with more room, or use a shorter video."
        )


def _ticker(on_progress: Progress | None, words: str, total: int) -> Tick:
    """A counter of one thing that is being done."""
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if on_progress:
            on_progress(words, done, total)

    tick(0)
    return tick
