"""The vision tower trained by itself, on what each temporal patch of the toy world shows; PyTorch.

Together with the decoder, from nothing, so small a tower learns colours at most: nothing tells it what to see before
the decoder can read. So it begins here, with a linear head for every label on the mean of a temporal patch's tokens,
and on that of each DeepStack feature; the heads are then thrown away.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ivcore.backend import load
from ivcore.processor import ProcessorConfig
from ivcore.tokenizer import Tokenizer
from ivcore.training import OptimizerSettings
from ivcore.vision import Patches
from ivtorch.vision import VisionTower
from train.loop import write_model
from train.schedule import Schedule
from train.toyworld.compose import MAX_COUNT, make_script
from train.toyworld.labels import PatchLabel, patch_labels
from train.toyworld.render import frames
from train.toyworld.script import SHORT_SECONDS, Split, random_of, seeds
from train.toyworld.words import COLOURS, DIRECTIONS, SHAPES
from train.trainer import new_trainer

HEADS: dict[str, tuple[str | int, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "figures": tuple(range(MAX_COUNT + 1)),
}
"""What is predicted of a temporal patch, and the classes."""

CLIPS, PATCHES = 32, 4
"""Clips a step, and temporal patches of each."""

KINDS = ("colour", "shape", "direction", "count", "order", "when")
RATES = (2.0, 2.0, 4.0, 8.0)
"""Frames a second, of which a clip has one: what moves must be seen to move at each of them."""

_WARMUP, _PEAK, _FLOOR, _DECAY, _MAX_NORM = 30, 1e-3, 1e-5, 0.05, 1.0
_SAVE_EVERY = 100
_MEASURED = 256  # held-out clips
_NONE = -100  # cross entropy's class to leave out

Progress = Callable[[int, int, Mapping[str, float]], None]


def train_tower(start: Path, out: Path, *, steps: int, on_progress: Progress | None = None) -> dict[str, float]:
    """Train the tower of the checkpoint `start` and write the whole checkpoint to `out`, float32.

    Goes on from `out`.part where an earlier call was stopped. Returns the accuracy of every head on held-out clips.
    """
    model = load(start, "torch", "float32")
    tower: VisionTower = model.network.model.visual  # type: ignore[attr-defined]
    processor = Tokenizer.from_dir(start).processor
    config = model.config.vision
    torch.manual_seed(0)
    sources = 1 + len(config.deepstack_visual_indexes)
    heads = nn.ModuleList(
        nn.ModuleDict({name: nn.Linear(config.out_hidden_size, len(values)) for name, values in HEADS.items()})
        for _ in range(sources)
    ).to(tower.pos_embed.weight.device)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [each for each in parameters if each.ndim > 1], "weight_decay": _DECAY},
            {"params": [each for each in parameters if each.ndim == 1], "weight_decay": 0.0},
        ],
        fused=True,
    )
    tower.requires_grad_(True)
    schedule = Schedule(_PEAK, _FLOOR, _WARMUP, steps)
    saved, first = out.with_name(f"{out.name}.part"), 0
    held: dict[str, Any] = {"tower": tower, "heads": heads, "optimizer": optimizer}
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        first = state["step"]
        for name, part in held.items():
            part.load_state_dict(state[name])
    for step in range(first, steps):
        predictions, labels = _predict(tower, heads, processor, seeds("train", step * CLIPS, CLIPS))
        losses = {name: _loss([each[name] for each in predictions], labels[name]) for name in HEADS}
        loss = torch.stack(list(losses.values())).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, _MAX_NORM)
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % _SAVE_EVERY == 0:
            now = {"step": step + 1} | {name: part.state_dict() for name, part in held.items()}
            torch.save(now, saved.with_suffix(".new"))
            os.replace(saved.with_suffix(".new"), saved)
        if on_progress:
            on_progress(step + 1, steps, {"loss": loss.item()} | {name: each.item() for name, each in losses.items()})
    found = _accuracy(tower, heads, processor)
    write_model(new_trainer(model, lora=None, optimizer=OptimizerSettings()), start, out)
    saved.unlink(missing_ok=True)
    return found


def batch_of(clips: Sequence[int], split: Split) -> tuple[list[np.ndarray], list[PatchLabel]]:
    """Frames uint8 (2 PATCHES, H, W, 3) of clips, by their seeds, and the labels of their temporal patches."""
    pictures, labels = [], []
    for seed in clips:
        script = make_script(seed, KINDS[seed // 2 % len(KINDS)])
        random = random_of(seed, 4)
        gap = 1 / random.choice(RATES)
        start = random.uniform(0, SHORT_SECONDS - gap * (2 * PATCHES - 1)) if gap < 0.5 else random.uniform(0, 0.5)
        times = np.clip(start + gap * np.arange(2 * PATCHES), 0, SHORT_SECONDS - 0.05)
        pictures.append(frames(script, times))
        labels += patch_labels(script, times.tolist())
    return pictures, labels


def _predict(
    tower: VisionTower, heads: nn.ModuleList, processor: ProcessorConfig, clips: Sequence[int], split: Split = "train"
) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Logits (N, classes) of every head, for the tokens and each DeepStack feature; the classes (N,)."""
    pictures, labels = batch_of(clips, split)
    device = tower.pos_embed.weight.device
    patches = Patches(pictures, processor)
    _, height, width = patches.grid_thw[0].tolist()
    pixels = torch.from_numpy(np.asarray(patches)).reshape(len(labels), height * width, -1).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        tokens, deepstack = tower(pixels, height, width, 1 << 29)
        means = [each.reshape(len(labels), -1, each.shape[-1]).mean(dim=1) for each in (tokens, *deepstack)]
        logits = [{name: head[name](mean) for name in HEADS} for mean, head in zip(means, heads, strict=True)]  # type: ignore[index]
    classes = {
        name: torch.tensor([_class(getattr(label, name), values) for label in labels], device=device)
        for name, values in HEADS.items()
    }
    return logits, classes


def _loss(logits: Sequence[torch.Tensor], classes: torch.Tensor) -> torch.Tensor:
    """Cross entropy (), the mean over the tokens' head and those of DeepStack."""
    return torch.stack([F.cross_entropy(each.float(), classes, ignore_index=_NONE) for each in logits]).mean()


def _class(value: str | int | None, values: tuple[str | int, ...]) -> int:
    return _NONE if value is None else values.index(value)


@torch.inference_mode()
def _accuracy(
    tower: VisionTower, heads: nn.ModuleList, processor: ProcessorConfig, clips: int = 256
) -> dict[str, float]:
    """Of the tokens' own heads, on held-out clips."""
    right: dict[str, list[torch.Tensor]] = {name: [] for name in HEADS}
    for first in range(0, _MEASURED, CLIPS):
        logits, classes = _predict(tower, heads, processor, seeds("heldout", first, CLIPS))
        for name, labels in classes.items():
            counted = labels != _NONE
            right[name].append((logits[0][name].argmax(dim=-1) == labels)[counted])
    return {name: torch.cat(each).float().mean().item() for name, each in right.items()}
