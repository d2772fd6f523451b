"""A training step beside Hugging Face Transformers + PEFT: seconds and memory, the same model, adapter, batch and CPU.

    python bench/train.py [--size small|medium] [--full] [--backends torch,mlx] [--steps 7] [--dtype float32|bfloat16]

Every side is a process of its own; they take their steps in turns, so that a busy machine slows all of them. The losses
of all steps must agree, so the sides compute the same thing: in float32 within 1e-4.

Hugging Face's side is set as fast as its own switches go: `sdpa` attention, no cache, fused AdamW, position ids made
beforehand, gradient checkpointing without reentrance. It does not pack rows on a CPU (without flash-attention, a packed
batch attends to S x S places): rows of one length go as a batch, and rows of several lengths one by one with their
gradients added up, which is faster there than padding them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.memory import environment, peak, reset_peak
from bench.synthetic import SMALL, medium_config, random_batch, write_random
from ivcore.adapter import write_adapter
from ivcore.checkpoint import manifest
from ivcore.config import ModelConfig
from ivcore.training import Batch, LoraSettings, NextToken, OptimizerSettings, first_factor

ROOT = Path(__file__).resolve().parents[1]
HUGGING_FACE = "Transformers + PEFT"
ROWS = {
    "text, 8 rows of 256": ([256] * 8, 0),
    "text, 8 rows of 64 to 448": ([64, 119, 174, 229, 283, 338, 393, 448], 0),
    "video, 8 rows of 16 frames": ([84] * 8, 16),
}
"""Tokens of text in each row, and frames of 64x64."""

LORA = LoraSettings(rank=16, alpha=32)
LEARNING_RATE, MAX_NORM = 1e-4, 1.0
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Case:
    """What a row of the table measures; rows: a key of ROWS."""

    rows: str
    checkpointing: bool
    full: bool
    dtype: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "medium"), default="small", help="5M or 117M parameters")
    parser.add_argument("--full", action="store_true", help="train all weights instead of a LoRA")
    parser.add_argument("--backends", default="torch,mlx")
    parser.add_argument("--steps", type=int, default=7, help="of each side and row, the first of which is not timed")
    parser.add_argument("--dtype", choices=tuple(LOSS_TOLERANCE), default="float32")
    parser.add_argument("--work", nargs=3, metavar=("SIDE", "MODEL", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        side, folder, case = options.work
        work(side, Path(folder), Case(**json.loads(case)))
        return
    if options.full and options.dtype != "float32":
        parser.error("--full is compared in float32: Transformers keeps no float32 masters of bfloat16 weights.")
    sys.exit(0 if run(options) else "torch was slower than Transformers + PEFT, or a loss differed")


def run(options: argparse.Namespace) -> bool:
    """Print the table; whether torch is at least as fast as Hugging Face in every row, and all losses agree."""
    holds = True
    with tempfile.TemporaryDirectory() as scratch:
        config = SMALL if options.size == "small" else medium_config("gqa")
        parameters = write_random(Path(scratch), config)
        trained = "all weights" if options.full else f"LoRA of rank {LORA.rank} on the decoder's linear layers"
        print(
            f"{parameters / 1e6:.1f}M parameters, {options.dtype}, {trained}; the median of {options.steps - 1} steps\n"
        )
        print(
            "| rows | checkpointing | side | s a step | tokens/s | x Hugging Face | peak MB above the model | loss 1 |"
        )
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for rows in ROWS:
            for checkpointing in (True, False):
                case = Case(rows, checkpointing, options.full, options.dtype)
                sides = [HUGGING_FACE, *options.backends.split(",")]
                holds &= compare(sides, Path(scratch), case, options.steps)
    return holds


def compare(sides: list[str], folder: Path, case: Case, steps: int) -> bool:
    """Let the sides take their steps in turns and print their rows; whether the case holds as `run` says."""
    command = [sys.executable, "-m", "bench.train", "--work"]
    given = json.dumps(asdict(case))
    workers = {
        side: subprocess.Popen(
            [*command, side, str(folder), given],
            cwd=ROOT,
            text=True,
            env=environment(side),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for side in sides
    }
    tokens = len(random_batch(ModelConfig.from_dir(folder), *ROWS[case.rows]).token_ids)
    taken: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(steps):
        for side, worker in workers.items():
            taken[side].append(ask(worker))
    for worker in workers.values():
        worker.communicate()
    seconds = {side: median(step["seconds"] for step in each[1:]) for side, each in taken.items()}
    expected = np.array([step["loss"] for step in taken[HUGGING_FACE]])
    holds = seconds.get("torch", 0) <= seconds[HUGGING_FACE]
    for side, each in taken.items():
        cells = [case.rows, "on" if case.checkpointing else "off", side, f"{seconds[side]:.3f}",
                 f"{tokens / seconds[side]:.0f}", f"{seconds[HUGGING_FACE] / seconds[side]:.2f}",
                 f"{each[-1]['working'] / 1e6:.0f}", f"{each[0]['loss']:.6f}"]  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)
        apart = np.abs(np.array([step["loss"] for step in each]) / expected - 1).max()
        if not apart <= LOSS_TOLERANCE[case.dtype]:
            print(f"The losses of {side} are up to {apart:.1e} from Hugging Face's.", file=sys.stderr)
            holds = False
    return holds


def ask(worker: subprocess.Popen[str]) -> dict[str, float]:
    """Let a worker take a step, and what it says of it; the first one waits until the worker is ready."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    answer: dict[str, float] = json.loads(worker.stdout.readline())
    return answer


