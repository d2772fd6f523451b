"""Safetensors folders: the manifest, headers that lie, indexes that do, and writing that is whole or not at all."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ivcore.checkpoint import check_specs, manifest
from ivcore.config import ModelConfig
from ivcore.errors import CheckpointError, ConfigError
from ivcore.shards import INDEX, SINGLE, Checkpoint, TensorSpec, write_checkpoint

REFERENCE = Path(__file__).resolve().parents[1] / "data" / "reference"
NAMES = ["iv3-micro", "qwen3vl-micro"]
TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.weight": np.linspace(-1, 1, 10).astype(np.float16),
    "c.scales": np.array([[7]], np.uint32),
    "d.scalar": np.array(2.5, np.float32),
    "e.weight": np.full((5, 2), 0x3F80, np.uint16),  # bfloat16 bits of 1.0
}
DTYPES = {"a.weight": "F32", "b.weight": "F16", "c.scales": "U32", "d.scalar": "F32", "e.weight": "BF16"}
SPECS = {name: TensorSpec(array.shape, DTYPES[name]) for name, array in TENSORS.items()}


def raw_file(path: Path, header: Any, data: bytes = b"", size: int | None = None) -> Path:
    """A safetensors file with any header: a JSON value or bytes; `size`: the length that the file says it has."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head) if size is None else size) + head + data)
    return path


def entry(start: int, stop: int, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def message(folder: Path) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        Checkpoint(folder)
    words = str(caught.value)
    assert "\n" not in words and words.endswith(".")
    return words


@pytest.mark.parametrize("name", NAMES)
def test_the_manifest_is_the_reference_s_tensors(name: str) -> None:
    tensors = load_file(REFERENCE / name / SINGLE)
    assert manifest(ModelConfig.from_dir(REFERENCE / name)) == {key: array.shape for key, array in tensors.items()}


@pytest.mark.parametrize("name", NAMES)
def test_reading_gives_the_stored_numbers_without_reading_them_into_memory(name: str) -> None:
    checkpoint, tensors = Checkpoint(REFERENCE / name), load_file(REFERENCE / name / SINGLE)
    assert checkpoint.shapes().keys() == tensors.keys()
    assert checkpoint.nbytes() == sum(array.nbytes for array in tensors.values())
    for key, array in tensors.items():
        view = checkpoint.read(key)
        assert isinstance(view, np.memmap) and not view.flags.writeable
        np.testing.assert_array_equal(view, array)


@pytest.mark.parametrize("shard_bytes", [1, 50, 70, 2**30])
def test_what_is_written_is_read_back_in_any_number_of_shards(tmp_path: Path, shard_bytes: int) -> None:
    write_checkpoint(tmp_path, {"model_type": "x"}, SPECS, TENSORS.items(), shard_bytes=shard_bytes)
    shards = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert (shards == [SINGLE]) == (shard_bytes == 2**30)
    assert (tmp_path / INDEX).exists() == (len(shards) > 1)
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "x"}
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.specs == SPECS
    for key, array in TENSORS.items():
        np.testing.assert_array_equal(checkpoint.read(key), array)
        with safe_open(checkpoint.files[key], framework="np") as outside:
            if key != "e.weight":  # NumPy has no bfloat16
                np.testing.assert_array_equal(outside.get_tensor(key), array)
    if len(shards) > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["weight_map"] == {key: file.name for key, file in checkpoint.files.items()}
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in TENSORS.values())
        assert {shard[-len("-of-00001.safetensors") :] for shard in shards} == {f"-of-{len(shards):05d}.safetensors"}


def test_a_shard_is_never_larger_than_asked_unless_one_tensor_is(tmp_path: Path) -> None:
    tensors = {f"t{index}": np.zeros(10, np.float32) for index in range(7)}
    specs = {name: TensorSpec((10,), "F32") for name in tensors}
    write_checkpoint(tmp_path, {}, specs, tensors.items(), shard_bytes=90)
    assert [len(load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))] == [2, 2, 2, 1]


