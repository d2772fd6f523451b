"""The GPU's branch of grouped-query attention, taken on the CPU: the same calls, without the fused kernels."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest


@pytest.mark.parametrize("reference", ["qwen3vl-micro"], indirect=True)
@pytest.mark.parametrize("chunk", [1, 7, 16, None])
def test_the_fused_calls_of_gqa_give_the_reference_s_numbers(
    backend: ModuleType, reference: Any, model: Any, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(f"{backend.__name__}.attention.fused", lambda *_: bool(calls.append(1)) or True)
    cache = model.new_cache()
    rows = [model.prefill(reference.inputs, cache, chunk=chunk)]
    for token_id in reference.expected["greedy_ids"][:-1].tolist():
        rows.append(model.decode(token_id, cache))
    np.testing.assert_allclose(np.stack(rows), reference.expected["greedy_logits"], rtol=0, atol=1e-4)
    assert calls
