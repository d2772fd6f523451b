"""What 8 and 4 bits cost the reference checkpoints: the parity report against float, as it was when it was stored.

`python tests/convert/test_quantized_reports.py` writes the stored reports anew, for a change that means to move them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import Options, compare, convert
from convert.parity.report import Comparison
from ivcore import load
from ivcore.inputs import ModelInputs

DATA = Path(__file__).resolve().parents[1] / "data"
STORED = DATA / "quantized_reports.json"
CHECKPOINTS = ("iv3-micro", "qwen3vl-micro")
BITS = (8, 4)
BACKENDS = ("mlx", "torch")
ROUNDING = 1e-3
"""Relative room of an error's size: the sum's order is a BLAS's own, which moves logits by 1e-6 of their size."""


def _report(folder: Path, quantized: Path, backend: str) -> Comparison:
    (comparison,) = compare(folder, quantized, backends=[backend], dtypes=["float32"], tokens=8).comparisons
    return comparison


def _numbers(comparison: Comparison) -> dict[str, Any]:
    text, visual = comparison.text, comparison.visual
    assert text and visual
    return {
        "suspect": comparison.suspect.point if comparison.suspect else None,
        "points": {point.point: [point.relative_l2, point.own] for point in comparison.points},
        "text": {"kl_mean": text.kl_mean, "kl_max": text.kl_max, "perplexity_difference": text.perplexity_difference},
        "visual": {"kl_mean": visual.kl_mean, "kl_max": visual.kl_max},
        "agreement": [text.agreement * text.compared, visual.agreement * visual.compared],
        "parted_at": comparison.decode.parted_at,
    }


@pytest.fixture(scope="module", params=[(name, bits) for name in CHECKPOINTS for bits in BITS], ids=str)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int, Path]:
    name, bits = request.param
    folder = tmp_path_factory.mktemp("quantized") / name
    convert(DATA / "reference" / name, folder, Options(bits=bits, group_size=32))
    return name, bits, folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_report_of_a_quantised_checkpoint_is_the_stored_one(quantized: tuple[str, int, Path], backend: str) -> None:
    pytest.importorskip(f"iv{backend}")
    name, bits, folder = quantized
    stored = json.loads(STORED.read_text())[f"{name}, {bits} bits"]
    found = _numbers(_report(DATA / "reference" / name, folder, backend))
    assert found["suspect"] is stored["suspect"] is None
    assert found["points"].keys() == stored["points"].keys()
    for point, errors in stored["points"].items():
        # What stays in float has no error on one backend; to the last bit, so no room there.
        assert found["points"][point] == pytest.approx(errors, rel=ROUNDING, abs=0 if errors == [0, 0] else 1e-7), point
    for kind in ("text", "visual"):
        assert found[kind] == pytest.approx(stored[kind], rel=ROUNDING, abs=1e-9), kind
    # One position may stand on the edge between two tokens.
    assert found["agreement"] == pytest.approx(stored["agreement"], abs=1)
    assert found["parted_at"] == stored["parted_at"]


def test_backends_agree_on_a_quantised_checkpoint_within_1e_3_in_logits(quantized: tuple[str, int, Path]) -> None:
    name, _, folder = quantized
    with np.load(DATA / "reference" / name / "expected.npz") as expected:
        inputs = ModelInputs(
            expected["input_ids"].astype(np.int32),
            np.concatenate([expected["pixel_values_videos"], expected["pixel_values"]]),
            np.concatenate([expected["video_grid_thw"], expected["image_grid_thw"]]).astype(np.int32),
        )
    logits = []
    for backend in BACKENDS:
        pytest.importorskip(f"iv{backend}")
        logits.append(load(folder, backend, dtype="float32").logits(inputs))  # type: ignore[arg-type]
    assert np.abs(logits[0] - logits[1]).max() <= 1e-3


def _store() -> None:
    import tempfile

    stored = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in CHECKPOINTS:
            for bits in BITS:
                folder = Path(scratch) / f"{name}-{bits}"
                convert(DATA / "reference" / name, folder, Options(bits=bits, group_size=32))
                stored[f"{name}, {bits} bits"] = _numbers(_report(DATA / "reference" / name, folder, "torch"))
    STORED.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    _store()
