"""Loading a folder on both backends: strict, in any float dtype, packed or sharded; damage is one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ivcore.config import ModelConfig
from ivcore.errors import BackendError, CheckpointError, ConfigError, IvError
from ivcore.sampling import Sampling
from ivcore.shards import INDEX, SINGLE, TensorSpec, write_checkpoint

NORM, UP = "model.language_model.norm.weight", "model.language_model.layers.2.mlp.up_proj.weight"
Tensors = dict[str, np.ndarray]
Edit = Callable[[Tensors], Any]


def edited_folder(reference: Any, folder: Path, edit: Edit | None = None, **config: Any) -> Path:
    """A copy of a reference checkpoint with its tensors edited and fields of config.json set."""
    tensors = load_file(reference.path / SINGLE)
    if edit:
        edit(tensors)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / SINGLE)
    raw = json.loads((reference.path / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | config))
    return folder


def message(backend: ModuleType, folder: Path, kind: type[IvError] = CheckpointError, **how: Any) -> str:
    with pytest.raises(kind) as caught:
        backend.load(folder, **how)
    words = str(caught.value)
    assert "\n" not in words and words.endswith(".")
    return words


def poison(name: str, value: float) -> Edit:
    def edit(tensors: Tensors) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[-1] = value

    return edit


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [UP, "model.visual.pos_embed.weight", "lm_head.weight"])
def test_a_weight_that_is_no_number_names_its_tensor_and_file(
    backend: ModuleType, reference: Any, tmp_path: Path, name: str, value: float
) -> None:
    words = message(backend, edited_folder(reference, tmp_path, poison(name, value)))
    assert name in words and str(tmp_path / SINGLE) in words


def test_everything_that_does_not_fit_is_in_one_error(backend: ModuleType, reference: Any, tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        del tensors[UP], tensors[NORM]
        tensors["model.xslinear.gate"] = np.zeros((3, 5), np.float16)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :-1].copy()

    words = message(backend, edited_folder(reference, tmp_path, edit))
    assert str(tmp_path) in words
    for part in (f"missing {UP} [256, 128]", f"missing {NORM} [128]", "unexpected model.xslinear.gate [3, 5] F16",
                 "lm_head.weight has shape [512, 127], but the config says [512, 128]"):  # fmt: skip
        assert part in words


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "uint32", "bool"])
def test_a_weight_that_is_no_float_names_its_tensor_and_dtype(
    backend: ModuleType, reference: Any, tmp_path: Path, dtype: str
) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[NORM] = np.ones(tensors[NORM].shape, dtype)

    for how in ({}, {"dtype": "float32"}):
        words = message(backend, edited_folder(reference, tmp_path, edit), **how)
        assert (
            NORM in words
            and {"int8": "I8", "int32": "I32", "uint8": "U8", "uint32": "U32", "bool": "BOOL"}[dtype] in words
        )


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_an_fp8_weight_names_its_tensor_and_dtype(
    backend: ModuleType, reference: Any, tmp_path: Path, dtype: str
) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = load_torch(reference.path / SINGLE)
    tensors[UP] = tensors[UP].to(getattr(torch, dtype))
    save_torch(tensors, tmp_path / SINGLE)
    shutil.copy(reference.path / "config.json", tmp_path)
    words = message(backend, tmp_path)
    assert UP in words and "F8_" in words


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_double_precision_loads_or_is_refused_by_name(
    backend: ModuleType, reference: Any, tmp_path: Path, dtype: str | None
) -> None:
    def edit(tensors: Tensors) -> None:
        tensors.update({name: array.astype(np.float64) for name, array in tensors.items()})

    folder = edited_folder(reference, tmp_path, edit)
    try:
        model = backend.load(folder, dtype=dtype)
    except IvError as error:
        assert "F64" in str(error) or "float64" in str(error)
    else:
        np.testing.assert_allclose(model.logits(reference.inputs), reference.expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_one_sentence(backend: ModuleType, reference: Any, tmp_path: Path, keep: int) -> None:
    folder = edited_folder(reference, tmp_path)
    whole = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(whole[:keep])
    assert str(folder / SINGLE) in message(backend, folder)


def test_a_header_that_lies_is_one_sentence(backend: ModuleType, reference: Any, tmp_path: Path) -> None:
    folder = edited_folder(reference, tmp_path)
    whole = (folder / SINGLE).read_bytes()
    size = int.from_bytes(whole[:8], "little")
    honest = json.loads(whole[8 : 8 + size])

    def lie(**offsets: Any) -> str:
        header = json.loads(json.dumps(honest))
        header[NORM] |= offsets
        head = json.dumps(header).encode()
        (folder / SINGLE).write_bytes(len(head).to_bytes(8, "little") + head + whole[8 + size :])
        return message(backend, folder)

    start, stop = honest[NORM]["data_offsets"]
    for words in (
        lie(data_offsets=[len(whole), len(whole) + 512]),
        lie(data_offsets=[start - 4, stop - 4]),
        lie(data_offsets=[start, stop + 2**50]),
        lie(shape=[129]),
    ):
        assert str(folder / SINGLE) in words
    (folder / SINGLE).write_bytes((2**62).to_bytes(8, "little") + whole[8:])
    assert str(folder / SINGLE) in message(backend, folder)


def test_a_sharded_copy_is_the_same_model_and_its_missing_shards_are_named(
    backend: ModuleType, reference: Any, tmp_path: Path
) -> None:
    tensors = load_file(reference.path / SINGLE)
    raw = json.loads((reference.path / "config.json").read_text())
    specs = {name: TensorSpec(array.shape, "F32") for name, array in tensors.items()}
    write_checkpoint(tmp_path, raw, specs, tensors.items(), shard_bytes=10**6)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 4
    np.testing.assert_allclose(
        backend.load(tmp_path).logits(reference.inputs), reference.expected["logits"], rtol=0, atol=1e-4
    )
    shards[1].unlink()
    shards[3].unlink()
    words = message(backend, tmp_path)
    assert shards[1].name in words and shards[3].name in words and shards[0].name not in words


def test_an_index_that_leads_out_of_the_folder_is_refused(backend: ModuleType, reference: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    edited_folder(reference, folder)
    shutil.move(folder / SINGLE, tmp_path / SINGLE)
    (folder / INDEX).write_text(json.dumps({"weight_map": {NORM: f"../{SINGLE}"}}))
    assert f"../{SINGLE}" in message(backend, folder)


def test_config_and_tensors_that_disagree_show_both(backend: ModuleType, reference: Any, tmp_path: Path) -> None:
    raw = json.loads((reference.path / "config.json").read_text())
    raw["text_config"] |= {"attention": "m2la", "kv_lora_rank": 48, "rope_interleave": None}
    words = message(backend, edited_folder(reference, tmp_path, **raw), ConfigError)
    assert str(tmp_path / "config.json") in words
    assert ("48" in words and "56" in words) or ("'m2la'" in words and "'gqa'" in words)


def test_a_folder_without_config_or_weights_or_no_folder_is_one_sentence(
    backend: ModuleType, reference: Any, tmp_path: Path
) -> None:
    assert "config.json" in message(backend, tmp_path, ConfigError)
    shutil.copy(reference.path / "config.json", tmp_path)
    assert SINGLE in message(backend, tmp_path)
    assert "nowhere" in message(backend, tmp_path / "nowhere", IvError)
    assert "'int4'" in message(backend, tmp_path, BackendError, dtype="int4")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32(backend: ModuleType, reference: Any, dtype: str) -> None:
    """Rounding to 8 or 11 bits a few hundred times in a row: a few hundredths of the logits' spread, far from noise."""
    model = backend.load(reference.path, dtype=dtype)
    assert model.dtype == dtype
    expected = reference.expected["logits"]
    error = {"bfloat16": 0.05, "float16": 0.005}[dtype] * expected.std() * 4
    for model.form in ("expanded", "absorbed"):
        logits = model.logits(reference.inputs)
        assert logits.dtype == np.float32
        assert 0 < np.abs(logits - expected).max() < error
        cache = model.new_cache()
        model.prefill(reference.inputs, cache, chunk=7)
        assert np.abs(model.decode(int(reference.expected["greedy_ids"][0]), cache)
                      - reference.expected["greedy_logits"][1]).max() < error  # fmt: skip
    row = 2 * 5 * (88 if reference.path.name == "iv3-micro" else 128)
    assert cache.nbytes == 59 * row


