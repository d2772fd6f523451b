"""Vectors from the model's own last hidden state: the same from both backends, and of the prompt's last position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.embedding import CLIP_QUESTION, TEXT_CHARACTERS, TEXT_QUESTION, Embedder, clip_part, collection_name
from ivcore.backend import load
from ivcore.prompt import build_inputs
from ivcore.tokenizer import Tokenizer

REFERENCE = Path(__file__).resolve().parents[1] / "data/reference"
TEXTS = ("The red circle likes plums.", "dogs", "<|im_end|>\n", "犬 🐕")


@pytest.fixture(scope="module", params=["iv3-micro", "qwen3vl-micro"])
def embedders(request: pytest.FixtureRequest) -> list[Embedder]:
    """Of one checkpoint: MLX, PyTorch."""
    folder = REFERENCE / request.param
    tokenizer = Tokenizer.from_dir(folder)
    return [Embedder(load(folder, name, "float32"), tokenizer) for name in ("mlx", "torch")]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    folder = REFERENCE / "iv3-micro"
    return Embedder(load(folder, "torch", "float32"), Tokenizer.from_dir(folder))


def frames(seed: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, 64, 96, 3), dtype=np.uint8)


def test_both_backends_give_the_same_vectors_of_length_one(embedders: list[Embedder]) -> None:
    made = [
        np.vstack([each.texts(TEXTS), each.clip(frames(0), (1.0, 1.5, 2.0)), each.clip(frames(1, 1), (0.0,))])
        for each in embedders
    ]
    assert made[0].dtype == np.float32 and made[0].shape == (6, 128)
    np.testing.assert_allclose(made[0], made[1], atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(made[0], axis=1), 1, atol=1e-5)
    # Not by being the same for everything: no two are nearly parallel.
    assert np.triu(made[0] @ made[0].T, 1).max() < 0.99


@pytest.mark.parametrize("chunked", [False, True])
def test_the_head_makes_the_logits_after_the_prompt_out_of_the_vector(embedder: Embedder, chunked: bool) -> None:
    """The direction of the last hidden state is all that the head needs: logits are its products, but for a length."""
    model: Any = embedder.model
    content = [clip_part(frames(2, 4), (0.0, 0.5, 1.0, 1.5)), {"type": "text", "text": CLIP_QUESTION}]
    inputs = build_inputs(embedder.tokenizer, [{"role": "user", "content": content}])
    logits = model.prefill(inputs, model.new_cache())
    budget, model.memory_budget = model.memory_budget, 1 if chunked else model.memory_budget
    try:
        vector = embedder.clip(frames(2, 4), (0.0, 0.5, 1.0, 1.5))
    finally:
        model.memory_budget = budget
    head = model.network.lm_head.weight.detach().numpy()
    made = head @ vector
    np.testing.assert_allclose(made / np.linalg.norm(made), logits / np.linalg.norm(logits), atol=1e-4)


def test_a_text_is_asked_for_in_its_own_prompt_and_the_head_is_left_out(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    run = embedder.model.logits

    def logits(inputs: Any, observe: Any, positions: np.ndarray) -> np.ndarray:
        asked.append((embedder.tokenizer.decode(inputs.token_ids, skip_special_tokens=False), len(positions)))
        return run(inputs, observe, positions)

    monkeypatch.setattr(embedder.model, "logits", logits)
    both = embedder.texts(["dogs", "cats"])
    for (prompt, positions), text in zip(asked, ("dogs", "cats"), strict=True):
        assert f"{text}\n\n{TEXT_QUESTION}<|im_end|>" in prompt and prompt.endswith("<|im_start|>assistant\n")
        assert positions == 0
    np.testing.assert_array_equal(embedder.texts(["cats"])[0], both[1])


def test_a_models_vectors_have_one_name_however_its_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("model", "./model/", "~/model", str(tmp_path / "model")):
        assert collection_name(name) == str(tmp_path / "model")
    assert collection_name("owner/model") == "owner/model"


def test_no_texts_are_no_vectors(embedder: Embedder) -> None:
    assert embedder.texts([]).shape == (0, 128)


def test_a_clip_has_the_same_vector_wherever_in_a_film_it_is(embedder: Embedder) -> None:
    early, late = embedder.clip(frames(3), (0.0, 0.5, 1.0)), embedder.clip(frames(3), (600.0, 600.5, 601.0))
    np.testing.assert_array_equal(early, late)
    assert np.abs(early - embedder.clip(frames(3), (0.0, 5.0, 10.0))).max() > 1e-4


def test_of_a_long_text_the_beginning_counts(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.embedding.TEXT_CHARACTERS", 40)
    one, other, short = embedder.texts(["a" * 40 + "b" * 9000, "a" * 40 + "c", "a" * 39])
    np.testing.assert_array_equal(one, other)
    assert np.abs(one - short).max() > 1e-4
    assert TEXT_CHARACTERS >= 2000  # the longest line of a transcript
