"""What training hands to a backend: a packed batch, a loss, the settings of LoRA and AdamW. NumPy only.

Notable:
- A loss is a plain weighted sum over places; how rows, micro-batches and processes share the weight is the stage's.
- Statistics are weighted sums as well, so those of several batches are added up.
- Where both backends must begin with, or do, the very same thing, it is decided here: the first factors of LoRA, which
  parameters decay.

The formulas of the losses are in docs/training.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ivcore.config import ModelConfig
from ivcore.errors import TrainingError
from ivcore.inputs import check_pixels, check_token_ids
from ivcore.patterns import matches

if TYPE_CHECKING:
    from ivcore.vision import Patches

DECODER_LINEARS = ("language_model.layers.*",)
"""Targets that are every linear layer of the decoder's attention and MLP."""

_HEAD_BYTES = 16  # of a place and a token of the vocabulary: logits, their log-softmax, and the gradients of both


@dataclass(frozen=True)
class Batch:
    """Rows packed one after the other into one sequence of S tokens; no attention across rows, but for `parents`.

    token_ids: int32 (S,). position_ids: int32 (3, S), starting anew in every row. lengths: int32 (rows,), of sum S.
    pixels: float32 (P, patch_dim) or Patches, grid_thw: int32 (N, 3): of all rows in order, or None.
    targets: int32 (S,), the token that each place is to predict (the next one; 0 where the weight is 0).
    weights: float32 (S,), what the loss of a place counts, at least 0, and 0 for places that are not trained on.
    parents: int32 (rows,), the earlier row that each goes on from, whose tokens its own see and whose positions they go
        on with, -1 where it is none; None: no row does. A row that another goes on from goes on from none itself.
    """

    token_ids: np.ndarray
    position_ids: np.ndarray
    lengths: np.ndarray
    pixels: np.ndarray | Patches | None
    grid_thw: np.ndarray | None
    targets: np.ndarray
    weights: np.ndarray
    parents: np.ndarray | None = None

    @property
    def places(self) -> np.ndarray:
        """The K places with a weight, in order."""
        return np.flatnonzero(self.weights)

    def check(self, config: ModelConfig) -> None:
        """Raise TrainingError, or PromptError for pixels and ids, where the arrays do not fit each other or the model.

        A backend may read past an array's end unnoticed.
        """
        length = len(self.token_ids)
        shapes = {
            "position_ids": (self.position_ids, (3, length)),
            "targets": (self.targets, (length,)),
            "weights": (self.weights, (length,)),
        }
        for name, (array, shape) in shapes.items():
            if array.shape != shape:
                raise TrainingError(f"A batch of {length} tokens has {name} of shape {array.shape} instead of {shape}.")
        if not length or self.lengths.sum() != length or self.lengths.min() < 1:
            raise TrainingError(f"A batch of {length} tokens has rows of {self.lengths.tolist()} tokens.")
        self._check_parents()
        if not np.isfinite(self.weights).all() or self.weights.min() < 0:
            raise TrainingError("A batch has a weight that is negative or not a number.")
        check_token_ids(self.token_ids, config)
        check_token_ids(self.targets, config)
        visual = int(np.isin(self.token_ids, (config.image_token_id, config.video_token_id)).sum())
        encoded = 0
        if self.pixels is not None and self.grid_thw is not None:
            check_pixels(self.pixels, self.grid_thw, config)
            encoded = len(self.pixels) // config.vision.spatial_merge_size**2
        if visual != encoded:
            raise TrainingError(f"A batch has {visual} visual placeholders, but its pixels make {encoded} tokens.")

    def _check_parents(self) -> None:
        if self.parents is None:
            return
        rows, parents = len(self.lengths), self.parents
        if parents.shape != (rows,):
            raise TrainingError(f"A batch of {rows} rows has parents of shape {parents.shape} instead of {(rows,)}.")
        going_on = parents[parents >= 0]
        if (parents < -1).any() or (parents >= np.arange(rows)).any() or (parents[going_on] >= 0).any():
            raise TrainingError(f"A batch has rows that go on from {parents.tolist()}: not earlier rows by themselves.")


@dataclass(frozen=True)
class NextToken:
    """Cross entropy of the targets."""

    def rows(self, places: np.ndarray) -> dict[str, np.ndarray]:
        """What the loss needs beside the logits, with one row for each of the K places."""
        return {}


@dataclass(frozen=True)
class Policy:
    """Group-relative policy optimisation with clip-higher, and a penalty for leaving a reference.

    old_logprobs, advantages, reference_logprobs: float32 (S,). clip_low, clip_high: how far below and above 1 the ratio
    of probabilities counts. reference_logprobs None leaves the penalty out.
    """

    old_logprobs: np.ndarray
    advantages: np.ndarray
    clip_low: float
    clip_high: float
    reference_logprobs: np.ndarray | None = None
    kl_weight: float = 0.0

    def rows(self, places: np.ndarray) -> dict[str, np.ndarray]:
        """As for NextToken: `old`, `advantages` and perhaps `reference`, (K,) each."""
        arrays = {"old": self.old_logprobs, "advantages": self.advantages}
        if self.reference_logprobs is not None:
            arrays["reference"] = self.reference_logprobs
        return {name: array[places].astype(np.float32) for name, array in arrays.items()}


