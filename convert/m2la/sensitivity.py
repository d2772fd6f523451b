"""How much the whole model minds an error in one layer: what makes errors of different layers comparable.

Noise of a known size, in a direction drawn at random, is added to what a layer leaves in the residual stream, and the
KL divergence of the predictions that follow is measured. Early layers pass their errors on to all others; in a small
model a tenth of noise after the first layer cost four times what it cost after the last.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from convert.m2la.attend import measured_places
from convert.m2la.plan import AttentionPlan, Prompt
from convert.parity.measures import token_distance
from convert.parity.run import release
from ivcore.backend import Model, load

PROMPTS = 8
NOISE = 0.1
"""Length of the noise, as a fraction of the length of the state that it is added to."""

_SEED = 0


def sensitivities(plan: AttentionPlan) -> list[float]:
    """Of every layer the mean KL at text positions, in nats, over the square of `NOISE`; 1 where nothing was measured.

    The source is loaded whole, in the dtype that it is stored in.
    """
    count = len(plan.calibration)
    chosen = sorted({int(place) for place in np.linspace(0, count - 1, min(PROMPTS, count)).round()})
    prompts = [plan.calibration[place] for place in chosen if not plan.calibration[place].visual.all()]
    model = load(plan.source.path, plan.backend)  # type: ignore[arg-type]
    try:
        found = np.zeros(plan.source.config.text.num_hidden_layers)
        for prompt in prompts:
            found += _of_prompt(model, prompt, len(found))
    finally:
        del model
        release(plan.backend)
    found /= max(len(prompts), 1) * NOISE**2
    return [float(value) for value in found] if found.min() > 0 else [1.0] * len(found)


def _of_prompt(model: Model, prompt: Prompt, layers: int) -> np.ndarray:
    """KL of every layer's noise, (layers,)."""
    places = measured_places(prompt.visual)
    places = places[~prompt.visual[places]]
    plain = model.logits(prompt.inputs, positions=places)
    nothing = np.full(len(places), -1)
    found = np.zeros(layers)
    for layer in range(layers):
        random = np.random.default_rng([_SEED, layer])

        noisy = model.logits(prompt.inputs, partial(_disturb, f"layers.{layer}", random), places)
        found[layer] = token_distance(plain, noisy, nothing).kl.mean()
    return found


def _disturb(at: str, random: np.random.Generator, name: str, rows: np.ndarray) -> np.ndarray | None:
    """An observer that puts noise at one point."""
    if name != at:
        return None
    noise = random.standard_normal(rows.shape, dtype=np.float32)
    length = np.linalg.norm(rows, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
    disturbed: np.ndarray = rows + np.float32(NOISE) * length * noise
    return disturbed