@pytest.mark.parametrize(
    ("words", "dtype"),
    [(("norm",), "float16"), (("visual",), "float16"), (("language_model", "lm_head"), "float32")],
    ids=["norms stay float32", "vision stays float32", "text stays float32"],
)
def test_tensors_of_mixed_float_dtypes_run_in_that_of_most_numbers(
    backend: ModuleType, reference: Any, tmp_path: Path, words: tuple[str, ...], dtype: str
) -> None:

    def edit(tensors: Tensors) -> None:
        wide = {name for name in tensors if any(word in name for word in words)}
        tensors.update({name: array.astype(np.float16) for name, array in tensors.items() if name not in wide})

    model = backend.load(edited_folder(reference, tmp_path, edit))
    assert model.dtype == dtype
    expected = reference.expected["logits"]
    # The bound of float16 in test_half_precision_stays_near_float32.
    assert np.abs(model.logits(reference.inputs) - expected).max() < 0.005 * expected.std() * 4


def test_the_dtype_that_is_stored_is_kept_and_float32_can_be_asked_for(
    backend: ModuleType, reference: Any, tmp_path: Path
) -> None:
    def edit(tensors: Tensors) -> None:
        tensors.update({name: array.astype(np.float16) for name, array in tensors.items()})

    folder = edited_folder(reference, tmp_path, edit)
    assert backend.load(folder).dtype == "float16"
    wide = backend.load(folder, dtype="float32")
    assert wide.dtype == "float32"
    assert 0 < np.abs(wide.logits(reference.inputs) - reference.expected["logits"]).max() < 0.02


