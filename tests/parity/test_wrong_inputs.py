"""Prompts that do not fit the model: one sentence on both backends, and nothing in the cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ivcore.errors import IvError
from ivcore.inputs import ModelInputs

WRONG_INPUTS: dict[str, Callable[[ModelInputs], ModelInputs]] = {
    "no pixels": lambda good: ModelInputs(good.token_ids, None, good.grid_thw),
    "no grid": lambda good: ModelInputs(good.token_ids, good.pixels, None),
    "too few pixels": lambda good: ModelInputs(good.token_ids, good.pixels[:-5], good.grid_thw),
    "too many pixels": lambda good: ModelInputs(good.token_ids, np.concatenate([good.pixels] * 2), good.grid_thw),
    "narrow pixels": lambda good: ModelInputs(good.token_ids, good.pixels[:, :700], good.grid_thw),
    "a token beyond the vocabulary": lambda good: ModelInputs(np.array([1, 512], np.int32), None, None),
    "a negative token": lambda good: ModelInputs(np.array([1, -1], np.int32), None, None),
    "no token": lambda good: ModelInputs(np.zeros(0, np.int32), None, None),
    "short positions": lambda good: ModelInputs(np.arange(9, dtype=np.int32), None, None, np.zeros((3, 4), np.int32)),
}


@pytest.mark.parametrize("wrong", WRONG_INPUTS)
def test_inputs_that_do_not_fit_the_model_are_one_sentence(backend: ModuleType, reference: Any, wrong: str) -> None:
    model = backend.load(reference.path)
    cache = model.new_cache()
    with pytest.raises(IvError) as caught:
        model.prefill(WRONG_INPUTS[wrong](reference.inputs), cache)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_prompt_longer_than_the_context_is_one_sentence(backend: ModuleType, reference: Any, tmp_path: Path) -> None:
    raw = json.loads((reference.path / "config.json").read_text())
    raw["text_config"]["max_position_embeddings"] = 57
    (tmp_path / "config.json").write_text(json.dumps(raw))
    shutil.copy(reference.path / "model.safetensors", tmp_path)
    model = backend.load(tmp_path)
    with pytest.raises(IvError, match=r"58.*57|57.*58"):
        model.prefill(reference.inputs, model.new_cache())


@pytest.mark.parametrize("token_id", [512, -1])
def test_decoding_a_token_beyond_the_vocabulary_is_one_sentence(
    backend: ModuleType, reference: Any, token_id: int
) -> None:
    model = backend.load(reference.path)
    cache = model.new_cache()
    model.prefill(ModelInputs(np.arange(4, dtype=np.int32), None, None), cache)
    with pytest.raises(IvError, match="vocabulary"):
        model.decode(token_id, cache)
    assert cache.length == 4