def test_non_contiguous_tensors_are_written_right(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    write_checkpoint(tmp_path, {}, {"t": TensorSpec((4, 3), "F32")}, [("t", array)])
    np.testing.assert_array_equal(load_file(tmp_path / SINGLE)["t"], array)


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    folder = tmp_path / "new"
    with pytest.raises(CheckpointError, match="room") as caught:
        write_checkpoint(folder, {}, SPECS, TENSORS.items())
    assert str(folder) in str(caught.value)
    assert not folder.exists() or not list(folder.iterdir())


def full_after(monkeypatch: Any, writes: int) -> None:
    """Every write to a new file after the first `writes` finds the disk full."""
    real_open, count = builtins.open, iter(range(10**6))

    class Full:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self.stream.close()

        def __iter__(self) -> Iterator[Any]:
            return iter(self.stream)

        def write(self, content: Any) -> int:
            if next(count) >= writes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.stream.write(content)

    def path_open(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        stream = real_open(self, mode, *rest, **options)
        return Full(stream) if "w" in mode else stream

    monkeypatch.setattr(Path, "open", path_open)
    monkeypatch.setattr(
        "io.open", lambda file, mode="r", *rest, **options: path_open(Path(file), mode, *rest, **options)
    )


@pytest.mark.parametrize("shard_bytes", [50, 2**30])
@pytest.mark.parametrize("writes", [0, 1, 3, 5, 6, 7, 8, 9, 10])
def test_a_disk_that_fills_up_while_writing_leaves_no_file(
    tmp_path: Path, monkeypatch: Any, writes: int, shard_bytes: int
) -> None:
    with monkeypatch.context() as patch:
        full_after(patch, writes)
        try:
            write_checkpoint(tmp_path, {"a": 1}, SPECS, TENSORS.items(), shard_bytes=shard_bytes)
        except CheckpointError as error:
            assert "No space left" in str(error) and str(tmp_path) in str(error)
        else:
            patch.undo()
            assert Checkpoint(tmp_path).specs == SPECS  # it was done before the disk was full
            return
    assert [file.name for file in tmp_path.iterdir()] == []


def test_writing_over_a_checkpoint_leaves_nothing_of_the_old_one_in_use(tmp_path: Path) -> None:
    other = {"old": np.zeros(30, np.float32), "older": np.ones(30, np.float32)}
    specs = {name: TensorSpec((30,), "F32") for name in other}
    write_checkpoint(tmp_path, {}, specs, other.items(), shard_bytes=120)
    write_checkpoint(tmp_path, {}, SPECS, TENSORS.items())
    assert Checkpoint(tmp_path).specs == SPECS


@pytest.mark.parametrize("given", [2, 4, 6])
def test_another_number_of_tensors_than_announced_is_no_checkpoint(tmp_path: Path, given: int) -> None:
    names = [*TENSORS, "f.more"][:given]
    tensors = [(name, TENSORS.get(name, np.zeros(1, np.float32))) for name in names]
    with pytest.raises((CheckpointError, ValueError)):
        write_checkpoint(tmp_path, {}, SPECS, tensors)
    assert [file.name for file in tmp_path.iterdir()] == []


def test_a_tensor_of_another_name_or_size_than_announced_is_no_checkpoint(tmp_path: Path) -> None:
    for tensors in ([("b", np.zeros(2, np.float32))], [("a", np.zeros(3, np.float32))]):
        with pytest.raises((CheckpointError, ValueError), match="a"):
            write_checkpoint(tmp_path, {}, {"a": TensorSpec((2,), "F32")}, tensors)
        assert [file.name for file in tmp_path.iterdir()] == []


LIES = {
    "offsets past the end": ({"a": entry(0, 8), "b": entry(8, 16)}, b"\0" * 8),
    "a truncated file": ({"a": entry(0, 8)}, b"\0" * 5),
    "bytes left over": ({"a": entry(0, 8)}, b"\0" * 20),
    "overlapping": ({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12),
    "a hole": ({"a": entry(0, 8), "b": entry(12, 20)}, b"\0" * 20),
    "backwards": ({"a": entry(8, 0)}, b"\0" * 8),
    "negative": ({"a": entry(-8, 0)}, b"\0" * 8),
    "another size than the shape": ({"a": entry(0, 8, (3,))}, b"\0" * 8),
    "a shape whose size overflows": ({"a": entry(0, 8, (2**33, 2**33))}, b"\0" * 8),
    "an unknown dtype": ({"a": entry(0, 8, dtype="F31")}, b"\0" * 8),
    "a list": ([1, 2], b""),
    "no JSON": (b"{nothing", b""),
    "no text": (b"\xff\xfe\xfd\xfc", b""),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_one_sentence_that_names_the_file(tmp_path: Path, lie: str) -> None:
    raw_file(tmp_path / SINGLE, *LIES[lie])
    words = message(tmp_path)
    assert str(tmp_path / SINGLE) in words and "damaged" in words


@pytest.mark.parametrize("size", [2**63, 2**40, 10**9, 200, 0])
def test_a_header_of_absurd_length_is_one_sentence(tmp_path: Path, size: int) -> None:
    raw_file(tmp_path / SINGLE, {"a": entry(0, 8)}, b"\0" * 8, size=size)
    assert str(tmp_path / SINGLE) in message(tmp_path)


@pytest.mark.parametrize("content", [b"", b"abc", b"\0" * 8, b"PK\x03\x04" + b"\0" * 64, b"<html>not found</html>"])
def test_a_file_that_is_no_safetensors_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    assert str(tmp_path / SINGLE) in message(tmp_path)


def test_a_shard_that_is_a_folder_or_unreadable_is_one_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / SINGLE).mkdir()
    assert str(tmp_path / SINGLE) in message(tmp_path)
    (tmp_path / SINGLE).rmdir()
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / SINGLE)

    def denied(*args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("ivcore.shards.safe_open", denied)
    words = message(tmp_path)
    assert str(tmp_path / SINGLE) in words and "Permission denied" in words


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_one_sentence(tmp_path: Path) -> None:
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / SINGLE)
    (tmp_path / SINGLE).chmod(0)
    assert str(tmp_path / SINGLE) in message(tmp_path)


def sharded(folder: Path) -> dict[str, Any]:
    write_checkpoint(folder, {}, SPECS, TENSORS.items(), shard_bytes=1)
    return json.loads((folder / INDEX).read_text())


def rewrite_index(folder: Path, index: Any) -> None:
    (folder / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))


def test_missing_shards_are_all_named(tmp_path: Path) -> None:
    names = sorted(set(sharded(tmp_path)["weight_map"].values()))
    assert len(names) > 2
    for name in names[1:]:
        (tmp_path / name).unlink()
    words = message(tmp_path)
    assert all(name in words for name in names[1:]) and names[0] not in words


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "."])
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    index = sharded(folder)
    shutil.copy(folder / index["weight_map"]["a.weight"], tmp_path / SINGLE)
    index["weight_map"]["a.weight"] = name
    rewrite_index(folder, index)
    assert str(folder / INDEX) in message(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 3}}, [], "{", ""])