def test_tied_embeddings_are_the_head_and_a_head_beside_them_is_not_read(
    backend: ModuleType, reference: Any, tmp_path: Path
) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["model.language_model.embed_tokens.weight"] = tensors["lm_head.weight"]

    untied = backend.load(edited_folder(reference, tmp_path / "untied", edit))
    expected = untied.logits(reference.inputs)
    beside = backend.load(edited_folder(reference, tmp_path / "beside", edit, tie_word_embeddings=True))
    np.testing.assert_allclose(beside.logits(reference.inputs), expected, rtol=0, atol=1e-5)
    without = edited_folder(
        reference, tmp_path / "without", lambda tensors: (edit(tensors), tensors.pop("lm_head.weight")),
        tie_word_embeddings=True,
    )  # fmt: skip
    np.testing.assert_allclose(backend.load(without).logits(reference.inputs), expected, rtol=0, atol=1e-5)
    assert "lm_head.weight" in message(
        backend, edited_folder(reference, tmp_path / "lost", lambda tensors: tensors.pop("lm_head.weight"))
    )


def quantised_folder(reference: Any, folder: Path, bits: int, group_size: int) -> tuple[Path, Path]:
    """Two folders: MLX's packed form of the decoder's matrices, with one module in 8 bits and one in float, and the
    dense weights that these codes stand for."""
    mx = pytest.importorskip("mlx.core")
    tensors = load_file(reference.path / SINGLE)
    raw = json.loads((reference.path / "config.json").read_text())
    overrides = {
        "model.language_model.layers.1.mlp.gate_proj": {"bits": 8, "group_size": 32},
        "model.language_model.layers.2.self_attn.o_proj": False,
    }
    packed, dense = dict(tensors), dict(tensors)
    for name, array in tensors.items():
        module = name.removesuffix(".weight")
        own = overrides.get(module, {"bits": bits, "group_size": group_size})
        if "visual" in name or array.ndim != 2 or not isinstance(own, dict) or array.shape[1] % own["group_size"]:
            continue
        parts = mx.quantize(mx.array(array), **own)
        for suffix, part in zip(("weight", "scales", "biases"), parts, strict=True):
            packed[f"{module}.{suffix}"] = np.array(part)
        dense[name] = np.array(mx.dequantize(*parts, **own))
    for path, what in ((folder / "packed", packed), (folder / "dense", dense)):
        path.mkdir(parents=True)
        save_file(what, path / SINGLE)
    block = {"bits": bits, "group_size": group_size, "mode": "affine", **overrides}
    (folder / "dense" / "config.json").write_text(json.dumps(raw))
    (folder / "packed" / "config.json").write_text(
        json.dumps(raw | {"quantization": block, "quantization_config": block})
    )
    return folder / "packed", folder / "dense"


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 64), (4, 32), (5, 32), (6, 64), (8, 64)])
def test_a_folder_that_mlx_quantised_gives_the_same_on_both_backends(
    libraries: dict[str, ModuleType], reference: Any, tmp_path: Path, bits: int, group_size: int
) -> None:
    packed, dense = quantised_folder(reference, tmp_path, bits, group_size)
    expected = libraries["torch"].load(dense).logits(reference.inputs)
    assert np.abs(expected - reference.expected["logits"]).max() > 1e-3, "quantising changes something"
    for name, library in libraries.items():
        model = library.load(packed)
        assert model.config.quantization.bits == bits
        for model.form in ("expanded", "absorbed"):
            np.testing.assert_allclose(model.logits(reference.inputs), expected, rtol=0, atol=1e-3, err_msg=name)


