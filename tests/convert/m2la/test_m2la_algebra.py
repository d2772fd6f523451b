"""What must come out exactly: conversions that lose nothing, and sources that are the same function."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert.m2la.options import Method, Options
from convert.m2la.run import convert_attention
from convert.verification import verify
from ivcore.inputs import ModelInputs

TOLERANCE = 1e-4
few = settings(max_examples=6, suppress_health_check=list(HealthCheck))
Logits = dict[str, np.ndarray]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    pytest.importorskip("torch").set_num_threads(1)


@pytest.fixture(scope="module")
def libraries() -> dict[str, ModuleType]:
    return {name: pytest.importorskip(f"iv{name}") for name in ("torch", "mlx")}


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a `Shape`."""
    half = draw(st.integers(1, 6))
    # Frequencies are dealt T H W T H W, as far as there are any.
    height, width = draw(st.integers(0, (half + 1) // 3)), draw(st.integers(0, half // 3))
    layers = draw(st.integers(1, 3))
    return {
        "kv_heads": draw(st.integers(1, 4)),
        "group": draw(st.integers(1, 3)),
        "section": (half - height - width, height, width),
        "layers": layers,
        "hidden": draw(st.sampled_from([12, 21])),
        "deepstack": tuple(range(draw(st.integers(0, min(layers, 2))))),
        "bias": draw(st.booleans()),
    }


def logits(folder: Path, inputs: ModelInputs, libraries: dict[str, ModuleType]) -> Logits:
    return {name: library.load(folder).logits(inputs) for name, library in libraries.items()}


def assert_same(found: Logits, expected: Logits) -> None:
    for name, values in expected.items():
        assert np.abs(found[name] - values).max() < TOLERANCE * max(1.0, np.abs(values).max()), name


@few
@given(fields=shapes(), seed=st.integers(0, 99))
def test_keys_of_one_direction_a_frequency_are_converted_without_loss(
    sources: Any, prompts: list[ModelInputs], libraries: dict[str, ModuleType], fields: dict[str, Any], seed: int
) -> None:
    shape = sources.Shape(**fields)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensors = sources.aligned(shape, sources.random(shape, seed), seed)
        source = sources.write(folder / "in", shape, tensors)
        full = (2 * shape.kv_heads - 1) * shape.head_dim
        record = convert_attention(source, folder / "out", Options(rank=full), prompts, backend="torch")
        assert {layer["rope_heads"] for layer in record.report["layers"]} == {1}
        assert_same(logits(folder / "out", prompts[1], libraries), logits(source, prompts[1], libraries))
        assert verify(folder / "out").ok


@few
@given(fields=shapes(), seed=st.integers(0, 99))
def test_with_rope_on_all_rotated_heads_any_source_is_converted_without_loss(
    sources: Any, prompts: list[ModelInputs], libraries: dict[str, ModuleType], fields: dict[str, Any], seed: int
) -> None:
    shape = sources.Shape(**fields)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = sources.write(folder / "in", shape, sources.random(shape, seed))
        options = Options(cache_ratio=1, rope_heads=shape.kv_heads)
        convert_attention(source, folder / "out", options, prompts, backend="mlx")
        assert_same(logits(folder / "out", prompts[1], libraries), logits(source, prompts[1], libraries))


@pytest.mark.parametrize("section", [(2, 1, 1), (4, 0, 0), (2, 2, 2)])
def test_norms_that_scale_all_tokens_alike_are_folded_into_the_release_layout_without_loss(
    sources: Any, prompts: list[ModelInputs], libraries: dict[str, ModuleType], tmp_path: Path,
    section: tuple[int, int, int],
) -> None:  # fmt: skip
    """Orthogonal projections of the normalised input are as long for one token as for another: q/k norm is linear."""
    head_dim = 2 * sum(section)
    shape = sources.Shape(section=section, hidden=head_dim, kv_heads=3, deepstack=())
    tensors, random = sources.random(shape, 5), np.random.default_rng(6)
    for layer in range(shape.layers):
        prefix = f"model.language_model.layers.{layer}."
        tensors[f"{prefix}input_layernorm.weight"][:] = 1
        for module, count in (("q_proj", shape.heads), ("k_proj", shape.kv_heads)):
            blocks = [np.linalg.qr(random.standard_normal((head_dim, head_dim)))[0] for _ in range(count)]
            tensors[f"{prefix}self_attn.{module}.weight"] = 2 * np.concatenate(blocks).astype(np.float32)
    source = sources.write(tmp_path / "in", shape, sources.aligned(shape, tensors))
    full = (2 * shape.kv_heads - 1) * shape.head_dim
    options = Options(rank=full, layout="release")
    convert_attention(source, tmp_path / "out", options, prompts, backend="torch")
    assert_same(logits(tmp_path / "out", prompts[1], libraries), logits(source, prompts[1], libraries))


@few
@given(fields=shapes(), seed=st.integers(0, 99), layout=st.sampled_from(["norm", "release"]), aware=st.booleans())
def test_rotating_heads_before_the_conversion_changes_nothing(
    sources: Any, prompts: list[ModelInputs], libraries: dict[str, ModuleType], fields: dict[str, Any], seed: int,
    layout: Any, aware: bool,
) -> None:  # fmt: skip
    """A grouped-query source can be rotated by permuting its key heads, by a sign for each at every frequency, and by
    an angle that a frequency has in all heads; each leaves the source's function as it is."""
    shape = sources.Shape(**fields)
    tensors = sources.random(shape, seed)
    for name in tensors:
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            tensors[name] = np.resize(tensors[name][: shape.head_dim // 2], shape.head_dim)
    rank = max(1, shape.kv_heads * shape.head_dim - 3)
    options = Options(rank=rank, layout=layout, method=Method(attention_aware=aware))
    found = []
    with tempfile.TemporaryDirectory() as name:
        for number, weights in enumerate((tensors, rotated(shape, tensors, seed))):
            folder = sources.write(Path(name) / f"in{number}", shape, weights)
            out = Path(name) / f"out{number}"
            convert_attention(folder, out, options, prompts, backend="torch")
            found.append((logits(folder, prompts[1], libraries), logits(out, prompts[1], libraries)))
    assert_same(found[1][0], found[0][0])
    assert_same(found[1][1], found[0][1])


def rotated(shape: Any, tensors: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """The same function with its key heads permuted, their frequencies' signs and angles changed."""
    random = np.random.default_rng(seed)
    changed, half = dict(tensors), shape.head_dim // 2
    for layer in range(shape.layers):
        prefix = f"model.language_model.layers.{layer}.self_attn."
        order = random.permutation(shape.kv_heads)
        signs = random.choice([-1.0, 1.0], (shape.kv_heads, 1, half))
        angles = random.uniform(0, 2 * np.pi, half)
        for module, group in (("q_proj", shape.group), ("k_proj", 1), ("v_proj", 1)):
            for kind in ("weight", "bias") if shape.bias else ("weight",):
                name = f"{prefix}{module}.{kind}"
                heads = tensors[name].reshape(shape.kv_heads, group, 2, half, -1).astype(np.float64)
                if module != "v_proj":
                    turned = (heads[:, :, 0] + 1j * heads[:, :, 1]) * (signs * np.exp(1j * angles))[..., None]
                    heads = np.stack([turned.real, turned.imag], axis=2)
                changed[name] = heads[order].reshape(tensors[name].shape).astype(np.float32)
        name = f"{prefix}o_proj.weight"
        heads = tensors[name].reshape(shape.hidden, shape.kv_heads, shape.group * shape.head_dim)
        changed[name] = heads[:, order].reshape(tensors[name].shape)
    return changed
