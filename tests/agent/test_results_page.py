"""docs/results.md says what the kept answers say."""

from __future__ import annotations

from pathlib import Path

from bench.results import write_page

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_of_results_is_that_of_the_answers_beside_it(tmp_path: Path) -> None:
    (tmp_path / "results").symlink_to(DOCS / "results")
    write_page(tmp_path / "results.md", Path("build/tiny-base"), Path("build/tiny"))
    assert (tmp_path / "results.md").read_text() == (DOCS / "results.md").read_text()