def test_half_precision_scales_are_not_rounded_to_again_when_computing_in_float32(
    libraries: dict[str, ModuleType], reference: Any, tmp_path: Path
) -> None:
    packed, _ = quantised_folder(reference, tmp_path, 8, 32)
    tensors = load_file(packed / SINGLE)
    for name, array in tensors.items():
        if name.endswith((".scales", ".biases")):
            tensors[name] = array.astype(np.float16)
    save_file(tensors, packed / SINGLE)
    first, second = (library.load(packed, dtype="float32").logits(reference.inputs) for library in libraries.values())
    np.testing.assert_allclose(first, second, rtol=0, atol=5e-5)


def test_a_silent_config_reads_its_ranks_from_packed_shapes_too(reference: Any, tmp_path: Path) -> None:
    packed, _ = quantised_folder(reference, tmp_path, 4, 32)
    raw = json.loads((packed / "config.json").read_text())
    for field in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "attention_bias"):
        raw["text_config"].pop(field, None)
    (packed / "config.json").write_text(json.dumps(raw))
    assert ModelConfig.from_dir(packed).text.geometry == ModelConfig.from_dir(reference.path).text.geometry


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, block: block.update(bits=8),
        lambda tensors, block: block.update(group_size=32),
        lambda tensors, block: tensors.pop(UP.replace("weight", "biases")),
        lambda tensors, block: tensors.pop(UP.replace("weight", "scales")),
        lambda tensors, block: block.update({UP.removesuffix(".weight"): False}),
        lambda tensors, block: block.update({UP.removesuffix(".weight"): {"bits": 7}}),
        lambda tensors, block: block.update({UP.removesuffix(".weight"): {"bits": "four"}}),
        lambda tensors, block: block.update({UP.removesuffix(".weight"): {"group_size": 0}}),
        lambda tensors, block: block.update({UP.removesuffix(".weight"): 3}),
        lambda tensors, block: tensors.update({UP.replace("weight", "scales"): tensors[NORM]}),
    ],
    ids=["bits", "group size", "no biases", "no scales", "said to be float", "7 bits", "bits of a word", "no group",
         "a number", "scales of another shape"],
)  # fmt: skip
def test_packed_tensors_that_do_not_fit_their_block_are_one_sentence(
    backend: ModuleType, reference: Any, tmp_path: Path, damage: Callable[[Tensors, dict[str, Any]], Any]
) -> None:
    packed, _ = quantised_folder(reference, tmp_path, 4, 64)
    tensors, raw = load_file(packed / SINGLE), json.loads((packed / "config.json").read_text())
    damage(tensors, raw["quantization"])
    save_file(tensors, packed / SINGLE)
    (packed / "config.json").write_text(json.dumps(raw))
    words = message(backend, packed, IvError)
    assert str(packed) in words
    assert "model.language_model.layers." in words or "quantization" in words


def test_packed_tensors_without_a_block_are_one_sentence(backend: ModuleType, reference: Any, tmp_path: Path) -> None:
    packed, dense = quantised_folder(reference, tmp_path, 4, 64)
    shutil.copy(dense / "config.json", packed)
    words = message(backend, packed, IvError)
    assert str(packed) in words and ".scales" in words and "quantization" in words


def test_the_same_seed_gives_the_same_tokens_on_both_backends(libraries: dict[str, ModuleType], reference: Any) -> None:
    how = Sampling(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=17)
    answers = {}
    for name, library in libraries.items():
        model = library.load(reference.path)
        model.stop_ids = frozenset()
        answers[name] = list(model.generate(reference.inputs, max_tokens=24, sampling=how))
        assert list(model.generate(reference.inputs, max_tokens=24, sampling=how)) == answers[name]
    assert answers["mlx"] == answers["torch"]
    assert answers["mlx"][:12] != reference.expected["greedy_ids"].tolist()


def test_the_weights_of_torch_on_the_cpu_are_the_mapped_file(reference: Any) -> None:
    """/proc/self/maps tells which file an address belongs to; a copy of the weights would lie on the heap."""
    torch = pytest.importorskip("torch")
    if not Path("/proc/self/maps").exists() or torch.cuda.is_available():
        pytest.skip("needs Linux and weights on the CPU")
    network = pytest.importorskip("ivtorch").load(reference.path).network
    mapped = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(reference.path / SINGLE))
    ]
    for name, parameter in network.named_parameters():
        assert any(start <= parameter.data_ptr() < stop for start, stop in mapped), name
