"""Running `iv3` inside a test, and a checkpoint to spoil."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent import cli

MICRO = Path(__file__).resolve().parents[1] / "data/reference/iv3-micro"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def library_of_nobody(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that name no library have one of the test's own, never that of who runs the tests."""
    monkeypatch.setenv("IV3_LIBRARY", str(tmp_path_factory.mktemp("nobody") / "library"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `iv3` with arguments; exit code, stdout, stderr."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, out, err

    return call


@pytest.fixture
def failure(run: Run) -> Callable[..., str]:
    """Run `iv3`, which must fail with exit code 1, one sentence on stderr and nothing on stdout; the sentence."""

    def call(*arguments: Any) -> str:
        code, out, err = run(*arguments)
        assert (code, out) == (1, ""), err
        lines = err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("iv3: ") and lines[0].endswith("."), err
        assert "Traceback" not in err
        return lines[0]

    return call


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the small checkpoint to spoil."""
    return Path(shutil.copytree(MICRO, tmp_path / "model"))