def test_an_index_without_a_map_is_one_sentence(tmp_path: Path, index: Any) -> None:
    sharded(tmp_path)
    rewrite_index(tmp_path, index)
    assert str(tmp_path / INDEX) in message(tmp_path)


def test_a_tensor_in_two_shards_is_one_sentence_that_names_both(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    save_file({"a.weight": TENSORS["a.weight"]}, tmp_path / "extra.safetensors")
    index["weight_map"]["more"] = "extra.safetensors"
    rewrite_index(tmp_path, index)
    words = message(tmp_path)
    assert "a.weight" in words and "extra.safetensors" in words and index["weight_map"]["a.weight"] in words


def test_a_folder_without_weights_or_no_folder_is_one_sentence(tmp_path: Path) -> None:
    assert SINGLE in message(tmp_path) and str(tmp_path) in message(tmp_path)
    assert "nowhere does not exist" in message(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "is not a folder" in message(tmp_path / "file")


def reference_specs() -> tuple[ModelConfig, dict[str, TensorSpec]]:
    config = ModelConfig.from_dir(REFERENCE / "iv3-micro")
    return config, {name: TensorSpec(shape, "F32") for name, shape in manifest(config).items()}


def mismatch(specs: dict[str, TensorSpec], config: ModelConfig) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_specs(specs, config, "some/folder")
    assert str(caught.value).startswith("some/folder") and "\n" not in str(caught.value)
    return str(caught.value)


def test_tensors_that_fit_pass() -> None:
    config, specs = reference_specs()
    check_specs(specs, config, "some/folder")


def test_every_missing_unexpected_and_misshapen_tensor_is_listed() -> None:
    config, specs = reference_specs()
    layer = "model.language_model.layers.3."
    del specs[f"{layer}mlp.up_proj.weight"], specs["model.visual.merger.norm.bias"]
    specs |= {"model.xslinear.gate": TensorSpec((3, 5), "BF16"), "model.xslinear.up": TensorSpec((7,), "F32")}
    specs[f"{layer}self_attn.o_proj.weight"] = TensorSpec((128, 64), "F32")
    specs["lm_head.weight"] = TensorSpec((128, 512), "F32")
    words = mismatch(specs, config)
    assert "6 tensors" in words
    assert f"missing {layer}mlp.up_proj.weight [256, 128]" in words
    assert "missing model.visual.merger.norm.bias [64]" in words
    assert "unexpected model.xslinear.gate [3, 5] BF16" in words
    assert "unexpected model.xslinear.up [7] F32" in words
    assert f"{layer}self_attn.o_proj.weight has shape [128, 64], but the config says [128, 128]" in words
    assert "lm_head.weight has shape [128, 512], but the config says [512, 128]" in words


def test_a_head_beside_tied_embeddings_may_stay() -> None:
    raw = json.loads((REFERENCE / "iv3-micro" / "config.json").read_text()) | {"tie_word_embeddings": True}
    config = ModelConfig.from_dict(raw)
    specs = {name: TensorSpec(shape, "F32") for name, shape in manifest(config).items()}
    assert "lm_head.weight" not in specs
    check_specs(specs, config, "some/folder")
    check_specs(specs | {"lm_head.weight": TensorSpec((512, 128), "F32")}, config, "some/folder")


@pytest.mark.parametrize("dtype", ["I8", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "U32"])
def test_a_dtype_that_is_no_float_is_refused_by_name(dtype: str) -> None:
    config, specs = reference_specs()
    specs["model.language_model.norm.weight"] = TensorSpec((128,), dtype)
    words = mismatch(specs, config)
    assert "model.language_model.norm.weight" in words and dtype in words
