"""A cache for the whole model, spent over its layers where it saves the most.

What a choice costs is what it adds to the residual stream, relative to its size, times the layer's weight: how much the
whole model minds that (`convert.m2la.sensitivity`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from convert.m2la.search import Choice


def uniform(layers: Sequence[Sequence[Choice]], width: int, weights: Sequence[float]) -> list[Choice]:
    """The same width and the same number of RoPE keys in all layers: those with the least summed cost."""
    whole: list[list[Choice]] = []
    for rope_heads in {choice.rope_heads for choices in layers for choice in choices}:
        fitting = [[c for c in choices if c.rope_heads == rope_heads and c.width <= width] for choices in layers]
        if all(fitting):
            whole.append([max(choices, key=lambda choice: choice.width) for choices in fitting])

    def cost(chosen: Sequence[Choice]) -> float:
        return sum(weight * choice.error.residual for weight, choice in zip(weights, chosen, strict=True))

    return min(whole, key=lambda chosen: (cost(chosen), chosen[0].rope_heads))


def spend(layers: Sequence[Sequence[Choice]], total: int, weights: Sequence[float]) -> list[Choice]:
    """One choice a layer, widths adding up to at most `total`, the summed cost least.

    A knapsack with one item of each class, solved exactly by going through all totals (Kellerer, Pferschy and Pisinger,
    Knapsack Problems, 2004, chapter 11).
    """
    best = np.zeros(total + 1)
    taken: list[np.ndarray] = []
    for choices, weight in zip(layers, weights, strict=True):
        costs = np.full((len(choices), total + 1), np.inf)
        for number, choice in enumerate(choices):
            if choice.width <= total:
                costs[number, choice.width :] = best[: total + 1 - choice.width] + weight * choice.error.residual
        taken.append(costs.argmin(axis=0))
        best = costs.min(axis=0)
    left = total
    found: list[Choice] = []
    for choices, numbers in zip(reversed(layers), reversed(taken), strict=True):
        found.insert(0, choices[numbers[left]])
        left -= found[0].width
    return found
