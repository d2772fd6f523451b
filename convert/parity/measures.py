"""How far two sets of activations, or two sets of logits, are apart; sums in float64, rows a block at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

BLOCK_NUMBERS = 2**21
"""Numbers taken to float64 at a time: 16 MB of each array."""


class Distance:
    """Running sums over rows (n, width) of a reference and of what is compared with it.

    A number that is not finite makes every measure of its rows NaN.
    """

    def __init__(self) -> None:
        self._reference = self._other = self._difference = self._product = 0.0
        self.rows = 0
        self.max_abs = 0.0

    def add(self, reference: np.ndarray, other: np.ndarray) -> None:
        """Count rows in; both arrays have the same shape."""
        step = max(1, BLOCK_NUMBERS // max(1, reference.shape[-1]))
        # An overflow or a NaN is the finding itself, and shows in the measures.
        with np.errstate(invalid="ignore", over="ignore"):
            for start in range(0, len(reference), step):
                ours = reference[start : start + step].astype(np.float64).ravel()
                theirs = other[start : start + step].astype(np.float64).ravel()
                difference = theirs - ours
                self._reference += float(ours @ ours)
                self._other += float(theirs @ theirs)
                self._product += float(ours @ theirs)
                self._difference += float(difference @ difference)
                # NumPy's maximum keeps a NaN, Python's max may lose it.
                self.max_abs = float(np.maximum(self.max_abs, np.abs(difference).max(initial=0.0)))
        self.rows += len(reference)

    @property
    def reference_norm(self) -> float:
        """||reference||."""
        return math.sqrt(self._reference)

    @property
    def relative_l2(self) -> float:
        """||other - reference|| / ||reference||; infinite where only the reference is zero."""
        if self._difference == 0.0:
            return 0.0
        return math.sqrt(self._difference / self._reference) if self._reference else math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two, taken as one vector each; 1 where they are equal, zero or not."""
        if self._difference == 0.0:
            return 1.0
        norms = math.sqrt(self._reference) * math.sqrt(self._other)
        return float(np.clip(self._product / norms, -1.0, 1.0)) if norms else 0.0


@dataclass(frozen=True)
class TokenDistance:
    """Of each position (K,): KL(reference || other) in nats, whether both put the same token first, and the negative
    log-likelihood in nats of the token that follows, under the reference and under the other; NaN where none does."""

    kl: np.ndarray
    agrees: np.ndarray
    reference_nll: np.ndarray
    other_nll: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[TokenDistance]) -> TokenDistance:
        """The positions of all parts, one after the other."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def token_distance(reference: np.ndarray, other: np.ndarray, following: np.ndarray) -> TokenDistance:
    """Compare logits (K, vocab); following: the id (K,) that stands after each position, -1 where none does.

    The log-softmax is taken in float64. Logits that are not finite give NaN and no agreement.
    """
    step = max(1, BLOCK_NUMBERS // reference.shape[-1])
    blocks = [slice(start, start + step) for start in range(0, len(reference), step)]
    return TokenDistance.joined([_token_distance(reference[b], other[b], following[b]) for b in blocks])


def _token_distance(reference: np.ndarray, other: np.ndarray, following: np.ndarray) -> TokenDistance:
    # What is not finite is the finding itself, and shows in the measures.
    with np.errstate(invalid="ignore", over="ignore"):
        ours, theirs = _log_softmax(reference), _log_softmax(other)
        # Rounding may leave a hair less than zero, which a KL cannot be; NaN stays.
        kl = np.maximum((np.exp(ours) * (ours - theirs)).sum(axis=-1), 0.0)
    agrees = (reference.argmax(axis=-1) == other.argmax(axis=-1)) & np.isfinite(kl)
    rows = np.arange(len(following))
    likelihoods = (np.where(following < 0, np.nan, -table[rows, following]) for table in (ours, theirs))
    return TokenDistance(kl, agrees, *likelihoods)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
