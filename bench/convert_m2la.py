"""Converting a checkpoint of Qwen3-VL-8B's widths to M2LA: memory, by the number of layers. Linux only.

    python -m bench.convert_m2la [--layers 4,6] [--prompts 8] [--backend torch] [--work DIR]

Every number of layers is a random bf16 checkpoint and a process of its own, on prompts of a short video and text. "own"
is the most memory that was the process's alone; "resident" counts the pages of mapped weights as well, which the system
may drop. The limit is on what a layer more adds to the former: less than a layer takes in float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.convert import RELEASE, write_release
from bench.memory import ROOT, environment, peak

TEXT: dict[str, Any] = {
    key: value for key, value in RELEASE["text_config"].items() if key not in ("kv_lora_rank", "attention_bias")
}
QWEN: dict[str, Any] = {**RELEASE, "model_type": "qwen3_vl", "text_config": TEXT}
"""config.json of Qwen3-VL-8B, as far as it decides about shapes."""

FRAMES, SIDE, TEXT_TOKENS = 4, 128, 96
"""Of a prompt."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="4,6")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--work", type=Path, help="where the checkpoints are kept")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(Path(given.measure), given.prompts, given.backend)))
        return
    numbers = [int(number) for number in given.layers.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        found = [run(given.work or Path(scratch), layers, given) for layers in numbers]
    if len(found) == 1:
        return
    layer = 4 * (TEXT["hidden_size"] * (3 * TEXT["intermediate_size"] + 10240) + 4096 * 4096)
    grown = (found[-1]["own"] - found[0]["own"]) / (numbers[-1] - numbers[0])
    print(f"a layer more: {grown / 1e9:.2f} GB of its own (a layer in float32 takes {layer / 1e9:.2f})")
    sys.exit(0 if grown < layer else "memory grows with the number of layers")


def run(work: Path, layers: int, given: argparse.Namespace) -> dict[str, float]:
    """Measure one checkpoint, and print its row."""
    source = work / f"qwen-{layers}"
    if not (source / "config.json").exists():
        write_release(source, layers, QWEN)
    command = [sys.executable, "-m", "bench.convert_m2la", "--measure", str(source), "--prompts", str(given.prompts),
               "--backend", given.backend]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, env=environment(given.backend))
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    print(
        f"{layers:3} layers  {size / 1e9:6.2f} GB  {row['seconds']:7.1f} s  {row['own'] / 1e9:6.2f} GB own  "
        f"{row['resident'] / 1e9:6.2f} GB resident",
        flush=True,
    )
    return row


def measure(source: Path, prompts: int, backend: str) -> dict[str, float]:
    """Seconds and bytes of one conversion in this process."""
    from convert.m2la.options import Options
    from convert.m2la.run import convert_attention
    from ivcore.config import ModelConfig

    inputs = [prompt(ModelConfig.from_dir(source), number) for number in range(prompts)]
    watch = Watch()
    watch.start()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
        convert_attention(source, Path(scratch) / "m2la", Options(cache_ratio=2), inputs, backend=backend)
    return {"seconds": time.perf_counter() - started, "own": watch.most, "resident": peak()}


def prompt(config: Any, seed: int) -> Any:
    """A random video of FRAMES frames, then random text."""
    from ivcore.inputs import ModelInputs
    from ivcore.vision import Patches, ProcessorConfig

    random = np.random.default_rng(seed)
    patches = Patches([random.integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)], ProcessorConfig())
    (times, *sides) = patches.grid_thw[0]
    frame = [7, *[config.video_token_id] * (int(np.prod(sides)) // config.vision.spatial_merge_size**2), 8]
    ids = np.array([*frame * int(times), *random.integers(0, 150_000, TEXT_TOKENS)], np.int32)
    return ModelInputs(ids, patches, patches.grid_thw)


class Watch(threading.Thread):
    """Looks ten times a second at the memory that is this process's alone."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0.0

    def run(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            self.most = max(self.most, 1024.0 * next(int(line.split()[1]) for line in lines if "RssAnon" in line))
            time.sleep(0.1)


if __name__ == "__main__":
    main()
