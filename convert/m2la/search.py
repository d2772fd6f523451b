"""What a layer loses at each size of its cache: the candidates that are measured, and the best of each size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from convert.m2la.attend import OutputError, Sample, converted_outputs, output_error
from convert.m2la.joint import Joint, JointProblem, joint_problem
from convert.m2la.moments import Moments
from convert.m2la.nope import fit_turns, no_turns
from convert.m2la.options import Method
from convert.m2la.rotation import find_rotation, key_moments, no_rotation, query_energy
from convert.m2la.weights import LayerWeights

BALANCES = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)
"""Factors that are tried on the balance at which keys and values carry the same weighted energy."""

STEPS = 8
"""A layer's cache may grow and shrink by so many parts of the common width."""

MOST_STEPS = 2 * STEPS
LEAST_STEPS = STEPS // 4


@dataclass(frozen=True)
class Choice:
    """One form that a layer may take. width: numbers a token in the cache, rank + rope_heads * d.

    balance: the factor on the weight of keys; energy: the fraction kept by the latent; error: of attention outputs.
    """

    width: int
    rope_heads: int
    rank: int
    balance: float
    energy: float
    error: OutputError

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Choice:
        return cls(**{**fields, "error": OutputError(**fields["error"])})


class LayerSearch:
    """A layer with all that its candidates are made and measured with.

    turns: by number of RoPE keys, from an earlier search; those that are not there are fitted to the samples.
    """

    def __init__(
        self,
        weights: LayerWeights,
        moments: Moments,
        samples: Sequence[Sample],
        method: Method,
        turns: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        self.weights, self.moments, self.samples, self.method = weights, moments, list(samples), method
        self.head_dim = weights.head_dim
        self.heads = len(weights.k_proj) // self.head_dim
        self.rotation = no_rotation(self.heads, self.head_dim // 2)
        if method.rotation:
            keys = key_moments(moments.keys_values[: len(weights.k_proj), : len(weights.k_proj)], self.heads)
            energy = query_energy(moments.queries, self.heads)
            self.rotation = find_rotation(keys, energy if method.attention_aware else np.ones_like(energy))
        self.turns = dict(turns or {})

    def problem(self, rope_heads: int) -> JointProblem:
        """What is joined in the latent beside so many RoPE keys."""
        if rope_heads not in self.turns:
            fits = self.method.turns and rope_heads < self.heads
            self.turns[rope_heads] = (
                fit_turns(self.samples, self.moments, self.rotation, rope_heads)
                if fits
                else no_turns(len(self.moments.queries), self.head_dim // 2)
            )
        turns = self.turns[rope_heads]
        aware = self.method.attention_aware
        return joint_problem(self.moments, self.weights.value_gram, self.rotation, turns, rope_heads, aware)

    def measure(self, joint: Joint, width: int, balance: float) -> Choice:
        """A layer of this width: what RoPE leaves of it is the latent's, up to all that there is."""
        rank = min(width - joint.rope_heads * self.head_dim, len(joint.energy))
        outputs = [
            converted_outputs(sample, self.moments, self.rotation, joint, rank, self.weights.o_proj)
            for sample in self.samples
        ]
        error = output_error(self.samples, outputs)
        used = rank + joint.rope_heads * self.head_dim
        return Choice(used, joint.rope_heads, rank, balance, joint.kept(rank), error)

    def choices(self, width: int, widths: Iterable[int], rope_choices: Sequence[int]) -> list[Choice]:
        """A choice of every width for every number of RoPE keys that fits.

        The balance is the best at the common `width`, or at the next one that has room for the RoPE keys.
        """
        found: dict[tuple[int, int], Choice] = {}
        for rope_heads in rope_choices:
            room = [other for other in {width, *widths} if other > rope_heads * self.head_dim]
            if not room:
                continue
            common = min(room, key=lambda other: (abs(other - width), other))
            problem = self.problem(rope_heads)
            scale = problem.equal_balance if self.method.balance else 1.0
            tried = []
            for factor in BALANCES if self.method.balance else (1.0,):
                joint = problem.solve(scale * factor)
                tried.append((self.measure(joint, common, scale * factor), joint))
            best, joint = min(tried, key=lambda each: each[0].error.mean)
            found[best.width, rope_heads] = best
            for other in sorted(set(room) - {common}):
                choice = self.measure(joint, other, best.balance)
                found.setdefault((choice.width, rope_heads), choice)
        return list(found.values())


def widths_around(width: int, full: int) -> list[int]:
    """The widths that a layer may have when the common one is `width`, none above `full`."""
    step = max(1, width // STEPS)
    return sorted({min(width + (steps - STEPS) * step, full) for steps in range(LEAST_STEPS, MOST_STEPS + 1)})