def work(side: str, folder: Path, case: Case) -> None:
    """Load a side, then answer every line of standard input with a step's loss and seconds, and the peak so far."""
    batch = random_batch(ModelConfig.from_dir(folder), *ROWS[case.rows])
    load = load_hugging_face if side == HUGGING_FACE else load_backend
    start_training = load(side, folder, case)
    before = reset_peak()
    step = start_training(batch)
    for _ in sys.stdin:
        started = time.perf_counter()
        loss = step()
        answer = {"loss": loss, "seconds": time.perf_counter() - started, "working": peak() - before}
        print(json.dumps(answer), flush=True)


Step = Callable[[], float]
"""Takes one step of training and returns its loss."""


def load_backend(side: str, folder: Path, case: Case) -> Callable[[Batch], Step]:
    """One of our models, which has run once; what is returned makes it ready to be trained."""
    import importlib

    from ivcore.backend import load
    from ivcore.inputs import ModelInputs

    library = importlib.import_module(f"iv{side}.train")
    model = load(folder, backend="mlx" if side == "mlx" else "torch", dtype=case.dtype)
    model.logits(ModelInputs(np.zeros(32, np.int32), None, None))

    def start_training(batch: Batch) -> Step:
        lora = None if case.full else LORA
        how = {"lora": lora, "optimizer": OptimizerSettings(), "checkpointing": case.checkpointing}
        trainer = library.Trainer(model, **how)

        def step() -> float:
            loss: float = trainer.accumulate(batch, NextToken())["loss"]
            trainer.apply(LEARNING_RATE, MAX_NORM)
            return loss

        return step

    return start_training


def load_hugging_face(side: str, folder: Path, case: Case) -> Callable[[Batch], Step]:
    """As `load_backend`, of Hugging Face's model with PEFT."""
    import peft
    import torch
    import transformers

    # The newest name of `gradient_checkpointing_enable` is not in every version that pyproject.toml allows.
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        folder, dtype=getattr(torch, case.dtype), attn_implementation="sdpa"
    )
    with torch.no_grad():
        model(input_ids=torch.zeros((1, 32), dtype=torch.long), use_cache=False)

    def start_training(batch: Batch) -> Step:
        trained: Any = model
        if not case.full:
            with tempfile.TemporaryDirectory() as adapter:
                write_first_adapter(Path(adapter), ModelConfig.from_dir(folder))
                trained = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
        if case.checkpointing:
            trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trained.train()
        parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        parts = unpacked(batch)

        def step() -> float:
            total = 0.0
            for given in parts:
                loss = trained(**given, use_cache=False).loss / len(parts)
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
            return total

        return step

    return start_training


def write_first_adapter(folder: Path, config: ModelConfig) -> None:
    """The adapter that our trainers begin with, seed 0, for PEFT to go on from."""
    shapes = {name.removesuffix(".weight"): shape for name, shape in manifest(config).items() if len(shape) == 2}
    linears = [name for name in shapes if "embed" not in name]
    factors = {
        name: (first_factor(name, LORA.rank, shapes[name][1], 0), np.zeros((shapes[name][0], LORA.rank), np.float32))
        for name in LORA.pick(linears)
    }
    write_adapter(folder, factors, LORA)


def unpacked(batch: Batch) -> list[dict[str, Any]]:
    """What Hugging Face's model takes: all rows as one batch where they are of one length, else a batch each.

    Every row trains on as many places, so the loss is the mean of the batches' means.
    """
    import torch

    labels = np.where(np.r_[0, batch.weights[:-1]] > 0, batch.token_ids, -100)
    rows = [slice(end - length, end) for end, length in zip(np.cumsum(batch.lengths), batch.lengths, strict=True)]
    groups = [rows] if len(set(batch.lengths)) == 1 else [[row] for row in rows]

    def stacked(array: np.ndarray, group: list[slice], axis: int = 0) -> torch.Tensor:
        return torch.from_numpy(np.stack([array[..., row] for row in group], axis)).long()

    given: list[dict[str, Any]] = [
        {
            "input_ids": stacked(batch.token_ids, group),
            "labels": stacked(labels, group),
            "position_ids": stacked(batch.position_ids, group, 1),
        }
        for group in groups
    ]
    if isinstance(batch.pixels, np.ndarray) and batch.grid_thw is not None:
        grids = torch.from_numpy(batch.grid_thw).long()
        given[0] |= {"pixel_values_videos": torch.from_numpy(batch.pixels), "video_grid_thw": grids}
    return given


if __name__ == "__main__":
    main()