@dataclass(frozen=True)
class Distill:
    """Reverse KL of the student to the teacher, on the student's own tokens.

    teacher_logprobs: float32 (K, vocab) at the K places with a weight, or (S,) of the sampled tokens alone.
    forward_share: how much of the loss is forward KL, 0 to 1; only with the whole vocabulary.
    """

    teacher_logprobs: np.ndarray
    forward_share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.forward_share <= 1 or (self.forward_share and not self.full):
            raise TrainingError(
                f"forward_share is {self.forward_share}; it is 0 to 1, and 0 where the teacher scored samples only."
            )

    @property
    def full(self) -> bool:
        """Whether the teacher scored the whole vocabulary."""
        return self.teacher_logprobs.ndim == 2

    def rows(self, places: np.ndarray) -> dict[str, np.ndarray]:
        """As for NextToken: `teacher`, (K, vocab) or (K,)."""
        if self.full and len(self.teacher_logprobs) != len(places):
            raise TrainingError(
                f"The teacher scored {len(self.teacher_logprobs)} places, but the batch trains on {len(places)}."
            )
        teacher = self.teacher_logprobs if self.full else self.teacher_logprobs[places]
        return {"teacher": teacher.astype(np.float32, copy=False)}


Loss = NextToken | Policy | Distill


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank updates scale * B @ A of the linear layers that `targets` name (LoRA, arXiv 2106.09685).

    rank_stabilized: the scale is alpha / sqrt(rank) instead of alpha / rank (rsLoRA, arXiv 2312.03732).
    dropout: share of the inputs of A that a training step leaves out. targets: patterns as in `ivcore.patterns`.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rank_stabilized: bool = False
    targets: tuple[str, ...] = DECODER_LINEARS

    def __post_init__(self) -> None:
        limits = {"rank": self.rank > 0, "alpha": self.alpha > 0, "dropout": 0 <= self.dropout < 1}
        for name, holds in limits.items():
            if not holds:
                raise TrainingError(f"LoRA's {name} is {getattr(self, name)}, which is outside its range.")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def pick(self, linears: Iterable[str]) -> list[str]:
        """The linear layers that the targets name, in order; TrainingError for a target that names none."""
        linears = list(linears)
        for pattern in self.targets:
            if not any(matches(name, pattern) for name in linears):
                raise TrainingError(f"The target {pattern} names no linear layer of this model; is it misspelt?")
        return [name for name in linears if any(matches(name, pattern) for pattern in self.targets)]

    def check_present(self, present: Mapping[str, tuple[int, float]], linears: Iterable[str]) -> None:
        """Raise TrainingError unless the adapter on a model, module -> (rank, scale), is one of these settings."""
        wanted = set(self.pick(linears))
        for name in sorted(wanted | present.keys()):
            if name not in present or name not in wanted:
                has, want = ("none", "one") if name in wanted else ("one", "none")
                raise TrainingError(f"The adapter to go on with has {has} for {name}, but the targets want {want}.")
            rank, scale = present[name]
            if rank != self.rank or not math.isclose(scale, self.scale, rel_tol=1e-6):
                raise TrainingError(
                    f"The adapter to go on with has rank {rank} and scale {scale:g} for {name}, but the settings say "
                    f"rank {self.rank} and scale {self.scale:g}; give the same rank, alpha and rank_stabilized."
                )


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (arXiv 1711.05101).

    multipliers: (pattern, factor) pairs; the first whose pattern names a parameter multiplies its learning rate, and 0
    leaves it out of training.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    multipliers: tuple[tuple[str, float], ...] = ()

    def multiplier(self, name: str) -> float:
        return next((factor for pattern, factor in self.multipliers if matches(name, pattern)), 1.0)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are optimised alike."""

    names: tuple[str, ...]
    multiplier: float
    weight_decay: float


def parameter_groups(shapes: Mapping[str, tuple[int, ...]], settings: OptimizerSettings) -> list[ParameterGroup]:
    """What is trained of parameters (name -> shape), by multiplier and decay; TrainingError for an idle multiplier.

    Only matrices decay: not norms, biases, or the scales of rotary heads.
    """
    for pattern, _ in settings.multipliers:
        if not any(matches(name, pattern) for name in shapes):
            raise TrainingError(f"The multiplier {pattern} names no parameter that is trained; is it misspelt?")
    groups: dict[tuple[float, float], list[str]] = {}
    for name, shape in shapes.items():
        decays = name.endswith(".weight") and len(shape) > 1
        key = settings.multiplier(name), settings.weight_decay if decays else 0.0
        groups.setdefault(key, []).append(name)
    return [ParameterGroup(tuple(names), *key) for key, names in groups.items() if key[0]]


def first_factor(module: str, rank: int, columns: int, seed: int) -> np.ndarray:
    """The A that a module's LoRA begins with, float32 (rank, columns): uniform within 1/sqrt(columns).

    That is PEFT's start, `kaiming_uniform_(a=sqrt(5))`; B begins with 0.
    """
    bound = 1 / math.sqrt(columns)
    random = np.random.default_rng([seed, *module.encode()])
    return random.uniform(-bound, bound, (rank, columns)).astype(np.float32)


def head_block(vocab_size: int, budget: int) -> int:
    """Places whose logits and gradients fit in half of `budget` bytes."""
    return max(1, budget // 2 // (_HEAD_BYTES * vocab_size))


def joined_grids(grid_thw: np.ndarray) -> np.ndarray:
    """grid_thw (N, 3) with neighbours of one frame size as one medium: their frames can be encoded as one batch."""
    joined: list[list[int]] = []
    for time, height, width in np.asarray(grid_thw).tolist():
        if joined and joined[-1][1:] == [height, width]:
            joined[-1][0] += time
        else:
            joined.append([time, height, width])
    return np.array(joined, np.int32).reshape(-1, 3)
