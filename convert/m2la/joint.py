"""Keys without RoPE and values in one latent: a PCA weighed by what attention does with either's error.

With y = [k'; v], k' the rotated heads that give up RoPE, the latent is c = A y and the reconstruction B c. The expected
weighted error E|W^(1/2) (y - B A y)|^2 is least for A = E_r^T W^(1/2), B = W^(-1/2) E_r, with E_r the first r
eigenvectors of W^(1/2) E[y y^T] W^(1/2). The balance of keys against values is TransMLA's (arXiv 2502.07864,
section 4.3), which makes their norms equal; here it is a factor beside the weights, and measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convert.m2la.moments import Moments
from convert.m2la.rotation import Rotation

FLOOR = 1e-6
"""Of the largest eigenvalue of a weight: directions that nothing reads still count so much, which keeps B bounded."""


@dataclass(frozen=True)
class Joint:
    """All latents in order of what they keep: down (n, 2 G d) from [k; v], up_keys (H, d, n) to the
    key without RoPE that each query head reads, up_values (G, d, n).

    n = (2 G - R) d. rope_heads: R. energy: the eigenvalues (n,), descending.
    """

    rope_heads: int
    down: np.ndarray
    up_keys: np.ndarray
    up_values: np.ndarray
    energy: np.ndarray

    def kept(self, rank: int) -> float:
        """Fraction of the weighted energy that the first `rank` latents keep."""
        total = self.energy.sum()
        return float(self.energy[:rank].sum() / total) if total > 0 else 1.0


@dataclass(frozen=True)
class JointProblem:
    """What the joint PCA of a layer needs for one number of RoPE keys, whatever the balance.

    moment: E[y y^T]; key_weight, value_weight: the blocks of W; gather ((G - R) d, G d): the rotated heads that lose
    RoPE from all heads' keys; spread (H, d, (G - R) d): back from them to what each query head reads.
    """

    rope_heads: int
    heads: int
    moment: np.ndarray
    key_weight: np.ndarray
    value_weight: np.ndarray
    gather: np.ndarray
    spread: np.ndarray

    @property
    def equal_balance(self) -> float:
        """The factor on keys at which keys and values carry the same weighted energy; 1 where either carries none."""
        rest = len(self.key_weight)
        keys = np.sum(self.key_weight * self.moment[:rest, :rest])
        values = np.sum(self.value_weight * self.moment[rest:, rest:])
        return float(values / keys) if keys > 1e-12 * values > 0 else 1.0

    def solve(self, balance: float) -> Joint:
        """balance: the factor on the keys' weight."""
        rest, heads = len(self.key_weight), self.heads
        head_dim = len(self.value_weight) // heads
        key_root, key_inverse = _roots(self.key_weight, balance)
        value_root, value_inverse = _roots(self.value_weight, 1.0)
        weighted = np.empty_like(self.moment)
        weighted[:rest, :rest] = key_root @ self.moment[:rest, :rest] @ key_root
        weighted[:rest, rest:] = key_root @ self.moment[:rest, rest:] @ value_root
        weighted[rest:, :rest] = weighted[:rest, rest:].T
        weighted[rest:, rest:] = value_root @ self.moment[rest:, rest:] @ value_root
        energy, vectors = np.linalg.eigh(weighted)
        energy, vectors = np.maximum(energy[::-1], 0.0), vectors[:, ::-1]
        largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])]
        vectors = vectors * np.where(largest < 0, -1.0, 1.0)
        down = np.concatenate([vectors[:rest].T @ key_root @ self.gather, vectors[rest:].T @ value_root], axis=1)
        up_keys = self.spread @ (key_inverse @ vectors[:rest])
        up_values = value_inverse @ vectors[rest:]
        return Joint(self.rope_heads, down, up_keys, up_values.reshape(heads, head_dim, -1), energy)


def joint_problem(
    moments: Moments,
    value_gram: np.ndarray,
    rotation: Rotation,
    turns: np.ndarray,
    rope_heads: int,
    attention_aware: bool,
) -> JointProblem:
    """value_gram: (H, d, d) of `LayerWeights.value_gram`; turns: (H, d/2) of `convert.m2la.nope`.

    Without `attention_aware`, W is the identity on k' and v.
    """
    heads = len(rotation.down)
    query_heads, head_dim, _ = moments.queries.shape
    size, rest = heads * head_dim, (heads - rope_heads) * head_dim
    gather = _by_dimension(rotation.down[rope_heads:], head_dim)
    spread = _spread(rotation.up[:, rope_heads:], turns)
    change = np.zeros((rest + size, 2 * size))
    change[:rest, :size] = gather
    change[rest:, size:] = np.eye(size)
    if attention_aware:
        grouped = (heads, query_heads // heads, head_dim, head_dim)
        key_weight = np.einsum("hia,hij,hjb->ab", spread, moments.queries, spread, optimize=True)
        value_weight = _block_diagonal(value_gram.reshape(grouped).sum(axis=1))
    else:
        key_weight, value_weight = np.eye(rest), np.eye(size)
    moment = change @ moments.keys_values @ change.T
    return JointProblem(rope_heads, heads, moment, key_weight, value_weight, gather, spread)


def _by_dimension(mix: np.ndarray, head_dim: int) -> np.ndarray:
    """(a, b, d/2) mixing heads at every frequency -> (a d, b d), the same in both halves."""
    rows, columns, half = mix.shape
    matrix = np.zeros((rows, head_dim, columns, head_dim))
    dims = np.arange(head_dim)
    matrix[:, dims, :, dims] = mix[:, :, dims % half].transpose(2, 0, 1)
    return matrix.reshape(rows * head_dim, columns * head_dim)


def _spread(up: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """(G, G - R, d/2), c (H, d/2) -> every query head's key without RoPE from the rotated heads: (H, d, (G - R) d)."""
    heads, rest, half = up.shape
    query_heads = len(turns)
    mix = up[np.arange(query_heads) // (query_heads // heads)]  # (H, G - R, d/2)
    matrix = np.zeros((query_heads, 2, half, rest, 2, half))
    f = np.arange(half)
    real, imaginary = (mix * part[:, None] for part in (turns.real, turns.imag))
    # (a + i b) c, halves as real and imaginary parts.
    matrix[:, 0, f, :, 0, f] = matrix[:, 1, f, :, 1, f] = real.transpose(2, 0, 1)
    matrix[:, 0, f, :, 1, f] = -imaginary.transpose(2, 0, 1)
    matrix[:, 1, f, :, 0, f] = imaginary.transpose(2, 0, 1)
    return matrix.reshape(query_heads, 2 * half, rest * 2 * half)


def _block_diagonal(blocks: np.ndarray) -> np.ndarray:
    count, size, _ = blocks.shape
    matrix = np.zeros((count, size, count, size))
    index = np.arange(count)
    matrix[index, :, index] = blocks
    return matrix.reshape(count * size, count * size)


def _roots(weight: np.ndarray, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Square root and its inverse of factor times a positive semidefinite weight."""
    if not len(weight):
        return weight, weight
    values, vectors = np.linalg.eigh(weight)
    largest = values[-1]
    values = factor * np.maximum(values, FLOOR * largest if largest > 0 else 1.0)
    root = np.sqrt(values)
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
