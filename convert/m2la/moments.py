"""Second moments of a layer's queries, keys and values: summed over calibration tokens, or implied by the weights.

Visual and text tokens are summed apart and weigh the same in the end, however many there are of either: a clip brings
ten times more of the one, but an answer is read off the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convert.m2la.weights import LayerWeights, Projections

RIDGE = 1e-6
"""Added to a head's moments before they are inverted, as a fraction of their mean: dead directions stay at zero."""


@dataclass(frozen=True)
class HeadMaps:
    """Of every head, the affine map from what its projection gives to what its norm made of it: weight (n, d, d), bias
    (n, d), float64."""

    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        """raw (S, n, d) -> (S, n, d), float32."""
        mapped = raw.transpose(1, 0, 2) @ self.weight.astype(np.float32).transpose(0, 2, 1)
        result: np.ndarray = mapped.transpose(1, 0, 2) + self.bias.astype(np.float32)
        return result


@dataclass(frozen=True)
class Moments:
    """keys_values: E[y y^T] of y = [k; v], (2 G d, 2 G d); queries: E[q q^T], (H, d, d); float64.

    query_maps, key_maps: for the release layout, which has no q/k norm, the maps that stand in for them; q and k are
    then what the maps give.
    """

    keys_values: np.ndarray
    queries: np.ndarray
    query_maps: HeadMaps | None = None
    key_maps: HeadMaps | None = None


class MomentSums:
    """Running sums over the tokens of a layer; `fold_norms` for the release layout."""

    def __init__(self, fold_norms: bool) -> None:
        self.fold_norms = fold_norms
        self._sums: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})
        self._counts = [0, 0]

    def add(self, tokens: Projections, visual: np.ndarray) -> None:
        """visual: (S,), which of the tokens are visual."""
        for kind, places in enumerate((np.flatnonzero(~visual), np.flatnonzero(visual))):
            if not len(places):
                continue
            self._counts[kind] += len(places)
            for name, term in self._terms(tokens, places).items():
                if name in self._sums[kind]:
                    self._sums[kind][name] += term
                else:
                    self._sums[kind][name] = term

    def _terms(self, tokens: Projections, places: np.ndarray) -> dict[str, np.ndarray]:
        queries, keys, raw_queries, raw_keys, values = (
            array[places].astype(np.float64)
            for array in (tokens.queries, tokens.keys, tokens.raw_queries, tokens.raw_keys, tokens.values)
        )
        count = len(places)
        if not self.fold_norms:
            joined = np.concatenate([keys.reshape(count, -1), values.reshape(count, -1)], axis=1)
            return {"keys_values": joined.T @ joined, "queries": _products(queries, queries)}
        ones = np.ones((count, 1))
        joined = np.concatenate([raw_keys.reshape(count, -1), values.reshape(count, -1), ones], axis=1)
        raw_queries, raw_keys = _with_one(raw_queries), _with_one(raw_keys)
        return {
            "keys_values": joined.T @ joined,
            "queries": _products(raw_queries, raw_queries),
            "keys": _products(raw_keys, raw_keys),
            "query_targets": _products(queries, raw_queries),
            "key_targets": _products(keys, raw_keys),
        }

    def finish(self) -> Moments:
        """The mean over both kinds of tokens."""
        kinds = [
            {name: total / count for name, total in sums.items()}
            for sums, count in zip(self._sums, self._counts, strict=True)
            if count
        ]
        mean = {name: np.mean([kind[name] for kind in kinds], axis=0) for name in kinds[0]}
        if not self.fold_norms:
            return Moments(mean["keys_values"], mean["queries"])
        query_maps = _fit(mean["query_targets"], mean["queries"])
        key_maps = _fit(mean["key_targets"], mean["keys"])
        heads, head_dim, _ = key_maps.weight.shape
        size = heads * head_dim
        change = np.zeros((2 * size, 2 * size + 1))
        for head in range(heads):
            rows = slice(head * head_dim, (head + 1) * head_dim)
            change[rows, rows] = key_maps.weight[head]
        change[:size, -1] = key_maps.bias.reshape(-1)
        change[size:, size:-1] = np.eye(size)
        augmented = np.concatenate([query_maps.weight, query_maps.bias[:, :, None]], axis=2)
        return Moments(
            change @ mean["keys_values"] @ change.T,
            augmented @ mean["queries"] @ augmented.transpose(0, 2, 1),
            query_maps,
            key_maps,
        )


def moments_of_weights(weights: LayerWeights, fold_norms: bool) -> Moments:
    """What the weights imply where the normalised input is white: no calibration."""
    scale = weights.input_norm.astype(np.float64)
    heads = [
        (getattr(weights, module).astype(np.float64) * scale).reshape(-1, weights.head_dim, len(scale))
        for module in ("q_proj", "k_proj", "v_proj")
    ]
    normed, maps = [], []
    for matrix, norm in zip(heads[:2], (weights.q_norm, weights.k_norm), strict=True):
        size = np.sqrt(np.mean(np.sum(matrix**2, axis=2), axis=1) + weights.eps)  # root mean square of each head
        factor = norm.astype(np.float64) / size[:, None]  # (n, d)
        normed.append(matrix * factor[:, :, None])
        maps.append(HeadMaps(factor[:, :, None] * np.eye(weights.head_dim), np.zeros_like(factor)))
    queries, keys = normed
    joined = np.concatenate([keys.reshape(-1, len(scale)), heads[2].reshape(-1, len(scale))])
    found = Moments(joined @ joined.T, queries @ queries.transpose(0, 2, 1))
    return Moments(found.keys_values, found.queries, *maps) if fold_norms else found


def _products(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(S, n, a), (S, n, b) -> (n, a, b), summed over tokens."""
    product: np.ndarray = left.transpose(1, 2, 0) @ right.transpose(1, 0, 2)
    return product


def _with_one(heads: np.ndarray) -> np.ndarray:
    return np.concatenate([heads, np.ones((*heads.shape[:2], 1))], axis=2)


def _fit(targets: np.ndarray, inputs: np.ndarray) -> HeadMaps:
    """Least squares: targets E[t u^T] (n, d, d + 1), inputs E[u u^T] (n, d + 1, d + 1), u ending in 1."""
    width = inputs.shape[-1]
    ridge = RIDGE * np.trace(inputs[:, :-1, :-1], axis1=1, axis2=2) / (width - 1)
    damped = inputs + ridge[:, None, None] * np.diag(np.append(np.ones(width - 1), 0.0))
    solved = np.linalg.solve(damped, targets.transpose(0, 2, 1)).transpose(0, 2, 1)
    return HeadMaps(solved[:, :, :-1], solved[:, :, -1])
