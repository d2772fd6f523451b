"""From prompts to what each layer may become: states layer by layer, moments, samples, and measured choices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from convert.m2la.attend import Sample, take_sample
from convert.m2la.moments import MomentSums, moments_of_weights
from convert.m2la.plan import AttentionPlan
from convert.m2la.search import LayerSearch, widths_around
from convert.m2la.slices import Slices
from convert.m2la.weights import LayerWeights
from convert.m2la.work import Work
from ivcore.rotary import text_rope

MEASURED_PROMPTS = 8
"""Prompts whose attention outputs are measured for every candidate, spread over all of them."""

Progress = Callable[[str, int, int], None]


def calibrate(plan: AttentionPlan, work: Work, on_progress: Progress | None) -> None:
    """Leave a file with moments and choices of every layer in `work`; layers that have one are passed over."""
    layers = plan.source.config.text.num_hidden_layers
    slices = Slices(plan.source, plan.backend)  # type: ignore[arg-type]
    for layer in range(layers):
        if on_progress:
            on_progress("calibrating", layer, layers)
        if not work.has_layer(layer):
            _bring_states(plan, work, slices, layer)
            _finish_layer(plan, work, layer)
    if on_progress:
        on_progress("calibrating", layers, layers)


def _bring_states(plan: AttentionPlan, work: Work, slices: Slices, layer: int) -> None:
    """The input of a layer, made from that of the layer before, which is not needed any more then."""
    layers = plan.source.config.text.num_hidden_layers
    if not work.has_states(layer):
        if layer:
            positions = (prompt.positions for prompt in plan.calibration)
            states = slices.layer(layer - 1, work.states(layer - 1), positions)
            work.write_states([layer], ([rows] for rows in states))
        else:
            count = min(slices.front_layers + 1, layers)
            fronts = slices.front([prompt.inputs for prompt in plan.calibration])
            work.write_states(range(count), (states[:count] for states in fronts))
    if layer:
        work.drop_states(layer - 1)


def _finish_layer(plan: AttentionPlan, work: Work, layer: int) -> None:
    text, options = plan.source.config.text, plan.options
    weights = LayerWeights.read(plan.source.checkpoint, text, layer)
    fold_norms = options.layout == "release"
    sums, samples = MomentSums(fold_norms), list[Sample]()
    count = len(plan.calibration)
    measured = set(np.linspace(0, count - 1, min(MEASURED_PROMPTS, count)).round().astype(int).tolist())
    for number, (prompt, hidden) in enumerate(zip(plan.calibration, work.states(layer), strict=True)):
        tokens = weights.project(hidden)
        if options.method.calibrated:
            sums.add(tokens, prompt.visual)
        if number in measured:
            cos, sin = text_rope(text, prompt.positions)
            samples.append(take_sample(weights, hidden, tokens, prompt.visual, cos, sin))
    moments = sums.finish() if options.method.calibrated else moments_of_weights(weights, fold_norms)
    search = LayerSearch(weights, moments, samples, options.method)
    full = text.geometry.gqa_cache_width
    # With a rank of their own all layers are alike, and no other width is looked at.
    widths = widths_around(plan.width, full) if plan.spends else [plan.width]
    choices = search.choices(plan.width, widths, options.rope_choices(text.geometry))
    work.write_layer(layer, moments, search.turns, choices)
