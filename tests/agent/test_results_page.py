"""docs/results.md says what the kept answers say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from bench.results import write_page

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_of_results_is_that_of_the_answers_beside_it(tmp_path: Path) -> None:
    (tmp_path / "results").symlink_to(DOCS / "results")
    write_page(tmp_path / "results.md", Path("build/tiny-base"), Path("build/tiny"))
    assert (tmp_path / "results.md").read_text() == (DOCS / "results.md").read_text()


def test_answers_of_different_weights_are_not_compared(tmp_path: Path) -> None:
    shutil.copytree(DOCS / "results", tmp_path / "results")
    for dtype in ("float32", "float16"):
        file = tmp_path / f"results/iv3-tiny--mlx-{dtype}.json"
        if file.exists():
            file.write_text(json.dumps(json.loads(file.read_text()) | {"weights": "of another one"}))
    write_page(tmp_path / "results.md", Path("build/tiny-base"), Path("build/tiny"))
    assert "on PyTorch and MLX |" not in (tmp_path / "results.md").read_text()
