"""convert/adapter.py against the `peft` library: what it saves is read, and merged as it merges."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ivcore.adapter import Adapter
from ivcore.errors import CheckpointError

ATTENTION = "model.language_model.layers.{}.self_attn."
Q0, Q1 = ATTENTION.format(0) + "q_proj", ATTENTION.format(1) + "q_proj"
KEY = "base_model.model." + Q0
# (out, in) of every linear layer of a tiny model with our checkpoints' names.
SHAPES = {
    **{ATTENTION.format(layer) + "q_proj": (24, 16) for layer in (0, 1)},
    **{ATTENTION.format(layer) + "kv_a_proj_with_mqa": (10, 16) for layer in (0, 1)},
    **{f"model.language_model.layers.{layer}.mlp.down_proj": (16, 40) for layer in (0, 1)},
    "lm_head": (50, 16),
}
TARGETS = ["q_proj", "kv_a_proj_with_mqa", "down_proj", "lm_head"]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "another scale": {"r": 3, "lora_alpha": 7},
    "rank-stabilised": {"r": 6, "lora_alpha": 5, "use_rslora": True},
    "some modules": {"r": 2, "target_modules": ["q_proj"]},
    "random from the start": {"r": 2, "init_lora_weights": "orthogonal"},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {r"layers\.0\..*": 7, "q_proj": 2},
        # PEFT sorts them as it saves, so that the second one is the first to match.
        "alpha_pattern": {r"model\.language_model\.layers\.1\.mlp\.down_proj": 3, r"down_proj|lm_head": 5},
    },
    "patterns that match whole names only": {
        "r": 4,
        "rank_pattern": {"proj": 9, "head": 9, "language_model": 9, f"^{Q1}": 3},
        "alpha_pattern": {"mqa": 100, "a_proj_with_mqa": 100, "kv_a_proj_with_mqa": 5},
    },
    "rank-stabilised patterns": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"down_proj": 1},
    },
}


def tiny_model() -> Any:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Module()
    for name, (rows, columns) in SHAPES.items():
        *parents, last = name.split(".")
        module = model
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        module.add_module(last, torch.nn.Linear(columns, rows, bias=False))
    return model


@pytest.mark.filterwarnings("ignore::UserWarning:peft.utils.save_and_load")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:peft.tuners.tuners_utils")
@pytest.mark.parametrize("variant", VARIANTS)
def test_base_and_delta_are_what_peft_merges(variant: str, tmp_path: Path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    base = tiny_model()
    settings = {"target_modules": TARGETS, **VARIANTS[variant]}
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    merged = dict(loaded.merge_and_unload().named_parameters())

    adapter = Adapter.load(tmp_path)
    adapter.check(SHAPES)
    assert adapter.modules == {name for name in SHAPES if name.rpartition(".")[2] in settings["target_modules"]}
    for name, weight in base.named_parameters():
        module = name.removesuffix(".weight")
        expected = merged[name].detach().numpy()
        found = weight.detach().numpy()
        if module in adapter.modules:
            assert not np.allclose(expected, found, atol=0.1)
            # Block by block, as a conversion asks for it.
            blocks = [adapter.delta(module, slice(start, start + 7)) for start in range(0, len(found), 7)]
            assert all(block.dtype == np.float32 for block in blocks)
            found = found + np.concatenate(blocks)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


Tensors = Mapping[str, np.ndarray]


def write(folder: Path, tensors: Tensors | None = None, **settings: object) -> Path:
    """An adapter of rank 2 for one module in PEFT's form, with some settings or other tensors."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(dict(factors() if tensors is None else tensors), folder / "adapter_model.safetensors")
    return folder


