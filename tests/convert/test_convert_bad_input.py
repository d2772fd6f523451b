"""Sources, targets and options that cannot be used: one sentence that names what is wrong, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.plan import Options
from convert.run import convert
from ivcore.errors import CheckpointError, ConfigError, IvError
from ivcore.shards import INDEX, SINGLE

LAYER = "model.language_model.layers.1."
DOWN, NORM, Q = f"{LAYER}mlp.down_proj.weight", f"{LAYER}input_layernorm.weight", f"{LAYER}self_attn.q_proj"
Refused = Callable[..., str]


@pytest.fixture
def source(tmp_path: Path, checkpoints: Any) -> Path:
    return checkpoints.make(tmp_path / "source")


@pytest.fixture
def sharded(tmp_path: Path, checkpoints: Any) -> Path:
    return checkpoints.make(tmp_path / "source", shards=3)


@pytest.fixture
def packed(tmp_path: Path, source: Path) -> Path:
    convert(source, tmp_path / "packed", Options(bits=4, group_size=32))
    (tmp_path / "packed" / "conversion.json").unlink()
    return tmp_path / "packed"


@pytest.fixture
def refused(tmp_path: Path, checkpoints: Any) -> Refused:
    """Function (source, target=tmp_path/out, options=Options(), **how) that gives the sentence of the refusal.

    All that is below tmp_path must stay as it is.
    """

    def attempt(source: Any, target: Any = None, options: Options | None = None, **how: Any) -> str:
        before = checkpoints.listing(tmp_path)
        with pytest.raises(IvError) as caught:
            convert(source, tmp_path / "out" if target is None else target, options, **how)
        assert checkpoints.listing(tmp_path) == before
        words = str(caught.value)
        assert "\n" not in words and words.endswith(".")
        return words

    return attempt


def edit(folder: Path, checkpoints: Any, **changes: Any) -> None:
    """Change tensors of a folder of one shard, by name: a new one, or None to leave it out."""
    tensors = checkpoints.read(folder) | changes
    checkpoints.write_file(folder / SINGLE, {name: stored for name, stored in tensors.items() if stored})


def set_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# Headers.


@pytest.mark.parametrize("length", [0, 7, 8, 100, 3_000, -1])
def test_a_truncated_shard_is_named(sharded: Path, refused: Refused, length: int) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    os.truncate(shard, length % shard.stat().st_size)
    assert str(shard) in refused(sharded)


def lie(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header[DOWN].update({key: value})


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "shape": lie("shape", [1, 2]),
    "as many numbers in another shape": lie("shape", [96, 64]),
    "negative shape": lie("shape", [-64, -96]),
    "fractional shape": lie("shape", [64.5, 96]),
    "huge shape": lie("shape", [2**62, 2**62]),
    "past the end": lie("data_offsets", [0, 10**12]),
    "overlap": lambda header: header[DOWN].update(data_offsets=header[NORM]["data_offsets"]),
    "negative offset": lie("data_offsets", [-1, 24_575]),
    "three offsets": lie("data_offsets", [0, 1, 2]),
    "no offsets": lambda header: header[DOWN].pop("data_offsets"),
    "no shape": lambda header: header[DOWN].pop("shape"),
    "another width": lie("dtype", "F16"),
    "no such dtype": lie("dtype", "F31"),
    "not an object": lambda header: header.update({DOWN: [1, 2]}),
    "empty": dict.clear,
}


@pytest.mark.parametrize("how", LIES)
def test_a_header_that_lies_is_named(source: Path, checkpoints: Any, refused: Refused, how: str) -> None:
    header, data = checkpoints.header(source / SINGLE)
    LIES[how](header)
    checkpoints.raw_file(source / SINGLE, header, data)
    words = refused(source)
    assert str(source / SINGLE) in words or (DOWN in words and str(source) in words)


@pytest.mark.parametrize("size", [2**63, 2**63 - 1, 2**40, 10**8, 10, 0])
def test_a_header_of_a_wrong_length_is_named(source: Path, checkpoints: Any, refused: Refused, size: int) -> None:
    header, data = checkpoints.header(source / SINGLE)
    checkpoints.raw_file(source / SINGLE, header, data, size=size)
    assert str(source / SINGLE) in refused(source)


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02}q\x00.", b"PK\x03\x04", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_a_file_that_is_no_safetensors_is_named(source: Path, refused: Refused, content: bytes) -> None:
    (source / SINGLE).write_bytes(content)
    assert str(source / SINGLE) in refused(source)


# Indexes.


def set_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


OUTSIDE = ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "config.json",
           "../source/model-00001-of-00003.safetensors"]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_that_leads_out_of_the_folder_is_refused(
    tmp_path: Path, sharded: Path, checkpoints: Any, refused: Refused, name: str
) -> None:
    (sharded / "sub").mkdir()
    for place in (tmp_path / "secret.safetensors", sharded / "sub" / "x.safetensors"):
        checkpoints.write_file(place, {"a": checkpoints.store(np.zeros(3, np.float32))})
    set_index(sharded, lambda weight_map: weight_map.update({DOWN: name}))
    words = refused(sharded)
    assert str(sharded / INDEX) in words and repr(name) in words


def test_absent_shards_are_all_named(sharded: Path, refused: Refused) -> None:
    first, *others = sorted(sharded.glob("*.safetensors"))
    for file in others:
        file.unlink()
    words = refused(sharded)
    assert all(file.name in words for file in others) and first.name not in words


def test_a_tensor_in_two_shards_names_the_tensor_and_both(sharded: Path, checkpoints: Any, refused: Refused) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    holder = next(shard for shard in shards if NORM in checkpoints.header(shard)[0])
    another = next(shard for shard in shards if shard != holder)
    header, data = checkpoints.header(another)
    header[NORM] = {"dtype": "F32", "shape": [64], "data_offsets": [len(data), len(data) + 256]}
    checkpoints.raw_file(another, header, data + b"\0" * 256)
    words = refused(sharded)
    assert NORM in words and str(holder) in words and str(another) in words


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\ud800"])
def test_an_index_that_says_nothing_is_named(sharded: Path, refused: Refused, content: str) -> None:
    (sharded / INDEX).write_bytes(content.encode(errors="surrogatepass"))
    assert str(sharded / INDEX) in refused(sharded)


# Links.


@pytest.mark.parametrize("name", [SINGLE, "tokenizer.json", "config.json", "chat_template.jinja", "LICENSE"])
@pytest.mark.parametrize("relative", [False, True])
def test_a_link_out_of_the_folder_is_refused(
    tmp_path: Path, source: Path, refused: Refused, name: str, relative: bool
) -> None:
    (source / name).rename(tmp_path / "private")
    (source / name).symlink_to("../private" if relative else tmp_path / "private")
    words = refused(source)
    assert str(source / name) in words and "private" in words


def test_a_link_to_another_repository_of_the_cache_or_to_the_blobs_of_no_snapshot_is_refused(
    tmp_path: Path, source: Path, refused: Refused
) -> None:
    for folder, place in ((tmp_path / "a" / "snapshots" / "1", "b/blobs"), (tmp_path / "c" / "d" / "1", "c/blobs")):
        shutil.copytree(source, folder)
        (tmp_path / place).mkdir(parents=True)
        (folder / "tokenizer.json").rename(tmp_path / place / "0")
        (folder / "tokenizer.json").symlink_to(tmp_path / place / "0")
        assert str(folder / "tokenizer.json") in refused(folder)


def test_a_chain_of_links_out_of_the_folder_is_refused(tmp_path: Path, source: Path, refused: Refused) -> None:
    (source / "tokenizer.json").rename(tmp_path / "private")
    (source / "hop").symlink_to(tmp_path / "private")
    (source / "tokenizer.json").symlink_to("hop")
    assert str(source / "tokenizer.json") in refused(source)


@pytest.mark.parametrize("name", [SINGLE, "tokenizer.json", "chat_template.jinja"])
def test_a_link_to_nothing_is_named_and_not_left_out(source: Path, refused: Refused, name: str) -> None:
    (source / name).unlink()
    (source / name).symlink_to("../../blobs/0123")
    assert name in refused(source)


# Source and target.


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "place",
    ["source", "source/out", "source/deep/out", "source/../source", ".", "link", "link/out", "link/../source/x"],
)
def test_a_target_in_the_source_or_around_it_is_refused(
    tmp_path: Path, source: Path, refused: Refused, place: str, force: bool
) -> None:
    (tmp_path / "link").symlink_to("source")
    assert str(source) in refused(source, tmp_path / place, force=force)
    assert str(source) in refused(tmp_path / "link", tmp_path / place, force=force)


@pytest.mark.parametrize("force", [False, True])
def test_a_source_in_the_target_stays(tmp_path: Path, checkpoints: Any, refused: Refused, force: bool) -> None:
    outer = checkpoints.make(tmp_path / "outer")
    inner = checkpoints.make(outer / "inner")
    (tmp_path / "link").symlink_to("outer")
    for source in (inner, tmp_path / "link" / "inner"):
        for target in (outer, tmp_path / "link"):
            assert str(outer) in refused(source, target, force=force)


def test_an_existing_target_is_kept_without_force(tmp_path: Path, source: Path, refused: Refused) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for how in ({}, {"resume": True}):
        words = refused(source, tmp_path / "full", **how)
        assert str(tmp_path / "full") in words and "--force" in words


@pytest.mark.parametrize("force", [False, True])
def test_a_target_that_is_a_file_is_kept(tmp_path: Path, source: Path, refused: Refused, force: bool) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        assert "is a file" in refused(source, tmp_path / name, force=force)
    assert str(tmp_path / "file") in refused(source, tmp_path / "file" / "below", force=force)


@pytest.mark.parametrize(
    "files",
    [
        ["letter.txt"],
        ["config.json"],
        ["config.json", "thesis.docx"],
        ["config.json", "package.json", "index.js"],
        ["config.json", SINGLE, "photos/cat.jpg"],
        ["config.json", SINGLE, "train.py", ".git/HEAD"],
    ],
    ids=lambda files: " ".join(files),
)
def test_force_replaces_no_folder_that_is_not_a_checkpoint(
    tmp_path: Path, source: Path, refused: Refused, files: list[str]
) -> None:
    for name in files:
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text("{}")
    assert str(tmp_path / "mine") in refused(source, tmp_path / "mine", force=True)


@pytest.mark.parametrize("target", ["/", ""])
def test_the_root_and_no_name_are_no_targets(
    tmp_path: Path, source: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(source, target)
    refused(source, target, force=True)


def test_a_target_through_a_loop_of_links_is_one_sentence(tmp_path: Path, source: Path, refused: Refused) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert str(tmp_path) in refused(source, tmp_path / "a" / "out")


def test_a_name_that_is_too_long_is_one_sentence(tmp_path: Path, source: Path, refused: Refused) -> None:
    assert "name" in refused(source, tmp_path / ("x" * 252)).lower()
    assert "name" in refused(source, tmp_path / ("x" * 300)).lower()


@pytest.mark.parametrize("place", ["the source", "a file beside the weights"])
def test_names_that_are_no_unicode_are_converted_or_refused_before_anything_is_written(
    tmp_path: Path, source: Path, checkpoints: Any, refused: Refused, place: str
) -> None:
    odd = os.fsdecode(b"\xff.txt")
    try:
        (source / odd).write_text("x") if place == "a file beside the weights" else source.rename(tmp_path / odd)
    except OSError:
        pytest.skip("this file system has no such names")
    folder = source if source.exists() else tmp_path / odd
    try:
        convert(folder, tmp_path / "out")
    except UnicodeError:
        pytest.fail("not one sentence")
    except IvError:
        refused(folder)
    else:
        assert checkpoints.read(tmp_path / "out") == checkpoints.read(folder)


def test_the_home_of_nobody_is_one_sentence(source: Path, refused: Refused) -> None:
    assert "~nosuchuser" in refused(source, "~nosuchuser/out")
    assert "~nosuchuser" in refused("~nosuchuser/in")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_target_that_may_not_be_written_is_one_sentence(tmp_path: Path, source: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match=str(tmp_path / "closed")):
        convert(source, tmp_path / "closed" / "out")


@pytest.mark.parametrize("source", ["absent", "file", "empty"])
def test_a_source_that_is_no_checkpoint_is_named(tmp_path: Path, refused: Refused, source: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / source) in refused(tmp_path / source)


def test_a_model_id_that_cannot_be_had_is_named(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert "someone/some-model" in refused("someone/some-model@main")


# Tensors.


@pytest.mark.parametrize(
    "dtype", ["I8", "U8", "I16", "I32", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64"]
)
@pytest.mark.parametrize("name", [DOWN, "model.visual.pos_embed.weight"])
def test_dtypes_that_cannot_be_converted_are_named(
    source: Path, checkpoints: Any, refused: Refused, name: str, dtype: str
) -> None:
    shape = checkpoints.read(source)[name].shape
    bits = {"16": 16, "32": 32, "64": 64, "F4": 4}.get(dtype[-2:], 8)
    data = b"\0" * (int(np.prod(shape)) * bits // 8)
    edit(source, checkpoints, **{name: checkpoints.read(source)[name]._replace(dtype=dtype, data=data)})
    words = refused(source)
    assert name in words and dtype in words and str(source) in words


def poisoned(stored: Any, value: float, place: int) -> Any:
    """A tensor with one number replaced."""
    dtype = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[stored.dtype]
    values = np.frombuffer(stored.data, dtype).copy()
    bits = np.array(value, "<f4").view("<u4") >> 16
    values[place] = bits if stored.dtype == "BF16" else value
    return stored._replace(data=values.tobytes())


@pytest.mark.parametrize(
    "options", [Options(), Options(dtype="bf16"), Options(dtype="fp16"), Options(bits=4), Options(bits=8, dtype="fp32")]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "place"), [(DOWN, 0), (DOWN, -1), (NORM, 5), ("model.visual.patch_embed.proj.weight", 9)]
)
def test_nan_and_infinity_name_file_and_tensor(
    source: Path, checkpoints: Any, refused: Refused, options: Options, value: float, name: str, place: int
) -> None:
    edit(source, checkpoints, **{name: poisoned(checkpoints.read(source)[name], value, place)})
    words = refused(source, None, options)
    assert str(source / SINGLE) in words and name in words and "NaN or infinity" in words


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_nan_is_found_in_every_dtype(tmp_path: Path, checkpoints: Any, refused: Refused, dtype: str) -> None:
    source = checkpoints.make(tmp_path / "source", dtype=dtype)
    edit(source, checkpoints, **{DOWN: poisoned(checkpoints.read(source)[DOWN], np.nan, 77)})
    assert DOWN in refused(source)


@pytest.mark.parametrize("options", [Options(), Options(bits=8), Options(dtype="fp32")])
@pytest.mark.parametrize("part", ["scales", "biases"])
def test_nan_in_packed_parts_is_named(
    packed: Path, checkpoints: Any, refused: Refused, options: Options, part: str
) -> None:
    name = f"{Q}.{part}"
    edit(packed, checkpoints, **{name: poisoned(checkpoints.read(packed)[name], np.nan, 3)})
    words = refused(packed, None, options)
    assert str(packed / SINGLE) in words and Q in words


@pytest.mark.parametrize("options", [Options(dtype="fp16"), Options(bits=4, dtype="fp16")])
@pytest.mark.parametrize("value", [65_520.0, -1e5])
def test_values_beyond_float16_are_named(
    source: Path, checkpoints: Any, refused: Refused, options: Options, value: float
) -> None:
    edit(source, checkpoints, **{DOWN: poisoned(checkpoints.read(source)[DOWN], value, 100)})
    words = refused(source, None, options)
    assert DOWN in words and "float16" in words and "--dtype" in words and "NaN" not in words


def test_folders_made_for_the_target_are_gone_after_a_failure(
    tmp_path: Path, source: Path, checkpoints: Any, refused: Refused
) -> None:
    edit(source, checkpoints, **{DOWN: poisoned(checkpoints.read(source)[DOWN], np.nan, 0)})
    refused(source, tmp_path / "a" / "b" / "out")


def test_the_largest_float16_is_not_beyond_it(tmp_path: Path, source: Path, checkpoints: Any) -> None:
    edit(source, checkpoints, **{DOWN: poisoned(checkpoints.read(source)[DOWN], 65_519.0, 100)})
    convert(source, tmp_path / "out", Options(dtype="fp16"))


def test_missing_unexpected_and_misshapen_tensors_are_all_named(
    source: Path, checkpoints: Any, refused: Refused
) -> None:
    more = checkpoints.store(np.zeros((3, 5), np.float32))
    edit(source, checkpoints, **{NORM: None, "model.xslinear.gate": more, DOWN: more})
    words = refused(source)
    assert f"missing {NORM} [64]" in words and "unexpected model.xslinear.gate [3, 5] F32" in words
    assert f"{DOWN} has shape [3, 5]" in words


@pytest.mark.parametrize("part", ["scales", "biases", "weight"])
def test_a_packed_module_without_one_of_its_parts_is_named(
    packed: Path, checkpoints: Any, refused: Refused, part: str
) -> None:
    edit(packed, checkpoints, **{f"{Q}.{part}": None})
    assert f"{Q}." in refused(packed)


@pytest.mark.parametrize("dtypes", [("F64", "F64"), ("F16", "F32"), ("F32", "BF16"), ("BF16", "F16")])
@pytest.mark.parametrize("options", [Options(), Options(dtype="fp32"), Options(bits=8)])
def test_packed_parts_of_other_dtypes_than_mlx_writes_are_named(
    packed: Path, checkpoints: Any, refused: Refused, dtypes: tuple[str, str], options: Options
) -> None:
    parts = {f"{Q}.{part}": dtype for part, dtype in zip(("scales", "biases"), dtypes, strict=True)}
    tensors = checkpoints.read(packed)
    edit(packed, checkpoints, **{name: checkpoints.store(checkpoints.values(tensors[name]), dtype)
                                 for name, dtype in parts.items()})  # fmt: skip
    assert f"{Q}." in refused(packed, None, options)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: (config.pop("quantization"), config.pop("quantization_config")),
        lambda config: config["quantization"].update(bits=8),
        lambda config: config["quantization"].update(group_size=64),
        lambda config: config["quantization"].update(mode="mxfp4"),
        lambda config: config["quantization"].update({Q: False}),
        lambda config: config["quantization"].update({Q: {"bits": 7, "group_size": 32}}),
    ],
)
def test_a_quantization_block_that_is_not_what_is_stored_is_refused(
    packed: Path, refused: Refused, change: Callable[[dict[str, Any]], Any]
) -> None:
    set_config(packed, change)
    words = refused(packed)
    assert str(packed) in words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: config["text_config"].pop("hidden_size"), "hidden_size"),
        (lambda config: config.update(model_type="llava"), "llava"),
        (lambda config: config["text_config"].update(num_hidden_layers=3), "layers.2"),
        (lambda config: config["text_config"].update(kv_lora_rank=32), "kv_lora_rank"),
    ],
)
def test_a_config_of_another_model_is_refused(source: Path, refused: Refused, change: Any, words: str) -> None:
    set_config(source, change)
    found = refused(source)
    assert words in found and str(source) in found


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{", b"\xff"])
def test_a_config_that_cannot_be_read_is_named(source: Path, refused: Refused, content: bytes | None) -> None:
    (source / "config.json").unlink()
    if content is not None:
        (source / "config.json").write_bytes(content)
    words = refused(source)
    assert "config.json" in words and str(source) in words


# Options.


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"bits": 7}, "--bits 7"),
        ({"bits": 0}, "--bits 0"),
        ({"bits": 16}, "--bits 16"),
        ({"bits": 4, "group_size": 16}, "--group-size 16"),
        ({"bits": 4, "group_size": 0}, "--group-size 0"),
        ({"dtype": "float16"}, "--dtype float16"),
        ({"dtype": ""}, "--dtype"),
        ({"recipe": "mixed"}, "'mixed'"),
        ({"recipe": ""}, "recipe"),
        ({"recipe": "mixed_4_6", "bits": 4}, "--recipe mixed_4_6"),
        ({"keep": ("lm_head",)}, "--keep"),
        ({"shard_bytes": 0}, "--shard-size"),
        ({"shard_bytes": -5}, "--shard-size"),
    ],
)
def test_options_that_cannot_be_met_are_named(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Options(**options)
    assert word in str(caught.value) and str(caught.value).endswith(".")


# Adapters.


@pytest.fixture
def adapter(tmp_path: Path) -> Iterator[Path]:
    """One that fits, to be spoiled."""
    from safetensors.numpy import save_file

    folder = tmp_path / "lora"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    factors = {"A": np.ones((2, 96), np.float32), "B": np.ones((64, 2), np.float32)}
    module = f"base_model.model.{DOWN.removesuffix('.weight')}"
    save_file({f"{module}.lora_{which}.weight": array for which, array in factors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    yield folder


def test_an_adapter_for_another_model_names_what_differs(
    tmp_path: Path, source: Path, adapter: Path, checkpoints: Any, refused: Refused
) -> None:
    options = Options(adapter=adapter)
    convert(source, tmp_path / "fits", options)
    module = DOWN.removesuffix(".weight")
    wider = checkpoints.make(tmp_path / "wider", intermediate_size=128)
    words = refused(wider, None, options)
    assert str(adapter) in words and module in words and "[64, 128]" in words and "[64, 96]" in words
    shorter = checkpoints.make(tmp_path / "shorter", num_hidden_layers=1)
    words = refused(shorter, None, replace(options, bits=4))
    assert str(adapter) in words and module in words


def test_an_adapter_that_is_none_is_named(tmp_path: Path, source: Path, adapter: Path, refused: Refused) -> None:
    assert str(tmp_path / "absent") in refused(source, None, Options(adapter=tmp_path / "absent"))
    assert str(source) in refused(source, None, Options(adapter=source))
    os.truncate(adapter / "adapter_model.safetensors", 500)
    assert str(adapter / "adapter_model.safetensors") in refused(source, None, Options(adapter=adapter))


@pytest.mark.parametrize("force", [False, True])
def test_a_target_that_is_the_adapter_or_in_it_or_around_it_is_refused(
    tmp_path: Path, source: Path, adapter: Path, checkpoints: Any, refused: Refused, force: bool
) -> None:
    options = Options(adapter=adapter)
    for target in (adapter, adapter / "out"):
        assert str(adapter) in refused(source, target, options, force=force)
    around = checkpoints.make(tmp_path / "around")
    adapter.rename(around / "lora")
    assert str(around) in refused(source, around, Options(adapter=around / "lora"), force=force)


def test_an_adapter_that_leads_to_infinity_names_the_tensor(source: Path, adapter: Path, refused: Refused) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1e38}))
    assert DOWN in refused(source, None, Options(adapter=adapter, dtype="fp16"))
