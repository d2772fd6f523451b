"""The measured error: what a converted layer's attention gives at sampled calibration tokens, beside the source's.

Scores, softmax and output projection in NumPy float32, for a bounded number of queries over all keys of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convert.m2la.joint import Joint
from convert.m2la.moments import Moments
from convert.m2la.rotation import Rotation
from convert.m2la.weights import LayerWeights, Projections

QUERIES = 64
"""Positions of each kind, visual and text, whose outputs are measured in a prompt."""


@dataclass(frozen=True)
class Sample:
    """One prompt in one layer. places: (n,) positions measured; visual: (n,), which of them are visual.

    tokens: of all S tokens, though of the queries only those at `places`; cos, sin: (S, d/2); scale: what scores are
    multiplied by. outputs: the source's (n, hidden); size: mean square of the residual stream that they are added to.
    """

    tokens: Projections
    places: np.ndarray
    visual: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    outputs: np.ndarray
    size: float


@dataclass(frozen=True)
class OutputError:
    """Squared error of attention outputs: text and visual relative to the outputs' squares (NaN where there is none of
    the kind), and `residual`, the mean over both kinds relative to the square of the residual stream."""

    text: float
    visual: float
    residual: float

    @property
    def mean(self) -> float:
        """Over the kinds that there are."""
        return float(np.nanmean([self.text, self.visual]))


def measured_places(visual: np.ndarray) -> np.ndarray:
    """Up to `QUERIES` positions of each kind, evenly, in order: (n,) of a prompt's (S,)."""
    chosen = [
        kind[np.linspace(0, len(kind) - 1, min(QUERIES, len(kind))).round().astype(int)]
        for kind in (np.flatnonzero(~visual), np.flatnonzero(visual))
    ]
    return np.sort(np.concatenate(chosen))


def take_sample(
    weights: LayerWeights, hidden: np.ndarray, tokens: Projections, visual: np.ndarray, cos: np.ndarray, sin: np.ndarray
) -> Sample:
    """The sample of a prompt; hidden: the layer's input (S, hidden)."""
    places = measured_places(visual)
    kept = Projections(
        tokens.raw_queries[places], tokens.raw_keys, tokens.queries[places], tokens.keys, tokens.values
    )  # fmt: skip
    queries = rotate(kept.queries, cos[places], sin[places])
    outputs = attention(
        queries, rotate(tokens.keys, cos, sin), tokens.values, places, weights.o_proj, weights.head_dim**-0.5
    )
    size = float(np.mean(np.sum(hidden[places].astype(np.float64) ** 2, axis=1)))
    return Sample(kept, places, visual[places], cos, sin, outputs, size)


def converted_outputs(
    sample: Sample, moments: Moments, rotation: Rotation, joint: Joint, rank: int, o_proj: np.ndarray
) -> np.ndarray:
    """What the converted layer gives at the sample's places, (n, hidden)."""
    places = sample.places
    queries, keys = query_parts(sample, moments), mapped_keys(sample, moments)
    shared, _ = key_parts(keys, rotation, joint.rope_heads)
    count, heads, head_dim = keys.shape
    flat = np.concatenate([keys.reshape(count, -1), sample.tokens.values.reshape(count, -1)], axis=1)
    latent = flat @ joint.down[:rank].T.astype(np.float32)
    plain, values = (
        (latent @ up[:, :, :rank].reshape(-1, len(latent[0])).T.astype(np.float32)).reshape(count, -1, head_dim)
        for up in (joint.up_keys, joint.up_values)
    )
    queries = np.concatenate([queries, rotate(queries, sample.cos[places], sample.sin[places])], axis=2)
    shared = np.repeat(rotate(shared, sample.cos, sample.sin), queries.shape[1] // heads, axis=1)
    return attention(queries, np.concatenate([plain, shared], axis=2), values, places, o_proj, head_dim**-0.5)


def query_parts(sample: Sample, moments: Moments) -> np.ndarray:
    """The converted layer's queries before RoPE, (n, H, d)."""
    tokens = sample.tokens
    return tokens.queries if moments.query_maps is None else moments.query_maps(tokens.raw_queries)


def mapped_keys(sample: Sample, moments: Moments) -> np.ndarray:
    """The keys that the converted layer compresses, (S, G, d)."""
    tokens = sample.tokens
    return tokens.keys if moments.key_maps is None else moments.key_maps(tokens.raw_keys)


def key_parts(keys: np.ndarray, rotation: Rotation, rope_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Of keys (S, G, d) the part that the shared RoPE keys give back to every head, before RoPE, and the rest."""
    count, heads, _ = keys.shape
    mix = np.einsum("gjf,jhf->fgh", rotation.up[:, :rope_heads], rotation.down[:rope_heads]).astype(np.float32)
    by_frequency = keys.reshape(count, heads, 2, -1).transpose(2, 3, 1, 0)
    shared = (mix @ by_frequency).transpose(3, 2, 0, 1).reshape(keys.shape)
    return shared, keys - shared


def output_error(samples: list[Sample], outputs: list[np.ndarray]) -> OutputError:
    """outputs: of every sample, (n, hidden)."""
    parts = []
    for visual in (False, True):
        error = energy = 0.0
        residual: list[float] = []
        for sample, output in zip(samples, outputs, strict=True):
            chosen = sample.visual == visual
            if not chosen.any():
                continue
            squares = np.sum((output[chosen] - sample.outputs[chosen]).astype(np.float64) ** 2, axis=1)
            error += squares.sum()
            energy += np.sum(sample.outputs[chosen].astype(np.float64) ** 2)
            residual.append(float(squares.mean()) / sample.size)
        relative = (error / energy if energy else float(error > 0)) if residual else np.nan
        parts.append((relative, float(np.mean(residual)) if residual else np.nan))
    return OutputError(float(parts[0][0]), float(parts[1][0]), float(np.nanmean([parts[0][1], parts[1][1]])))


def rotate(heads: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """RoPE of (S, n, d), pairs (f, f + d/2); cos, sin: (S, d/2)."""
    half = heads.shape[-1] // 2
    first, second = heads[..., :half], heads[..., half:]
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, places: np.ndarray, o_proj: np.ndarray, scale: float
) -> np.ndarray:
    """Causal attention of queries (n, H, D) at `places` over keys (S, H or G, D), values (S, G, d) -> (n, hidden)."""
    count, query_heads, _ = queries.shape
    total, heads, head_dim = values.shape
    unseen = np.arange(total) > places[:, None]  # (n, S)
    output = np.empty((count, query_heads, head_dim), np.float32)
    for head in range(query_heads):
        shares = softmax(queries[:, head] @ keys[:, head * keys.shape[1] // query_heads].T * np.float32(scale), unseen)
        output[:, head] = shares @ values[:, head * heads // query_heads]
    projected: np.ndarray = output.reshape(count, -1) @ o_proj.T
    return projected


def softmax(scores: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    """Of scores (n, S) along the last axis, but for those that are unseen; the array is written to."""
    scores[unseen] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores
