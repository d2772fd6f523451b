"""The rotation of key heads: which mixtures of them keep RoPE.

RoPE turns the pair (f, f + d/2) of every head by the same angle, so at one frequency the heads' keys, as complex
numbers, may be mixed by any real matrix before or after it. Under M-RoPE a frequency belongs to one axis in all heads,
so this holds frequency by frequency. The mixture is chosen by a PCA over heads at each frequency (RoRoPE of TransMLA,
arXiv 2502.07864, section 4.2, which folds it over all layers of one axis; here it is weighed by the queries' energy).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEAST_ENERGY = 1e-6
"""Of the mean over heads: a head whose queries are silent at a frequency still counts so much."""


@dataclass(frozen=True)
class Rotation:
    """Rotated heads j = sum over g of down[j, g, f] k[g, f], k[g, f] = sum over j of up[g, j, f] of them.

    down, up: (G, G, d/2) float64, inverse to each other at every frequency; the first rotated head holds the most.
    """

    down: np.ndarray
    up: np.ndarray


def key_moments(moment: np.ndarray, heads: int) -> np.ndarray:
    """E[k_g k_g'] over both halves at every frequency, (d/2, G, G), of the keys' second moment (G d, G d)."""
    half = moment.shape[0] // heads // 2
    split = moment.reshape(heads, 2, half, heads, 2, half)
    both: np.ndarray = np.einsum("gcfhcf->fgh", split)
    return both


def query_energy(queries: np.ndarray, heads: int) -> np.ndarray:
    """What the query heads that read a key head carry at every frequency: (d/2, G) of moments (H, d, d)."""
    diagonal = np.einsum("hii->hi", queries)  # (H, d)
    by_group = diagonal.reshape(heads, -1, 2, diagonal.shape[-1] // 2).sum(axis=(1, 2))
    energy: np.ndarray = by_group.T
    return energy


def find_rotation(keys: np.ndarray, weights: np.ndarray) -> Rotation:
    """PCA over heads at every frequency: with R heads kept, sum over g of weights[f, g] E|k_g - kept_g|^2 is least.

    keys: (d/2, G, G) from `key_moments`; weights: (d/2, G), or positive semidefinite (d/2, G, G), where the sum is over
    pairs of heads.
    """
    coupling = weights if weights.ndim == 3 else np.einsum("fg,gh->fgh", weights, np.eye(weights.shape[1]))
    root, inverse = _roots(coupling)
    _, vectors = np.linalg.eigh(root @ keys @ root)  # ascending
    vectors = vectors[:, :, ::-1]
    # eigh leaves the sign open; the largest entry is made positive, so that equal inputs give equal weights.
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=1)[:, None], axis=1)
    vectors = vectors * np.where(largest < 0, -1.0, 1.0)
    down = vectors.transpose(0, 2, 1) @ root  # (f, j, g)
    up = inverse @ vectors  # (f, g, j)
    return Rotation(np.ascontiguousarray(down.transpose(1, 2, 0)), np.ascontiguousarray(up.transpose(1, 2, 0)))


def no_rotation(heads: int, frequencies: int) -> Rotation:
    """Heads as they are: those first in line keep RoPE."""
    same = np.repeat(np.eye(heads)[:, :, None], frequencies, axis=2)
    return Rotation(same, same)


def _roots(coupling: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Square root and its inverse of (f, G, G); small eigenvalues are raised."""
    values, vectors = np.linalg.eigh(coupling)
    mean = values.mean(axis=1, keepdims=True)
    values = np.maximum(values, np.where(mean > 0, LEAST_ENERGY * mean, 1.0))
    root = np.sqrt(values)[:, None, :]
    return (vectors * root) @ vectors.transpose(0, 2, 1), (vectors / root) @ vectors.transpose(0, 2, 1)
