"""The parts of the conversion against NumPy's SVD of the data themselves, brute force, and the backends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.m2la.attend import OutputError, Sample
from convert.m2la.budget import spend, uniform
from convert.m2la.joint import joint_problem
from convert.m2la.layouts import interleaved
from convert.m2la.moments import Moments, MomentSums
from convert.m2la.nope import fit_turns
from convert.m2la.options import Options
from convert.m2la.rotation import find_rotation, key_moments, no_rotation, query_energy
from convert.m2la.run import convert_attention
from convert.m2la.search import Choice
from convert.m2la.weights import Projections
from ivcore.backend import load
from ivcore.inputs import ModelInputs

TOKENS = 40


@given(heads=st.integers(1, 5), half=st.integers(1, 3), group=st.integers(1, 3), seed=st.integers(0, 999))
def test_the_first_rotated_heads_are_the_best_approximation_of_their_number(
    heads: int, half: int, group: int, seed: int
) -> None:
    """Against the singular values of the weighed keys at each frequency (Eckart and Young)."""
    random = np.random.default_rng(seed)
    keys = random.standard_normal((TOKENS, heads, 2 * half)) * random.uniform(0.1, 3, (heads, 2 * half))
    queries = random.standard_normal((TOKENS, heads * group, 2 * half)) * random.uniform(0.1, 3, (heads * group, 1))
    flat = keys.reshape(TOKENS, -1)
    moment = flat.T @ flat / TOKENS
    energy = query_energy(np.einsum("shi,shj->hij", queries, queries) / TOKENS, heads)
    rotation = find_rotation(key_moments(moment, heads), energy)
    assert np.allclose(np.einsum("gjf,jhf->fgh", rotation.up, rotation.down), np.eye(heads))
    for frequency in range(half):
        pair = [frequency, frequency + half]
        read = (queries[:, :, pair] ** 2).sum(axis=(0, 2)).reshape(heads, group).sum(axis=1) / TOKENS
        data = keys[:, :, pair].transpose(0, 2, 1).reshape(-1, heads)  # both halves are rows
        singular = np.linalg.svd(data * np.sqrt(read), compute_uv=False)
        for kept in range(heads + 1):
            back = rotation.up[:, :kept, frequency] @ rotation.down[:kept, :, frequency]
            error = (((data - data @ back.T) ** 2) * read).sum()
            assert error == pytest.approx((singular[kept:] ** 2).sum(), abs=1e-8 * (singular**2).sum())


@given(heads=st.integers(2, 4), seed=st.integers(0, 999), kept=st.integers(1, 2))
def test_heads_mixed_by_any_orthogonal_matrix_a_frequency_keep_the_same_part_of_the_scores(
    heads: int, seed: int, kept: int
) -> None:
    random = np.random.default_rng(seed)
    half = 3
    factors = random.standard_normal((half, heads, heads))
    keys = factors @ factors.transpose(0, 2, 1)
    reading = np.einsum("fg,gh->fgh", random.uniform(0.1, 3, (half, heads)), np.eye(heads))
    mix = np.linalg.qr(random.standard_normal((half, heads, heads)))[0]
    turned = mix @ keys @ mix.transpose(0, 2, 1), mix @ reading @ mix.transpose(0, 2, 1)
    parts = []
    for rotation in (find_rotation(keys, reading), find_rotation(*turned)):
        parts.append(np.einsum("gjf,jhf->fgh", rotation.up[:, :kept], rotation.down[:kept]))
    assert np.allclose(mix @ parts[0] @ mix.transpose(0, 2, 1), parts[1], atol=1e-6)


@given(
    heads=st.integers(1, 3), half=st.integers(1, 2), group=st.integers(1, 2), rope_heads=st.integers(1, 3),
    balance=st.floats(0.05, 20), seed=st.integers(0, 999),
)  # fmt: skip
def test_the_latent_loses_what_the_best_matrix_of_its_rank_loses(
    heads: int, half: int, group: int, rope_heads: int, balance: float, seed: int
) -> None:
    """Scores of keys without RoPE and outputs of values, against the singular values of the data they are made of."""
    rope_heads = min(rope_heads, heads)
    random = np.random.default_rng(seed)
    size = 2 * half
    keys, values = random.standard_normal((2, TOKENS, heads, size)) @ random.standard_normal((2, 1, size, size))
    queries = random.standard_normal((TOKENS, heads * group, size))
    o_proj = random.standard_normal((7, heads * group, size))
    y = np.concatenate([keys.reshape(TOKENS, -1), values.reshape(TOKENS, -1)], axis=1)
    moments = Moments(y.T @ y / TOKENS, np.einsum("shi,shj->hij", queries, queries) / TOKENS)
    rotation = find_rotation(
        key_moments(moments.keys_values[: heads * size, : heads * size], heads), query_energy(moments.queries, heads)
    )
    gram = np.einsum("ohi,ohj->hij", o_proj, o_proj)
    turns = random.standard_normal((heads * group, half)) + 1j * random.standard_normal((heads * group, half))
    joint = joint_problem(moments, gram, rotation, turns, rope_heads, attention_aware=True).solve(balance)

    # What a token's key without RoPE and its value give to every query and every output, as one row.
    back = np.einsum("gjf,jhf->fgh", rotation.up[:, rope_heads:], rotation.down[rope_heads:])
    rest = np.einsum("fgh,shf->sgf", back[np.arange(size) % half], keys)
    turned = np.repeat(rest[..., :half] + 1j * rest[..., half:], group, axis=1) * turns
    read = np.concatenate([turned.real, turned.imag], axis=2)  # (S, H, d)

    def effect(key: np.ndarray, value: np.ndarray) -> np.ndarray:
        scores = np.einsum("qhi,shi->shq", queries, key) / np.sqrt(TOKENS)
        outputs = np.einsum("ogni,sgi->sgno", o_proj.reshape(7, heads, group, size), value)
        return np.concatenate([np.sqrt(balance) * scores.reshape(TOKENS, -1), outputs.reshape(TOKENS, -1)], axis=1)

    whole = effect(read, values)
    singular = np.linalg.svd(whole, compute_uv=False)
    assert np.allclose(joint.energy, np.append(singular**2, np.zeros(99))[: len(joint.energy)] / TOKENS, atol=1e-4)
    for rank in range(len(joint.energy) + 1):
        latent = y @ joint.down[:rank].T
        key, value = (np.einsum("nir,sr->sni", up[:, :, :rank], latent) for up in (joint.up_keys, joint.up_values))
        error = ((whole - effect(key, value)) ** 2).sum()
        assert error == pytest.approx((singular[rank:] ** 2).sum(), abs=1e-4 * (singular**2).sum())


@given(heads=st.integers(1, 3), half=st.integers(1, 4), group=st.integers(1, 2), seed=st.integers(0, 999))
def test_where_all_keys_are_equally_far_a_constant_turn_stands_in_for_rope_without_loss(
    heads: int, half: int, group: int, seed: int
) -> None:
    """The keys at one place and the query at another: RoPE is a turn by the angles between the two."""
    random = np.random.default_rng(seed)
    directions = random.uniform(-3, 3, (1, heads * group, half))
    queries = np.concatenate([np.cos(directions), np.sin(directions)], axis=2)
    keys = random.standard_normal((30, heads, 2 * half))
    keys[-1] = 0  # the query's own, which is no distance away
    angles = np.zeros((30, half))
    angles[-1] = random.uniform(-3, 3, half)
    tokens = Projections(queries, keys, queries, keys, keys)
    sample = Sample(tokens, np.array([29]), np.array([False]), np.cos(angles), np.sin(angles), np.zeros((1, 1)), 1.0)
    moments = Moments(np.zeros((1, 1)), np.zeros((heads * group, 2 * half, 2 * half)))
    rotation = no_rotation(heads, half)
    assert np.allclose(fit_turns([sample], moments, rotation, 0), np.exp(-1j * angles[-1]), atol=0.02)
    still = replace(sample, cos=np.ones_like(angles), sin=np.zeros_like(angles))
    assert np.allclose(fit_turns([still], moments, rotation, 0), 1)
    assert np.allclose(fit_turns([still], moments, rotation, heads), 1)


@given(st.integers(0, 9999), st.integers(1, 4))
def test_the_budget_is_spent_as_trying_everything_would(seed: int, layers: int) -> None:
    random = np.random.default_rng(seed)
    choices = [
        [
            choice(int(random.integers(1, 9)), int(random.integers(1, 4)), float(random.uniform()))
            for _ in range(random.integers(1, 5))
        ]
        for _ in range(layers)
    ]
    total = sum(max(each.width for each in layer) for layer in choices) - int(random.integers(0, 4))
    possible = [each for each in product(*choices) if sum(one.width for one in each) <= total]
    weights = list(random.uniform(0.1, 2, layers))

    def cost(each: Sequence[Choice]) -> float:
        return sum(weight * one.error.residual for weight, one in zip(weights, each, strict=True))

    least = min(map(cost, possible), default=None)
    if least is None:
        return
    found = spend(choices, total, weights)
    assert sum(one.width for one in found) <= total
    assert cost(found) == pytest.approx(least)


def test_a_uniform_cache_has_one_number_of_rope_keys_and_the_widest_rank_that_fits() -> None:
    layers = [
        [choice(8, 1, 0.5), choice(6, 1, 0.1), choice(8, 2, 0.4), choice(12, 1, 0.0)],
        [choice(8, 1, 0.5), choice(7, 2, 0.4)],
    ]
    assert [(one.width, one.rope_heads) for one in uniform(layers, 8, [1, 1])] == [(8, 2), (7, 2)]
    layers[1][0] = choice(8, 1, 0.1)
    assert [(one.width, one.rope_heads) for one in uniform(layers, 8, [1, 1])] == [(8, 1), (8, 1)]
    assert [(one.width, one.rope_heads) for one in uniform(layers, 8, [9, 1])] == [(8, 2), (7, 2)]


def choice(width: int, rope_heads: int, error: float) -> Choice:
    return Choice(width, rope_heads, width, 1.0, 1.0, OutputError(error, error, error))


@pytest.mark.parametrize("fold_norms", [False, True])
def test_text_and_visual_tokens_weigh_the_same_and_prompts_may_come_in_any_portions(fold_norms: bool) -> None:
    random = np.random.default_rng(0)
    tokens = Projections(*(random.standard_normal((TOKENS, heads, 4)).astype(np.float32) for heads in (4, 2, 4, 2, 2)))
    visual = np.arange(TOKENS) >= 8
    whole, parts, again = MomentSums(fold_norms), MomentSums(fold_norms), MomentSums(fold_norms)
    whole.add(tokens, visual)
    for start in range(0, TOKENS, 7):
        part = slice(start, start + 7)
        parts.add(Projections(*(getattr(tokens, name)[part] for name in tokens.__dataclass_fields__)), visual[part])
    again.add(tokens, visual)
    again.add(Projections(*(getattr(tokens, name)[8:] for name in tokens.__dataclass_fields__)), visual[8:])
    for other in (parts, again):
        assert np.allclose(whole.finish().keys_values, other.finish().keys_values)
        assert np.allclose(whole.finish().queries, other.finish().queries)
    if not fold_norms:
        y = np.concatenate([tokens.keys.reshape(TOKENS, -1), tokens.values.reshape(TOKENS, -1)], axis=1, dtype=float)
        mean = (y[:8].T @ y[:8] / 8 + y[8:].T @ y[8:] / (TOKENS - 8)) / 2
        assert np.allclose(whole.finish().keys_values, mean)


def test_norms_that_are_affine_are_found_and_applied() -> None:
    random = np.random.default_rng(1)
    raw_queries, raw_keys = random.standard_normal((TOKENS, 4, 3)), random.standard_normal((TOKENS, 2, 3))
    weight, bias = random.standard_normal((4, 3, 3)), random.standard_normal((4, 3))
    queries = np.einsum("nij,snj->sni", weight, raw_queries) + bias
    keys = np.einsum("nij,snj->sni", weight[:2], raw_keys) + bias[:2]
    values = random.standard_normal((TOKENS, 2, 3))
    tokens = Projections(*(each.astype(np.float32) for each in (raw_queries, raw_keys, queries, keys, values)))
    sums = MomentSums(fold_norms=True)
    sums.add(tokens, np.zeros(TOKENS, bool))
    moments = sums.finish()
    assert moments.query_maps is not None and moments.key_maps is not None
    assert np.allclose(moments.query_maps(tokens.raw_queries), queries, atol=1e-4)
    y = np.concatenate([keys.reshape(TOKENS, -1), values.reshape(TOKENS, -1)], axis=1)
    assert np.allclose(moments.keys_values, y.T @ y / TOKENS, atol=1e-4)
    assert np.allclose(moments.queries, np.einsum("sni,snj->nij", queries, queries) / TOKENS, atol=1e-4)


def test_an_interleaved_head_holds_the_pairs_of_the_halves_side_by_side() -> None:
    torch = pytest.importorskip("torch")
    attention = pytest.importorskip("ivtorch.attention")
    heads = torch.randn(5, 1, 8)
    step = attention.Step(torch.rand(5, 4), torch.rand(5, 4), 0, 5, 2**20)
    halves = attention.rotate(heads[None], step, interleaved=False)
    assert torch.equal(attention.rotate(heads[None][..., interleaved(8)], step, interleaved=True), halves)


@pytest.mark.parametrize("layout", ["norm", "release"])
def test_the_reported_error_is_that_of_the_backends_attention(
    sources: Any, prompts: list[ModelInputs], tmp_path: Path, layout: Any
) -> None:
    """One layer without its MLP: what it adds to its input is the attention's output, for all to see."""
    shape = sources.Shape(layers=1, kv_heads=3, deepstack=())
    tensors = sources.random(shape)
    tensors["model.language_model.layers.0.mlp.down_proj.weight"][:] = 0
    source = sources.write(tmp_path / "in", shape, tensors)
    options = Options(rank=9, layout=layout)
    record = convert_attention(source, tmp_path / "out", options, prompts[:1], prompts[1:], backend="torch")
    added = {}
    for folder in (source, tmp_path / "out"):
        seen: dict[str, np.ndarray] = {}
        load(folder, "torch").logits(prompts[0], seen.__setitem__)
        added[folder] = seen["layers.0"] - seen["embeddings"]
    visual = np.isin(prompts[0].token_ids, (38, 39))
    reported = record.report["layers"][0]["output_error"]
    for kind, places in (("text", ~visual), ("visual", visual)):
        ours, theirs = added[source][places], added[tmp_path / "out"][places]
        assert reported[kind] == pytest.approx(((theirs - ours) ** 2).sum() / (ours**2).sum(), rel=1e-3)
        assert reported[kind] > 1e-3
