"""Which layer is at fault: the first point whose own error leaves what arithmetic explains and the trend before it.

Notable:
- Judged is each point's own error, made while everything before it is the reference's, so no layer is blamed for what
  it inherits.
- The same arithmetic on both sides (one backend, one dtype, one form of storage) explains no error at all.
- Otherwise a point may err as its number formats round and as its weights are quantised, and where enough of its kin
  came before, in proportion to them.
- A residual stream that shrinks (the last layers of a trained decoder take back what early ones blew up) keeps the
  rounding of its larger input, so a point's allowance grows by that ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from convert.parity.points import Point
from convert.parity.run import Run
from ivcore.shards import FLOAT_NAMES

EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}

ROUNDINGS = {"float32": 32, "bfloat16": 1, "float16": 1}
"""What rounding explains of a point's own error, in epsilons of its format. Half formats are summed in float32 and
rounded a few times: 0.02 to 1.4 were measured where PyTorch meets MLX. A float32 sum's error depends on its order and
grows with its terms: 0.5 to 8 at the release's widths, and up to 17 without a BLAS, which adds one after the other."""

WEIGHT_RANGE = 8.0
"""Largest less smallest weight of a quantisation group, in standard deviations: 4.1 to 5.3 for 32 to 128 normal
weights, and more with the outliers of trained ones."""

ALONE = 3.0
"""How far beyond the error that arithmetic explains a point may go that has few kin before it."""

BEYOND_KIN = 5.0
"""How far a point's ratio of own to explained error may go beyond the largest of its kin before it. Without a fault the
ratios of a stack are within a factor of 4; the first layer, whose input is smallest, has the largest."""

KIN = 3
"""So many points of a stack must have come before to know its trend."""

RESIDUAL = ("vision blocks", "decoder layers")
"""Stacks whose points add to what the point before them gave."""


@dataclass(frozen=True)
class Judged:
    """A point, the relative L2 of its own error, and the norm of the reference's activation."""

    point: Point
    own: float
    norm: float


@dataclass(frozen=True)
class Explained:
    """The relative own error that arithmetic explains; quantisation is infinite where nothing is known of the point."""

    rounding: float
    quantisation: float

    @property
    def together(self) -> float:
        return max(self.rounding, self.quantisation)


def judge(judged: Sequence[Judged], reference: Run, run: Run) -> tuple[int | None, tuple[float, ...]]:
    """The place of the first point, in causal order, whose own error is above its limit, if there is one; all limits.

    An error that is NaN is above any limit; a limit is infinite where nothing is known of what to expect.
    """
    suspect: int | None = None
    limits: list[float] = []
    ratios: dict[tuple[str, bool], list[float]] = {}
    stream: dict[str, float] = {}
    for place, each in enumerate(judged):
        point, explained = each.point, explain(each.point, reference, run)
        shrinking = 1.0
        if point.stack in RESIDUAL and each.norm > 0:
            shrinking = max(1.0, stream.get(point.tower, 0.0) / each.norm)
        if point.stack != "mergers":
            stream[point.tower] = each.norm
        # What quantisation makes says nothing about what rounding makes, and the other way round.
        kin = ratios.setdefault((point.stack, explained.quantisation > explained.rounding), [])
        limits.append(shrinking * _limit(explained, kin))
        if each.own <= limits[-1]:
            kin.append(each.own / shrinking / _unit(explained))
        elif suspect is None:
            suspect = place
    return suspect, tuple(limits)


def _limit(explained: Explained, kin: Sequence[float]) -> float:
    """The largest own error of a point that does not leave the trend; kin: ratios of those before it."""
    alone, trend = ALONE * explained.together, BEYOND_KIN * max(kin, default=0.0) * _unit(explained)
    if len(kin) < KIN:
        return max(alone, trend)
    # A trend below what rounding alone explains is luck: float32 sums may agree by chance.
    return max(ALONE * explained.rounding, trend)


def _unit(explained: Explained) -> float:
    """What own errors of kin are divided by to compare them."""
    return explained.together if 0 < explained.together < math.inf else 1.0


def explain(point: Point, reference: Run, run: Run) -> Explained:
    """What arithmetic explains at a point, by the backends, the dtypes, config.json and the safetensors headers."""
    same_backend, same_dtype = reference.backend == run.backend, reference.dtype == run.dtype
    same_geometry = reference.config.text.geometry == run.config.text.geometry
    formats: set[str] = set()
    if not (same_backend and same_dtype and same_geometry and _same_portions(reference, run)):
        formats = {reference.dtype, run.dtype}
    if point.stack == "embeddings" and same_dtype:
        formats = set()  # rows are looked up: nothing is computed
    if point.stack == "decoder layers" and not same_geometry:
        return Explained(_rounding(formats), math.inf)
    ours, theirs = _stored(point, reference), _stored(point, run)
    quantisation = 0.0
    for name in ours.keys() & theirs.keys():
        forms = {ours[name], theirs[name]}
        if len(forms) > 1:
            formats |= {form.dtype for form in forms}
            quantisation = max(quantisation, *(quantisation_error(form) for form in forms))
        elif ours[name].packing and not same_backend:
            formats |= {reference.dtype, ours[name].dtype}  # PyTorch rounds what it unpacks to the dtype of the scales
    return Explained(_rounding(formats), quantisation)


@dataclass(frozen=True)
class Form:
    """How a tensor is stored: the float dtype of its numbers or scales; packing: bits and group size, None in float."""

    dtype: str
    packing: tuple[int, int] | None


def quantisation_error(form: Form) -> float:
    """Relative root mean square error of a matrix in MLX's affine form: uniform over a step, which is the group's range
    by the number of steps; 0 in float."""
    return WEIGHT_RANGE / (2 ** form.packing[0] - 1) / math.sqrt(12) if form.packing else 0.0


def _stored(point: Point, run: Run) -> dict[str, Form]:
    """The form of every tensor that a point depends on, packed ones by the name of their weight."""
    forms = {}
    for name, spec in run.specs.items():
        if not name.startswith(point.modules) or name.endswith((".scales", ".biases")):
            continue
        module = name.removesuffix(".weight")
        scales = run.specs.get(f"{module}.scales") if name.endswith(".weight") else None
        block = run.config.quantization
        forms[name] = Form(FLOAT_NAMES[(scales or spec).dtype], block.of_module(module) if scales and block else None)
    return forms


def _rounding(formats: set[str]) -> float:
    return max((ROUNDINGS[name] * EPSILON[name] for name in formats), default=0.0)


def _same_portions(reference: Run, run: Run) -> bool:
    """Whether both cut their work alike; matrix products of other shapes add up in another order."""
    ours, theirs = reference.config, run.config
    return (
        ours.text.intermediate_size == theirs.text.intermediate_size
        and ours.vision.intermediate_size == theirs.vision.intermediate_size
        and ours.vision.num_heads == theirs.vision.num_heads
    )
