"""What stands in for RoPE where a key loses it: one turn and one shrinking for every query head and frequency.

A score's part at frequency f is Re(q conj(k) e^(i theta D)), D the distance from query to key. Without RoPE a constant
takes the place of e^(i theta D): the key is multiplied by c[h, f], complex, which `kv_b_proj` does, having keys of its
own for every query head. c is found by least squares over calibration queries and the keys that they see. Slow
frequencies keep c near 1; fast ones shrink towards 0, where a wrong angle does more harm than none. What all keys of a
query have in common the softmax does not see, so scores are centred before they are compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from convert.m2la.attend import Sample, key_parts, mapped_keys, query_parts, rotate, softmax
from convert.m2la.moments import Moments
from convert.m2la.rotation import Rotation

PLACES = 48
"""Queries of a prompt that the fit looks at."""

SPREAD = 0.5
"""Of the weight of a query's keys, the part that all share alike. The rest goes by the source's attention, under which
alone a key that must not be attended to would have no say."""

RIDGE = 1e-4
"""Pull of c towards 1, as a fraction of the mean square of what it is fitted with."""


def no_turns(heads: int, frequencies: int) -> np.ndarray:
    """Keys without RoPE stay as they are: (H, d/2) complex."""
    return np.ones((heads, frequencies), np.complex128)


def fit_turns(samples: Sequence[Sample], moments: Moments, rotation: Rotation, rope_heads: int) -> np.ndarray:
    """c (H, d/2) complex for the part of the keys that the first `rope_heads` rotated heads do not hold."""
    query_heads, head_dim, _ = moments.queries.shape
    half = head_dim // 2
    normal, right = np.zeros((query_heads, head_dim, head_dim)), np.zeros((query_heads, head_dim))
    for sample in samples:
        _, rest = key_parts(mapped_keys(sample, moments), rotation, rope_heads)
        turned_rest = rotate(rest, sample.cos, sample.sin)
        chosen = np.linspace(0, len(sample.places) - 1, min(PLACES, len(sample.places))).round().astype(int)
        places = sample.places[chosen]
        queries = query_parts(sample, moments)[chosen]
        turned = rotate(queries, sample.cos[places], sample.sin[places])
        share_of_kind = np.where(sample.visual, sample.visual.mean(), 1 - sample.visual.mean())[chosen]
        for head in range(query_heads):
            own = head * rest.shape[1] // query_heads
            attended = _attention(sample, chosen, head)
            targets = turned[:, head] @ turned_rest[:, own].T  # (n, S)
            for number, place in enumerate(places):
                seen = slice(0, place + 1)
                weight = (1 - SPREAD) * attended[number, seen] + np.float32(SPREAD / (place + 1))
                features = _features(queries[number, head], rest[seen, own])
                features -= weight @ features
                target = targets[number, seen] - weight @ targets[number, seen]
                weighted = features.T * (weight / np.float32(len(places) * share_of_kind[number]))
                normal[head] += weighted @ features
                right[head] += weighted @ target
    damping = RIDGE * np.trace(normal, axis1=1, axis2=2) / head_dim
    damping[damping == 0] = 1.0  # nothing is left to turn
    normal += damping[:, None, None] * np.eye(head_dim)
    right[:, :half] += damping[:, None]
    solved = np.linalg.solve(normal, right[:, :, None])[:, :, 0]
    turns: np.ndarray = solved[:, :half] + 1j * solved[:, half:]
    return turns


def _features(query: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Real and imaginary part of q conj(k) at every frequency, of (d,) and (S, d): (S, d); their sum with the parts of
    c is the score of c k."""
    half = len(query) // 2
    first, second = keys[:, :half], keys[:, half:]
    real = query[:half] * first + query[half:] * second
    return np.concatenate([real, query[half:] * first - query[:half] * second], axis=1)


def _attention(sample: Sample, chosen: np.ndarray, head: int) -> np.ndarray:
    """What the source's head attends to at the chosen ones of the sample's places: (n, S)."""
    places, tokens = sample.places[chosen], sample.tokens
    query = rotate(tokens.queries[chosen, head : head + 1], sample.cos[places], sample.sin[places])[:, 0]
    own = head * tokens.keys.shape[1] // tokens.queries.shape[1]
    keys = rotate(tokens.keys[:, own : own + 1], sample.cos, sample.sin)[:, 0]
    scale = np.float32(query.shape[1] ** -0.5)
    return softmax(query @ keys.T * scale, np.arange(len(keys)) > places[:, None])
