"""Small checkpoints of any form to convert, and what a folder holds as the safetensors library reads it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors

from ivcore.checkpoint import manifest
from ivcore.config import ModelConfig

REFERENCE = Path(__file__).resolve().parents[1] / "data" / "reference"
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
Raw = dict[str, Any]


class Stored(NamedTuple):
    """A tensor as a file holds it: safetensors dtype, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


Tensors = dict[str, Stored]


class Checkpoints:
    """Writes checkpoints, however wrong, without the code under test, and reads them with the safetensors library."""

    def make(self, folder: Path, attention: str = "release", dtype: str = "F32", shards: int = 1, **text: Any) -> Path:
        """A random checkpoint; text: fields of text_config."""
        config = self.config(attention, **text)
        return self.write(folder, config, self.random(config, dtype), shards)

    @staticmethod
    def config(attention: str = "release", **text: Any) -> Raw:
        """A small config.json's content.

        All columns of the decoder are whole groups of 32, those of all but `down_proj` of 64.
        """
        fields: Raw = {
            "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "rms_norm_eps": 1e-6,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 10_000.0,
            "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]},
            "attention": "gqa" if attention == "gqa" else "m2la",
        }  # fmt: skip
        if attention != "gqa":
            fields |= {"attention_layout": attention, "kv_lora_rank": 64}
        if attention == "release":
            fields |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "attention_bias": True}
        fields |= text
        vision = {
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 2,
            "spatial_merge_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [1],
            "out_hidden_size": fields["hidden_size"],
        }  # fmt: skip
        return {
            "model_type": "internvideo3", "text_config": fields, "vision_config": vision, "torch_dtype": "float32",
            "image_token_id": 94, "video_token_id": 95, "tie_word_embeddings": False,
        }  # fmt: skip

    def random(self, config: Raw, dtype: str = "F32", seed: int = 0) -> Tensors:
        """Random tensors for a config.json's content."""
        random = np.random.default_rng(seed)
        tensors = {}
        for name, shape in manifest(ModelConfig.from_dict(config)).items():
            values = random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
            values = 1 + values / 4 if "norm" in name and name.endswith("weight") else values
            tensors[name] = self.store(values.astype(np.float32), dtype)
        return tensors

    @staticmethod
    def store(values: np.ndarray, dtype: str = "F32") -> Stored:
        """float32 values in another float dtype; bfloat16 is rounded by torch."""
        if dtype == "BF16":
            torch = pytest.importorskip("torch")
            bits = torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16).numpy()
            return Stored(dtype, values.shape, bits.tobytes())
        return Stored(dtype, values.shape, values.astype(NUMPY[dtype]).tobytes())

    @staticmethod
    def values(stored: Stored) -> np.ndarray:
        """A tensor's values, to be written to; bfloat16 as float32."""
        if stored.dtype == "BF16":
            wide = np.frombuffer(stored.data, "<u2").astype(np.uint32) << 16
            return wide.view(np.float32).reshape(stored.shape)
        dtype = {**NUMPY, "U32": "<u4"}[stored.dtype]
        return np.frombuffer(stored.data, dtype).reshape(stored.shape).copy()

    def write(self, folder: Path, config: Mapping[str, Any], tensors: Tensors,
              shards: int | Sequence[Sequence[str]] = 1) -> Path:  # fmt: skip
        """A checkpoint with some files beside it.

        shards: how many, dealt out in turn, so that neighbours lie in different files; or the names in each.
        """
        folder.mkdir(parents=True, exist_ok=True)
        names = list(tensors)
        groups = [names[start::shards] for start in range(shards)] if isinstance(shards, int) else shards
        count = len(groups)
        files = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        files = ["model.safetensors"] if count == 1 else files
        for file, group in zip(files, groups, strict=True):
            self.write_file(folder / file, {name: tensors[name] for name in group})
        if count > 1:
            weight_map = {name: file for file, group in zip(files, groups, strict=True) for name in group}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_bytes('{"über": "\\u6f22"}\r\n'.encode())
        (folder / "chat_template.jinja").write_bytes(b"{{ messages }}\n\n")
        (folder / "LICENSE").write_bytes(b"Do as you like.\x00\xff")
        return folder

    def write_file(self, file: Path, tensors: Tensors) -> Path:
        header, offset = {}, 0
        for name, stored in tensors.items():
            stop = offset + len(stored.data)
            header[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [offset, stop]}
            offset = stop
        return self.raw_file(file, header, b"".join(stored.data for stored in tensors.values()))

    @staticmethod
    def raw_file(file: Path, header: Any, data: bytes = b"", size: int | None = None) -> Path:
        """A safetensors file with any header: a JSON value or bytes; size: the length that the file says it has."""
        head = header if isinstance(header, bytes) else json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(head) if size is None else size) + head + data)
        return file

    @staticmethod
    def header(file: Path) -> tuple[Raw, bytes]:
        """A file's header, and what follows it."""
        content = file.read_bytes()
        stop = 8 + int.from_bytes(content[:8], "little")
        return json.loads(content[8:stop]), content[stop:]

    @staticmethod
    def read(folder: Path) -> Tensors:
        """Every tensor of every shard; a name twice fails."""
        found: Tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            for name, entry in safetensors.deserialize(file.read_bytes()):
                assert name not in found
                found[name] = Stored(entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        return found

    @staticmethod
    def listing(folder: Path) -> dict[str, Any]:
        """All that is below a folder: relative name -> bytes, a link's target, None for a folder."""
        found: dict[str, Any] = {}
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            linked = f"-> {path.readlink()}" if path.is_symlink() else None
            found[name] = linked or (None if path.is_dir() else path.read_bytes())
        return found


@pytest.fixture(scope="module", autouse=True)
def no_flushing() -> Iterator[None]:
    """Waiting for the disk takes longer than all else here, and shows nothing that a test can see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        patch.setattr("os.posix_fadvise", lambda *arguments: None, raising=False)
        yield


@pytest.fixture(scope="session")
def checkpoints() -> Checkpoints:
    return Checkpoints()


@pytest.fixture(scope="session")
def micro() -> Path:
    """The reference checkpoint of the release's form; not to be written to."""
    return REFERENCE / "iv3-micro"
