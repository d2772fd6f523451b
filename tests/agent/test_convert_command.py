"""`iv3 convert` and `iv3 verify`: plans, outcomes and errors as a user at the command line sees them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.convert import parse_size
from convert import stream
from ivcore.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
MICRO = ROOT / "tests/data/reference/iv3-micro"
Run = Callable[..., tuple[int, str, str]]
Failure = Callable[..., str]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_conversion_says_in_a_line_what_it_made(run: Run, tmp_path: Path) -> None:
    code, out, err = run("convert", MICRO, tmp_path / "out", "--bits", 4, "--shard-size", "1MB")
    assert (code, err) == (0, "")
    shards = [name for name in names(tmp_path / "out") if name.endswith(".safetensors")]
    assert len(shards) > 1 and f"{len(shards)} shards" in out
    assert out.startswith(f"{tmp_path / 'out'}: ") and "from 6.2 MiB" in out and len(out.splitlines()) == 1
    assert names(tmp_path) == {"out"}


def test_every_option_reaches_the_record(run: Run, tmp_path: Path) -> None:
    options = ["--bits", 8, "--group-size", 32, "--dtype", "bf16", "--keep", "lm_head", "--keep", "layers.[01]"]
    assert run("convert", MICRO, tmp_path / "out", *options, "--shard-size", "2 MiB")[0] == 0
    said = json.loads((tmp_path / "out/conversion.json").read_text())["options"]
    assert said == {"bits": 8, "group_size": 32, "dtype": "bf16", "keep": ["lm_head", "layers.[01]"], "recipe": None,
                    "shard_bytes": 2 * 2**20}  # fmt: skip
    assert run("convert", MICRO, tmp_path / "mixed", "--recipe", "mixed_3_6")[0] == 0
    assert json.loads((tmp_path / "mixed/conversion.json").read_text())["options"]["recipe"] == "mixed_3_6"


# The plan.


def test_a_dry_run_prints_a_row_a_kind_in_whole_lines_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    code, out, err = run("convert", MICRO, tmp_path / "out", "--bits", 4, "--group-size", 32, "--dry-run")
    assert (code, err) == (0, "") and names(tmp_path) == set()
    assert "…" not in out and "nothing was written" in out
    lines = out.splitlines()
    for words in (
        ["133", "all"],
        ["5", "layers.mlp.down_proj.weight", "fp32", "4 bits, groups of 32"],
        ["5", "layers.self_attn.kv_b_proj.weight", "fp32", "56 columns", "32"],
        ["5", "layers.self_attn.kv_a_proj_with_mqa.weight", "4 bits, groups of 32"],
        ["visual.deepstack_merger_list.linear_fc1.weight", "vision tower"],
        ["1", "lm_head.weight", "fp32", "4 bits, groups of 32", "256 KiB"],
    ):
        assert any(all(word in line for word in words) for line in lines), (words, out)
    counts = [int(match[1]) for line in lines[1:] if (match := re.match(r"\s*(\d+)\s+(?!all)\S+\.\S+", line))]
    assert sum(counts) == 133


def test_a_dry_run_shows_patterns_as_they_were_written(run: Run, tmp_path: Path) -> None:
    """Brackets mean styles to the library that prints the table."""
    for pattern in ("[qo]_proj", "[a-z]_proj", "[/q]_proj", "[!bold]_proj"):
        code, out, err = run("convert", MICRO, tmp_path / "out", "--bits", 4, "--keep", pattern, "--dry-run")
        assert (code, err) == (0, ""), pattern
        assert f"--keep {pattern}" in out


def test_a_dry_run_over_anything_at_the_target_is_only_a_plan(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    assert run("convert", MICRO, tmp_path / "out", "--dry-run")[0] == 0
    assert names(tmp_path / "out") == {"file"}


def test_a_dry_run_of_what_cannot_be_converted_fails(failure: Failure, checkpoint: Path, tmp_path: Path) -> None:
    os.truncate(checkpoint / "model.safetensors", 100_000)
    assert str(checkpoint / "model.safetensors") in failure("convert", checkpoint, tmp_path / "out", "--dry-run")


# Sizes.


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2 * 2**30), ("2gib", 2 * 2**30), ("1.5 GB", 15 * 10**8),
        ("7", 7), ("7B", 7), ("3k", 3000), ("1TiB", 2**40), (" 4 MB ", 4 * 10**6), ("0.001KB", 1),
    ],
)  # fmt: skip
def test_sizes_are_read_as_written(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "big", "5 gigabytes", "-5GB", "0", "0GB", "1e9", "5GBB", "GB", "5,5GB", "nan", "inf", "5PB", "1\n2",
             "5\N{KELVIN SIGN}B", "9" * 400 + "TB", "0." + "0" * 400 + "1"]
)  # fmt: skip
def test_what_is_no_size_is_refused(text: str) -> None:
    try:
        assert parse_size(text) >= 1 and text.startswith("0.0")
    except ConfigError as error:
        assert "--shard-size" in str(error) and "5GB" in str(error)


# Errors.


def test_bad_usage_is_one_line_and_exit_code_2(run: Run, tmp_path: Path) -> None:
    for arguments in (
        ["convert"], ["convert", MICRO], ["convert", MICRO, tmp_path / "out", "--bits", "four"],
        ["convert", MICRO, tmp_path / "out", "more"], ["convert", MICRO, tmp_path / "out", "--quick"], ["verify"],
    ):  # fmt: skip
        code, out, err = run(*arguments)
        assert (code, out) == (2, "") and len(err.strip().splitlines()) == 1, arguments
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bits", 7], "--bits 7"),
        (["--bits", 4, "--group-size", 48], "--group-size 48"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--recipe", "best"], "'best'"),
        (["--bits", 4, "--recipe", "mixed_4_6"], "--recipe mixed_4_6"),
        (["--keep", "lm_head"], "--keep"),
        (["--bits", 4, "--keep", "lm_heat"], "--keep lm_heat"),
        (["--shard-size", "5 potatoes"], "5 potatoes"),
        (["--adapter", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--adapter", ""], "--adapter"),
    ],
)
def test_options_that_cannot_be_met_are_one_line(
    failure: Failure, tmp_path: Path, arguments: list[Any], words: str
) -> None:
    assert words in failure("convert", MICRO, tmp_path / "out", *arguments)
    assert names(tmp_path) == set()


def test_an_existing_target_is_kept_until_force(run: Run, failure: Failure, tmp_path: Path) -> None:
    assert run("convert", MICRO, tmp_path / "out")[0] == 0
    words = failure("convert", MICRO, tmp_path / "out", "--bits", 4)
    assert str(tmp_path / "out") in words and "--force" in words
    assert run("convert", MICRO, tmp_path / "out", "--bits", 4, "--force")[0] == 0
    code, out, _ = run("convert", MICRO, tmp_path / "out", "--bits", 4, "--resume")
    assert code == 0 and "whole already" in out
    assert "another conversion" in failure("convert", MICRO, tmp_path / "out", "--bits", 8, "--resume")


def test_ctrl_c_says_how_to_go_on_and_going_on_ends_in_the_same(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    assert run("convert", MICRO, tmp_path / "undisturbed", "--shard-size", "1MB")[0] == 0
    with monkeypatch.context() as patch:
        real, calls = stream.convert_block, iter(range(10_000))
        patch.setattr(stream, "WORKERS", 1)
        patch.setattr(stream, "convert_block", lambda *given: interrupt() if next(calls) == 100 else real(*given))
        code, out, err = run("convert", MICRO, tmp_path / "out", "--shard-size", "1MB")
    assert (code, out) == (130, "") and "--resume" in err and "Traceback" not in err
    assert names(tmp_path) == {"undisturbed", "out.part"}
    assert run("convert", MICRO, tmp_path / "out", "--shard-size", "1MB", "--resume")[0] == 0
    for name in names(tmp_path / "undisturbed") | names(tmp_path / "out"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


# iv3 verify.


def test_what_is_whole_is_one_line(run: Run, tmp_path: Path) -> None:
    run("convert", MICRO, tmp_path / "out", "--bits", 4)
    code, out, err = run("verify", tmp_path / "out")
    assert (code, err) == (0, "") and out.startswith(f"{tmp_path / 'out'}: ") and "conversion.json agree" in out
    code, out, err = run("verify", MICRO)
    assert (code, err) == (0, "") and "133 tensors" in out and "no conversion.json" in out


def test_what_is_wrong_is_a_line_each_and_exit_code_1(run: Run, tmp_path: Path) -> None:
    run("convert", MICRO, tmp_path / "out", "--shard-size", "2MB")
    first, second, *_ = sorted((tmp_path / "out").glob("*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-1] ^= 16
    first.write_bytes(content)
    second.unlink()
    code, out, err = run("verify", tmp_path / "out")
    assert code == 1 and len(out.splitlines()) == 2
    assert out.count("altered") == 1 and first.name in out and f"missing {second.name}" in out
    assert re.fullmatch(r"iv3: .*2 problems.*\.\n", err) and str(tmp_path / "out") in err
    code, out, err = run("verify", tmp_path / "out", "--json")
    said = json.loads(out)
    assert (
        code == 1
        and said["ok"] is False
        and {problem["kind"] for problem in said["problems"]} == {"altered", "missing"}
    )
    assert next(problem for problem in said["problems"] if problem["kind"] == "altered")["tensor"]


def test_verify_json_of_what_is_whole(run: Run) -> None:
    code, out, _ = run("verify", MICRO, "--json")
    said = json.loads(out)
    assert code == 0 and said["ok"] is True and said["problems"] == [] and said["tensors"] == 133


def test_no_folder_is_one_line(failure: Failure, tmp_path: Path) -> None:
    assert str(tmp_path / "absent") in failure("verify", tmp_path / "absent")
    assert str(tmp_path) in failure("verify", tmp_path)


def test_names_in_an_index_reach_the_terminal_without_control_characters(run: Run, checkpoint: Path) -> None:
    index = {"weight_map": {"a": "\x1b[2Jx.safetensors", "b": "two\nlines.safetensors", "c": "../\x1b]0;title\x07"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    code, out, err = run("verify", checkpoint)
    assert code == 1
    assert all(character.isprintable() or character == "\n" for character in out + err)
    assert all(line.split()[0] in ("missing", "extra", "altered", "unfit") for line in out.splitlines())


# Help and imports.


@pytest.mark.parametrize("command", ["convert", "verify"])
def test_help_shows_examples(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0 and f"iv3 {command} ./" in out and "Examples:" in out


def python(code: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)


def test_help_imports_neither_numpy_nor_a_framework() -> None:
    done = python(
        "import sys, agent.cli\n"
        "for command in ('convert', 'verify'):\n"
        "    try: agent.cli.main([command, '--help'])\n"
        "    except SystemExit: pass\n"
        "assert not {'torch', 'mlx', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    assert done.returncode == 0, done.stderr


def test_neither_mlx_nor_torch_is_needed_to_convert_and_to_verify(tmp_path: Path) -> None:
    done = python(
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'mlx', 'mlx.core', 'transformers', 'peft')))\n"
        "import agent.cli\n"
        f"for arguments in (['convert', {str(MICRO)!r}, {str(tmp_path / 'out')!r}, '--bits', '4', '--dtype', 'bf16'],\n"
        f"                  ['convert', {str(tmp_path / 'out')!r}, {str(tmp_path / 'back')!r}, '--dtype', 'fp32'],\n"
        f"                  ['verify', {str(tmp_path / 'back')!r}]):\n"
        "    try: agent.cli.main(arguments)\n"
        "    except SystemExit as stop: assert stop.code == 0, arguments"
    )
    assert done.returncode == 0, done.stderr
