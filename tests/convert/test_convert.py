"""`convert` without packing: exact copies, torch's casts, blocks and shards that change nothing, a true record."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import stream
from convert.plan import Options, make_plan, summarize
from convert.run import convert
from convert.source import open_source

SIDE_FILES = ("tokenizer.json", "chat_template.jinja", "LICENSE")
few = settings(max_examples=12)


@pytest.fixture
def source(tmp_path: Path, checkpoints: Any) -> Path:
    """A float32 checkpoint in three shards."""
    return checkpoints.make(tmp_path / "source", shards=3)


@pytest.mark.parametrize("shard_bytes", [1, 5_000, 100_000, 10**9])
@pytest.mark.parametrize("shards", [1, 4])
def test_without_options_tensors_and_the_files_beside_them_are_copied_bit_for_bit(
    tmp_path: Path, checkpoints: Any, shards: int, shard_bytes: int
) -> None:
    source, target = checkpoints.make(tmp_path / "in", shards=shards), tmp_path / "out"
    convert(source, target, Options(shard_bytes=shard_bytes))
    assert checkpoints.read(target) == checkpoints.read(source)
    for name in SIDE_FILES:
        assert (target / name).read_bytes() == (source / name).read_bytes()
    for file in target.glob("*.safetensors"):
        header, data = checkpoints.header(file)
        assert len(data) <= shard_bytes or header.keys() - {"__metadata__"} == {[*header][-1]}
    assert len(list(target.glob("*.safetensors"))) >= 500_000 // (shard_bytes + 25_000)


@pytest.mark.parametrize("name", ["iv3-micro", "qwen3vl-micro"])
def test_the_reference_checkpoints_are_copied_bit_for_bit(
    tmp_path: Path, micro: Path, checkpoints: Any, name: str
) -> None:
    source, target = micro.with_name(name), tmp_path / "out"
    convert(source, target, Options(shard_bytes=10**6))
    assert checkpoints.read(target) == checkpoints.read(source)
    for file in source.glob("*_config.json"):
        assert (target / file.name).read_bytes() == file.read_bytes()


some_dtypes = st.lists(st.sampled_from(["F32", "F16", "BF16"]), min_size=1, max_size=5)


@few
@given(attention=st.sampled_from(["release", "norm", "gqa"]), tied=st.booleans(), padding=st.integers(0, 8),
       dtypes=some_dtypes, seed=st.integers(0, 99))  # fmt: skip
def test_every_tensor_keeps_its_own_dtype_in_every_layout(
    checkpoints: Any, attention: str, tied: bool, padding: int, dtypes: list[str], seed: int
) -> None:
    config = {**checkpoints.config(attention), "tie_word_embeddings": tied}
    by_dtype = {dtype: checkpoints.random(config, dtype, seed) for dtype in set(dtypes)}
    tensors = {name: by_dtype[dtypes[index % len(dtypes)]][name] for index, name in enumerate(by_dtype[dtypes[0]])}
    with tempfile.TemporaryDirectory() as folder:
        source, target = checkpoints.write(Path(folder) / "in", config, tensors), Path(folder) / "out"
        # Other writers do not pad headers, so that data may begin at any byte.
        header, data = checkpoints.header(source / "model.safetensors")
        checkpoints.raw_file(source / "model.safetensors", json.dumps(header).encode() + b" " * padding, data)
        convert(source, target)
        assert checkpoints.read(target) == tensors


CASTS = [("F32", "bf16"), ("F32", "fp16"), ("BF16", "fp32"), ("F16", "fp32"), ("BF16", "fp16"), ("F16", "bf16"),
         ("F64", "bf16"), ("F64", "fp32"), ("F64", "fp16"), ("F16", "fp16")]  # fmt: skip


@pytest.mark.parametrize(("stored_as", "dtype"), CASTS)
def test_a_cast_is_torch_s(tmp_path: Path, checkpoints: Any, stored_as: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    wanted = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}[dtype]
    source = checkpoints.make(tmp_path / "in", dtype=stored_as)
    convert(source, tmp_path / "out", Options(dtype=dtype))
    found, given = checkpoints.read(tmp_path / "out"), checkpoints.read(source)
    assert found.keys() == given.keys()
    for name, stored in given.items():
        values = torch.frombuffer(bytearray(stored.data), dtype=kinds[stored_as]).float().to(kinds[wanted])
        expected = values.view(torch.uint8).numpy().tobytes()
        assert found[name] == (wanted, stored.shape, expected), name


def test_bf16_to_fp32_and_back_changes_nothing(tmp_path: Path, checkpoints: Any) -> None:
    source = checkpoints.make(tmp_path / "in", dtype="BF16")
    convert(source, tmp_path / "wide", Options(dtype="fp32"))
    convert(tmp_path / "wide", tmp_path / "out", Options(dtype="bf16"))
    assert checkpoints.read(tmp_path / "out") == checkpoints.read(source)
    assert {stored.dtype for stored in checkpoints.read(tmp_path / "wide").values()} == {"F32"}


@pytest.mark.parametrize("value", [-0.0, 1e-45, -1e-40, 3.3e38])
def test_the_edges_of_float32_are_copied_bit_for_bit(tmp_path: Path, checkpoints: Any, value: float) -> None:
    config = checkpoints.config()
    edge = checkpoints.store(np.full((96, 64), value, np.float32))
    tensors = {**checkpoints.random(config), "lm_head.weight": edge}
    convert(checkpoints.write(tmp_path / "in", config, tensors), tmp_path / "out")
    assert checkpoints.read(tmp_path / "out") == tensors


def test_double_precision_becomes_float32_in_the_tensors_and_in_the_config(tmp_path: Path, checkpoints: Any) -> None:
    config = {**checkpoints.config(dtype="float64"), "torch_dtype": "float64"}
    tensors = checkpoints.random(config, "F64")
    convert(checkpoints.write(tmp_path / "in", config, tensors), tmp_path / "out")
    for name, stored in checkpoints.read(tmp_path / "out").items():
        assert stored == checkpoints.store(checkpoints.values(tensors[name]), "F32")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == config["text_config"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("dtype", "said"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"), (None, "x")]
)
def test_the_config_says_the_dtype_wherever_the_source_s_did(
    tmp_path: Path, checkpoints: Any, dtype: str | None, said: str
) -> None:
    config = {**checkpoints.config(torch_dtype="x"), "dtype": "x", "mine": {"kept": [1, 2.5, "x"]}}
    del config["torch_dtype"]
    convert(
        checkpoints.write(tmp_path / "in", config, checkpoints.random(config)), tmp_path / "out", Options(dtype=dtype)
    )
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["dtype"] == written["text_config"]["torch_dtype"] == said
    assert written["mine"] == config["mine"] and "torch_dtype" not in written and "quantization" not in written


# Blocks and threads.

OPTIONS = [
    Options(),
    Options(dtype="fp16", shard_bytes=30_000),
    Options(bits=4, group_size=32, shard_bytes=9_000),
    Options(recipe="mixed_3_6", dtype="bf16", shard_bytes=1),
]


@few
@given(options=st.sampled_from(OPTIONS), shards=st.integers(1, 4), packed=st.booleans(), block=st.integers(1, 400),
       workers=st.integers(1, 4), in_flight=st.integers(1, 4))  # fmt: skip
def test_blocks_threads_and_the_source_s_shards_change_no_byte(
    checkpoints: Any, options: Options, shards: int, packed: bool, block: int, workers: int, in_flight: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = checkpoints.make(folder / "in", shards=shards, vocab_size=97, num_hidden_layers=1)
        if packed:
            convert(source, folder / "packed" / "in", Options(bits=5, shard_bytes=11_000))
            source = folder / "packed" / "in"
        convert(source, folder / "plain", options)
        seen: list[tuple[int, int]] = []
        with patch.multiple(stream, BLOCK_BYTES=block, WORKERS=workers, IN_FLIGHT=in_flight):
            convert(source, folder / "blocks", options, on_progress=lambda done, total: seen.append((done, total)))
        assert checkpoints.listing(folder / "blocks") == checkpoints.listing(folder / "plain")
        total = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        assert seen[-1] == (total, total) and seen == sorted(seen) and len(seen) > 3


# The record.


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "options", [Options(), Options(bits=4, shard_bytes=20_000), Options(dtype="fp16", shard_bytes=1)]
)
def test_the_record_holds_the_sha256_of_all_that_was_read_and_written(
    tmp_path: Path, source: Path, checkpoints: Any, options: Options
) -> None:
    target = tmp_path / "out"
    convert(source, target, options)
    record = json.loads((target / "conversion.json").read_text())
    for folder, entries in ((source, record["sources"]), (target, record["shards"])):
        assert entries.keys() == {file.name for file in folder.glob("*.safetensors")}
        for name, entry in entries.items():
            content = (folder / name).read_bytes()
            assert (entry["sha256"], entry["nbytes"]) == (sha256(content), len(content))
    hashes = {name: digest for shard in record["shards"].values() for name, digest in shard["tensors"].items()}
    assert hashes == {name: sha256(stored.data) for name, stored in checkpoints.read(target).items()}
    others = {file.name for file in target.iterdir()} - record["shards"].keys() - {"conversion.json"}
    assert record["files"] == {name: sha256((target / name).read_bytes()) for name in others}
    assert {*SIDE_FILES, "config.json"} <= others
    assert ("model.safetensors.index.json" in others) == (len(record["shards"]) > 1)


def test_the_record_says_source_options_and_versions_but_no_path_of_this_machine_and_no_time(
    tmp_path: Path, source: Path
) -> None:
    convert(source, tmp_path / "out", Options(bits=8, group_size=32, keep=("lm_head",), shard_bytes=50_000))
    record = json.loads((tmp_path / "out/conversion.json").read_text())
    assert record["source"] == "source" and record["revision"] is None
    said = {"bits": 8, "group_size": 32, "dtype": None, "keep": ["lm_head"], "recipe": None, "shard_bytes": 50_000}
    assert record["options"] == said
    assert record["versions"]["numpy"] == np.__version__ and "ivmlx" in record["versions"]
    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
    keys = re.findall(r'"(\w+)":', (tmp_path / "out/conversion.json").read_text())
    assert not {"time", "date", "created", "host", "path"} & set(keys)


def test_the_same_source_elsewhere_gives_the_same_bytes_in_every_file(
    tmp_path: Path, source: Path, checkpoints: Any
) -> None:
    elsewhere = tmp_path / "deep" / "source"
    shutil.copytree(source, elsewhere, copy_function=shutil.copyfile)
    options = Options(bits=4, shard_bytes=20_000)
    convert(source, tmp_path / "one", options)
    convert(elsewhere, tmp_path / "deep" / "two", options)
    assert checkpoints.listing(tmp_path / "one") == checkpoints.listing(tmp_path / "deep" / "two")
    assert checkpoints.listing(source) == checkpoints.listing(elsewhere)


# The plan.


@pytest.mark.parametrize("options", [Options(), Options(bits=4), Options(recipe="mixed_2_6", dtype="fp16")])
def test_the_plan_s_bytes_are_those_of_the_tensors_read_and_written(
    tmp_path: Path, source: Path, checkpoints: Any, options: Options
) -> None:
    before = checkpoints.listing(tmp_path)
    rows = summarize(make_plan(open_source(source), options))
    assert checkpoints.listing(tmp_path) == before
    convert(source, tmp_path / "out", options)
    read, written = checkpoints.read(source), checkpoints.read(tmp_path / "out")
    assert sum(row.tensors for row in rows) == len(read)
    assert sum(row.nbytes_before for row in rows) == sum(len(stored.data) for stored in read.values())
    assert sum(row.nbytes_after for row in rows) == sum(len(stored.data) for stored in written.values())


# Where a source and a target may lie.


def test_the_links_of_the_hugging_face_cache_are_followed(tmp_path: Path, source: Path, checkpoints: Any) -> None:
    cache = tmp_path / "models--someone--model"
    snapshot, blobs = cache / "snapshots" / "0123abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(source.iterdir()):
        shutil.copy(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    before = checkpoints.listing(cache)
    convert(snapshot, tmp_path / "out")
    assert checkpoints.listing(cache) == before
    assert checkpoints.read(tmp_path / "out") == checkpoints.read(source)
    assert all(not path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_an_id_is_converted_from_the_cache_and_recorded_with_its_commit(
    tmp_path: Path, source: Path, checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "hub" / "models--owner--name", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(source, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text(commit)
    record = convert("owner/name@v2", tmp_path / "out")
    assert checkpoints.read(tmp_path / "out") == checkpoints.read(source)
    assert (record.request["source"], record.request["revision"]) == ("owner/name", commit)


@pytest.mark.parametrize(
    "name", ["a folder", "Über 漢字", 'it\'s "quoted"', "-dash", "dots.in.name", "%41", "trailing "]
)
def test_folders_may_have_any_name(tmp_path: Path, source: Path, checkpoints: Any, name: str) -> None:
    renamed = source.rename(tmp_path / f"{name}.source")
    convert(f"{renamed}/", f"{tmp_path / name}/")
    assert checkpoints.read(tmp_path / name) == checkpoints.read(renamed)
    assert {path.name for path in tmp_path.iterdir()} == {name, f"{name}.source"}


def test_relative_paths_empty_folders_and_absent_parents_are_written_to(
    tmp_path: Path, source: Path, checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for target, place in (("new", "new"), ("./empty/", "empty"), ("far/absent/../down", "far/down")):
        convert("./source", target)
        assert checkpoints.read(tmp_path / place) == checkpoints.read(source)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "new", "empty", "far"}


def test_a_target_that_is_a_link_to_an_empty_folder_is_written_to(
    tmp_path: Path, source: Path, checkpoints: Any
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    convert(source, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and checkpoints.read(tmp_path / "disk") == checkpoints.read(source)


def test_a_checkpoint_is_replaced_by_force_and_its_neighbours_stay(
    tmp_path: Path, source: Path, checkpoints: Any
) -> None:
    convert(source, tmp_path / "out", Options(shard_bytes=10_000))
    (tmp_path / "out.txt").write_text("mine")
    convert(source, tmp_path / "out", Options(dtype="fp16"), force=True)
    assert {stored.dtype for stored in checkpoints.read(tmp_path / "out").values()} == {"F16"}
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out", "out.txt"}
