"""Converting a checkpoint of the release's shapes (18 GB in bf16): memory, and speed beside reading and hashing it.

    python bench/convert.py [--layers 36] [--bits 4] [--runs 3] [--work DIR]

A random checkpoint is written (and kept in --work for the next time). Then, in turns and each in a process of its own
with the files dropped from the page cache first (where the system can), every shard is read and hashed, converted, and
the result verified; the medians are compared. Needs 18 GB of disk for the source, 6 to 10 GB for the result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RSS_LIMIT = 2 * 10**9
SPEED_LIMIT = 0.6
SHARD_BYTES = 5 * 10**9
READ_BYTES = 8 * 2**20
RANDOM_NUMBERS = 2**24
BF16_ONE = 0x3F80

RELEASE: dict[str, Any] = {
    "model_type": "internvideo3",
    "torch_dtype": "bfloat16",
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 5e6,
        "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
        "attention_bias": True,
        "kv_lora_rank": 896,
    },
    "vision_config": {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 4096,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
    "image_token_id": 151655,
    "video_token_id": 151656,
}
"""config.json with the dimensions of InternVideo3-8B that the design knows (its own file could not be seen)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36, help="decoder layers: fewer for a smaller checkpoint")
    parser.add_argument("--bits", type=int, default=4, help="0 copies without quantising")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where the checkpoint is kept")
    parser.add_argument("--measure", nargs=3, metavar=("WHAT", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        what, source, target = options.measure
        print(json.dumps(measure(what, Path(source), Path(target), options.bits)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        holds = run(options.work or Path(scratch), options.layers, options.bits, options.runs)
    sys.exit(0 if holds else "a limit was missed")


def run(work: Path, layers: int, bits: int, runs: int) -> bool:
    """Print a row a job; whether memory and speed are within their limits."""
    source, target = work / f"release-{layers}", work / f"release-{layers}-{bits}bit"
    if not (source / "config.json").exists():
        started = time.perf_counter()
        write_release(source, layers)
        print(f"written in {time.perf_counter() - started:.0f} s", flush=True)
    nbytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    print(f"{nbytes / 1e9:.2f} GB, {layers} layers, {os.cpu_count()} cores, {bits or 'no'} bits", flush=True)
    rows: dict[str, list[dict[str, float]]] = {"hash": [], "convert": [], "verify": []}
    for _ in range(runs):
        for what, measured in rows.items():
            measured.append(_in_a_process(what, source, target, bits))
            print(f"  {what:8} {measured[-1]['seconds']:6.1f} s", flush=True)
    written = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    shutil.rmtree(target)
    seconds = {what: median(row["seconds"] for row in measured) for what, measured in rows.items()}
    peaks = {what: max(row["rss"] for row in measured) for what, measured in rows.items()}
    for what, taken in seconds.items():
        speed = (written if what == "verify" else nbytes) / taken
        print(f"{what:8} {taken:6.1f} s  {speed / 1e6:5.0f} MB/s  {peaks[what] / 1e6:5.0f} MB peak")
    share = seconds["hash"] / seconds["convert"]
    print(
        f"{written / 1e9:.2f} GB written at {share:.0%} of the speed of reading and hashing (limit {SPEED_LIMIT:.0%})"
    )
    return peaks["convert"] <= RSS_LIMIT and share >= SPEED_LIMIT


def measure(what: str, source: Path, target: Path, bits: int) -> dict[str, float]:
    """Seconds and peak resident bytes of one job in this process."""
    _drop_from_cache(target if what == "verify" else source)
    started = time.perf_counter()
    if what == "hash":
        read_and_hash(source)
    elif what == "convert":
        from convert import Options, convert

        convert(source, target, Options(bits=bits or None), force=True)
    else:
        from convert import verify

        found = verify(target)
        assert found.ok, found.problems
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "rss": peak if sys.platform == "darwin" else peak * 1024}


def read_and_hash(folder: Path) -> None:
    """SHA-256 of every shard, one after the other: the least that a conversion with a record must do."""
    buffer = bytearray(READ_BYTES)
    for file in sorted(folder.glob("*.safetensors")):
        digest = hashlib.sha256()
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                digest.update(memoryview(buffer)[:count])


def write_release(path: Path, layers: int, config: dict[str, Any] = RELEASE) -> None:
    """A random bf16 checkpoint of these shapes; large tensors repeat one block of random numbers, shifted."""
    from ivcore.checkpoint import manifest
    from ivcore.config import ModelConfig
    from ivcore.shards import TensorSpec, write_checkpoint

    config = config | {"text_config": config["text_config"] | {"num_hidden_layers": layers}}
    specs = {name: TensorSpec(shape, "BF16") for name, shape in manifest(ModelConfig.from_dict(config)).items()}
    random = np.random.default_rng(0)
    block = (0.02 * random.standard_normal(RANDOM_NUMBERS, dtype=np.float32)).view(np.uint32) >> 16
    block = block.astype(np.uint16)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, spec in specs.items():
            if "norm" in name and name.endswith("weight"):
                yield name, np.full(spec.shape, np.uint16(BF16_ONE))
                continue
            shifted = np.roll(block, int(random.integers(len(block))))
            yield name, np.resize(shifted, spec.shape)

    write_checkpoint(path, config, specs, tensors(), shard_bytes=SHARD_BYTES)


def _drop_from_cache(folder: Path) -> None:
    if not hasattr(os, "posix_fadvise"):
        return
    os.sync()
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _in_a_process(what: str, source: Path, target: Path, bits: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--bits", str(bits), "--measure", what, str(source), str(target)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
