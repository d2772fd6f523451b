"""LoRA on plain Qwen3-VL against Hugging Face Transformers with PEFT: the gradient, the step, and the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivcore.training import LoraSettings, NextToken, OptimizerSettings

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

NAME = "qwen3vl-micro"
IMAGE, VIDEO = 505, 506
TOLERANCE = 1e-4
EVERY_LINEAR = LoraSettings(rank=4, alpha=6, targets=("language_model.layers.*", "visual.blocks.*", "lm_head"))


@pytest.fixture
def base(tools: Any) -> Any:
    """Hugging Face's model of the reference checkpoint."""
    return transformers.Qwen3VLForConditionalGeneration.from_pretrained(tools.REFERENCE / NAME, dtype=torch.float32)


def prompt(row: Any) -> dict[str, Any]:
    """A row of a batch as Hugging Face's model takes it: the media are a video, then an image."""
    token_ids = torch.from_numpy(row.token_ids).long()[None]
    given = {"input_ids": token_ids, "mm_token_type_ids": (token_ids == IMAGE) * 1 + (token_ids == VIDEO) * 2}
    if row.pixels is not None:
        grids = torch.from_numpy(row.grid_thw).long()
        cut = int(grids[0].prod())
        given |= {"pixel_values_videos": torch.from_numpy(row.pixels[:cut]), "video_grid_thw": grids[:1]}
        given |= {"pixel_values": torch.from_numpy(row.pixels[cut:]), "image_grid_thw": grids[1:]}
    return given


def rows_of(tools: Any) -> list[Any]:
    text = np.random.default_rng(7).integers(0, 500, 33).astype(np.int32)
    return [tools.Row(text), tools.reference_row(NAME), tools.Row(text[:20])]


def trained_lab(tools: Any) -> Any:
    config = tools.ModelConfig.from_dir(tools.REFERENCE / NAME)
    return tools.Lab(tools.REFERENCE / NAME, tools.pack(config, rows_of(tools), seed=3))


def backward(model: Any, lab: Any, rows: list[Any]) -> float:
    """The weighted cross entropy of the batch, row by row, in their model; its gradient is left in the parameters."""
    total, stop = 0.0, 0
    for row in rows:
        start, stop = stop, stop + len(row.token_ids)
        logits = model(**prompt(row)).logits[0]
        targets = torch.from_numpy(lab.batch.targets[start:stop]).long()
        each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        loss = (each * torch.from_numpy(lab.batch.weights[start:stop])).sum()
        loss.backward()
        total += loss.item()
    return total


def ours_of(model: Any) -> dict[str, Any]:
    """Their LoRA's parameters by our names."""
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def test_gradients_and_the_step_are_those_of_peft(base: Any, backend: str, tools: Any, tmp_path: Path) -> None:
    lab, rows = trained_lab(tools), rows_of(tools)
    settings = OptimizerSettings(betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    trainer = lab.trainer(backend, EVERY_LINEAR, optimizer=settings)
    trainer.save_adapter(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    parameters = ours_of(theirs)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        value = backward(theirs, lab, rows)
        expected = {name: parameter.grad.numpy().copy() for name, parameter in parameters.items()}
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 0.01).item()
        optimizer.step()
        assert trainer.accumulate(lab.batch, NextToken())["loss"] == pytest.approx(value, rel=TOLERANCE)
        assert tools.furthest(trainer.gradients(), expected) < TOLERANCE
        assert trainer.apply(1e-3, max_norm=0.01) == pytest.approx(norm, rel=TOLERANCE)
    state = trainer.state()
    for name, parameter in parameters.items():
        np.testing.assert_allclose(state[f"weight.{name}"], parameter.detach().numpy(), rtol=0, atol=1e-5)


def test_gradients_of_all_weights_are_those_of_transformers(base: Any, backend: str, tools: Any) -> None:
    lab, rows = trained_lab(tools), rows_of(tools)
    trainer = lab.trainer(backend, None)
    value = backward(base, lab, rows)
    assert trainer.accumulate(lab.batch, NextToken())["loss"] == pytest.approx(value, rel=TOLERANCE)
    expected = {name: parameter.grad.numpy() for name, parameter in base.named_parameters()}
    assert tools.furthest(trainer.gradients(), expected) < TOLERANCE


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_an_adapter_gives_the_same_logits_in_both_backends_and_in_peft(
    base: Any, backend: str, rank_stabilized: bool, tools: Any, tmp_path: Path
) -> None:
    lab, row = trained_lab(tools), tools.reference_row(NAME)
    settings = LoraSettings(rank=4, alpha=6, rank_stabilized=rank_stabilized, targets=EVERY_LINEAR.targets)
    trainer = lab.trainer(backend, settings)
    inputs = tools.ModelInputs(row.token_ids, row.pixels, row.grid_thw)
    here = trainer.model.logits(inputs)
    before = lab.model("torch").logits(inputs)
    assert np.abs(here - before).max() > 0.1
    trainer.save_adapter(tmp_path)
    for name in tools.BACKENDS:
        model = lab.model(name)
        tools.load_adapter(model, tmp_path)
        np.testing.assert_allclose(model.logits(inputs), here, rtol=0, atol=TOLERANCE)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        logits = theirs(**prompt(row)).logits[0].numpy()
    np.testing.assert_allclose(logits, here, rtol=0, atol=TOLERANCE)
    # Left alone, PEFT saves the head beside its LoRA.
    theirs.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    model = lab.model(backend)
    tools.load_adapter(model, tmp_path / "again")
    np.testing.assert_allclose(model.logits(inputs), here, rtol=0, atol=TOLERANCE)