def factors(rank: int = 2, dtype: type = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    # Small integers, which every float dtype has.
    return {
        f"{KEY}.lora_A.weight": random.integers(-9, 9, (rank, 16)).astype(dtype),
        f"{KEY}.lora_B.weight": random.integers(-9, 9, (24, rank)).astype(dtype),
    }


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_adapters_stored_in_16_bits_are_read_exactly(dtype: str, tmp_path: Path) -> None:
    torch, save = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch").save_file
    a, b = factors().values()
    write(tmp_path)
    target = {"F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    stored = {name: torch.from_numpy(array).to(target) for name, array in factors().items()}
    save(stored, tmp_path / "adapter_model.safetensors")
    np.testing.assert_array_equal(Adapter.load(tmp_path).delta(Q0, slice(3, 20)), 2 * b[3:20] @ a)


def test_the_factors_may_differ_in_dtype(tmp_path: Path) -> None:
    a, b = factors().values()
    tensors = factors() | {f"{KEY}.lora_A.weight": a.astype(np.float16)}
    np.testing.assert_array_equal(Adapter.load(write(tmp_path, tensors)).delta(Q0, slice(None)), 2 * b @ a)


def test_files_are_those_that_make_the_adapter(tmp_path: Path) -> None:
    assert Adapter.load(str(write(tmp_path))).files == (
        tmp_path / "adapter_config.json",
        tmp_path / "adapter_model.safetensors",
    )


def test_an_adapter_for_another_model_is_refused_with_all_that_differs(tmp_path: Path) -> None:
    extra = {name.replace("q_proj", "wqkv"): array for name, array in factors().items()}
    adapter = Adapter.load(write(tmp_path, factors() | extra))
    with pytest.raises(CheckpointError) as caught:
        adapter.check({Q0: (24, 32), Q1: (24, 16)})
    assert str(caught.value) == (
        f"The adapter in {tmp_path} was made for another model; in this one {Q0} is [24, 32], not [24, 16]; "
        f"there is no {ATTENTION.format(0)}wqkv."
    )


REFUSED = [
    ({"use_dora": True}, "sets use_dora=True, which cannot be merged here; merge the adapter with PEFT"),
    ({"fan_in_fan_out": True}, "sets fan_in_fan_out=True"),
    ({"modules_to_save": ["lm_head"]}, "sets modules_to_save=['lm_head']"),
    ({"bias": "lora_only"}, "sets bias='lora_only'"),
    ({"lora_bias": True, "bias": "all"}, "sets lora_bias=True, bias='all'"),
    ({"layer_replication": [[0, 2]]}, "sets layer_replication=[[0, 2]]"),
    ({"alora_invocation_tokens": [1]}, "sets alora_invocation_tokens=[1]"),
    ({"trainable_token_indices": [1]}, "sets trainable_token_indices=[1]"),
    ({"target_parameters": ["experts"]}, "sets target_parameters=['experts']"),
    ({"kasa_config": {"beta": 1}}, "sets kasa_config={'beta': 1}"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changed the base weights"),
    ({"init_lora_weights": "loftq"}, "path_initial_model_for_weight_conversion"),
    ({"peft_type": "IA3"}, "peft_type is 'IA3', but only LORA can be merged"),
    ({"peft_type": None}, "peft_type is None"),
    ({"r": 0}, "has no valid r;"),
    ({"r": True}, "has no valid r;"),
    ({"r": None}, "has no valid r;"),
    ({"lora_alpha": "8"}, "has no valid lora_alpha"),
    ({"lora_alpha": float("nan")}, "has no valid lora_alpha"),
    ({"rank_pattern": {"q_proj": 1.5}}, "has no valid rank_pattern"),
    ({"rank_pattern": ["q_proj"]}, "has no valid rank_pattern"),
    ({"rank_pattern": {"(q_proj": 2}}, "has no valid rank_pattern"),
    ({"alpha_pattern": {"q_proj": None}}, "has no valid alpha_pattern"),
    ({"alpha_pattern": {"(?i)q_proj": 1}}, "has no valid alpha_pattern"),
    ({"alpha_pattern": {"q_proj": 10**400}}, "has no valid alpha_pattern"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_settings_that_cannot_be_honoured_are_refused(settings: dict[str, object], message: str,
                                                      tmp_path: Path) -> None:  # fmt: skip
    write(tmp_path, **settings)
    with pytest.raises(CheckpointError) as caught:
        Adapter.load(tmp_path)
    assert message in str(caught.value) and str(tmp_path / "adapter_config.json") in str(caught.value)


def test_settings_that_change_nothing_are_read_over(tmp_path: Path) -> None:
    settings = {"use_dora": False, "modules_to_save": None, "rank_pattern": None, "lora_dropout": 0.1,
                "init_lora_weights": "gaussian", "megatron_core": "megatron.core", "use_qalora": False}  # fmt: skip
    assert Adapter.load(write(tmp_path, **settings)).modules == {Q0}


def other(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """The factors with some replaced, by the end of their names, or left out."""
    tensors = factors()
    for end, array in changes.items():
        name = f"{KEY}.{end}.weight"
        if array is None:
            del tensors[name]
        else:
            tensors[name] = array
    return tensors


ONE = np.ones((2, 16), np.float32)
WRONG_TENSORS = [
    (other(lora_B=None), f"{KEY}.lora_B.weight is missing"),
    (other(lora_A=None), f"{KEY}.lora_A.weight is missing"),
    (
        factors(rank=3),
        f"{KEY}.lora_A.weight has rank 3, but adapter_config.json says 2; {KEY}.lora_B.weight has rank 3",
    ),
    (other(lora_A=ONE[None]), f"{KEY}.lora_A.weight has shape [1, 2, 16], which is no matrix"),
    (other(lora_A=ONE[:, :0]), f"{KEY}.lora_A.weight has shape [2, 0], which is no matrix"),
    (other(lora_A=ONE.astype(np.int8)), f"{KEY}.lora_A.weight is I8, which is not supported"),
    (other(lora_magnitude_vector=ONE), "lora_magnitude_vector.weight is not lora_A or lora_B of a linear layer"),
    (factors() | {"base_model.model.x.lora_embedding_A": ONE}, "base_model.model.x.lora_embedding_A is not lora_A"),
    (factors() | {f"{KEY}.lora_B.bias": ONE}, f"{KEY}.lora_B.bias is not lora_A"),
    (factors() | {"lm_head.weight": ONE}, "lm_head.weight is not lora_A"),
    ({name.removeprefix("base_model."): array for name, array in factors().items()}, "lora_A.weight is not lora_A"),
    ({}, "it holds no tensors"),
]


@pytest.mark.parametrize(("tensors", "message"), WRONG_TENSORS, ids=[message for _, message in WRONG_TENSORS])
def test_tensors_that_cannot_be_merged_are_named(tensors: Tensors, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        Adapter.load(write(tmp_path, tensors))
    assert str(caught.value).startswith(f"{tmp_path / 'adapter_model.safetensors'} cannot be merged: ")
    assert message in str(caught.value)


def test_a_rank_other_than_the_pattern_says_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has rank 2, but adapter_config\.json says 5"):
        Adapter.load(write(tmp_path, rank_pattern={"q_proj": 5}))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_factor_with_nan_or_infinity_is_named(bad: float, tmp_path: Path) -> None:
    tensors = factors()
    tensors[f"{KEY}.lora_B.weight"][5, 1] = bad
    with pytest.raises(CheckpointError, match=r"lora_B\.weight holds NaN or infinity"):
        Adapter.load(write(tmp_path, tensors))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    (write(tmp_path) / name).unlink()
    with pytest.raises(CheckpointError, match=f"There is no {name} in .*; name the folder of a LoRA adapter"):
        Adapter.load(tmp_path)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    (write(tmp_path) / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle, which is not opened; save it as"):
        Adapter.load(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    weights = write(tmp_path) / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 5, 40, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is damaged"):
            Adapter.load(tmp_path)
    weights.write_bytes(whole)
    assert load_file(weights).keys() == factors().keys()
    for text in ("", "{", "[]"):
        (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"adapter_config\.json (is not valid JSON|holds no JSON object)"):
            Adapter.load(tmp_path)


def test_what_is_no_folder_is_named(tmp_path: Path) -> None:
    file = write(tmp_path) / "adapter_config.json"
    for path, what in ((file, "is not a folder"), (tmp_path / "absent", "does not exist")):
        with pytest.raises(CheckpointError, match=f"{path.name} {what}; name the folder of a LoRA adapter"):
            Adapter.load(path)
