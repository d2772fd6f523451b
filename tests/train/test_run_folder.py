"""A run's folder that is damaged, another run's, or on a full disk: one sentence, and the last good state stays."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(tools: Any) -> Any:
    return tools.neighbour("train", "runs")


@pytest.fixture(scope="module")
def texts(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_rows(tmp_path_factory.mktemp("texts") / "rows.jsonl", runs.text_rows(5))


@pytest.fixture(scope="module")
def whole(runs: Any, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 5 steps on text, with the checkpoints of steps 4 and 5."""
    return runs.run(runs.job(tmp_path_factory.mktemp("whole") / "run", texts, steps=5)).path


@pytest.fixture(scope="module")
def stops(runs: Any, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same, stopped after step 2, and after step 4."""
    found = {stop: tmp_path_factory.mktemp("stopped") / "run" for stop in (2, 4)}
    for stop, out in found.items():
        with pytest.raises(runs.Stopped):
            runs.run(runs.job(out, texts, steps=5), stop=stop)
    assert names(found[2] / "checkpoints") == ["step-000002"]
    assert names(found[4] / "checkpoints") == ["step-000002", "step-000004"]
    return found


@pytest.fixture
def stopped(runs: Any, stops: dict[int, Path], tmp_path: Path) -> Path:
    """A run of 5 steps that was stopped after step 4, with the checkpoints of steps 2 and 4."""
    return runs.copy(stops[4], tmp_path / "run")


@pytest.fixture
def early(runs: Any, stops: dict[int, Path], tmp_path: Path) -> Path:
    """One that was stopped after step 2."""
    return runs.copy(stops[2], tmp_path / "run")


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# Damaged.


def test_a_checkpoint_cut_off_in_the_middle_is_named_and_the_one_before_is_good(
    runs: Any, texts: Path, stopped: Path, whole: Path
) -> None:
    newest = stopped / "checkpoints" / "step-000004"
    os.truncate(newest / "state.safetensors", (newest / "state.safetensors").stat().st_size // 2)
    before = runs.files(stopped)
    job = runs.job(stopped, texts, steps=5)
    sentence = runs.refused(job, resume=True)
    assert str(newest) in sentence and "damaged" in sentence and "download" not in sentence
    runs.same(runs.files(stopped), before)
    shutil.rmtree(newest)
    runs.run(job, resume=True)
    runs.same(runs.outcome(stopped), runs.outcome(whole))


def empty(file: Path) -> None:
    file.write_bytes(b"")


def half(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("state.safetensors", empty),
        ("state.safetensors", Path.unlink),
        ("position.json", empty),
        ("position.json", half),
        ("position.json", lambda file: file.write_text("[]")),
        ("position.json", lambda file: file.write_text('{"step": 4}')),
        ("position.json", lambda file: file.write_bytes(b"\xff\xfe\x00")),
    ],
)
def test_a_damaged_checkpoint_is_one_sentence(runs: Any, texts: Path, stopped: Path, name: str, spoil: Any) -> None:
    spoil(stopped / "checkpoints" / "step-000004" / name)
    sentence = runs.refused(runs.job(stopped, texts, steps=5), resume=True)
    assert str(stopped / "checkpoints" / "step-000004") in sentence
    assert "download" not in sentence  # nothing of a run can be downloaded


def test_a_checkpoint_without_its_position_was_never_finished(
    runs: Any, texts: Path, stopped: Path, whole: Path
) -> None:
    (stopped / "checkpoints" / "step-000004" / "position.json").unlink()
    shutil.copytree(stopped / "checkpoints" / "step-000002", stopped / "checkpoints" / "step-000003.part")
    runs.run(runs.job(stopped, texts, steps=5), resume=True)
    found = runs.outcome(stopped)
    runs.same({name: found[name] for name in found if ".part" not in name}, runs.outcome(whole))


def test_copies_that_a_user_made_beside_the_checkpoints_do_no_harm(runs: Any, texts: Path, stopped: Path) -> None:
    kept = shutil.copytree(stopped / "checkpoints" / "step-000002", stopped / "checkpoints" / "step-000002-good")
    runs.run(runs.job(stopped, texts, steps=5), resume=True)
    assert names(kept) == ["adapter", "position.json", "state.safetensors"]


@pytest.mark.parametrize("cut", [1, 40])
def test_a_line_of_metrics_cut_off_is_written_again(
    runs: Any, texts: Path, stopped: Path, whole: Path, cut: int
) -> None:
    last = (stopped / "metrics.jsonl").read_text().splitlines()[-1]
    with (stopped / "metrics.jsonl").open("a") as stream:
        stream.write(last.replace('"step": 4', '"step": 5')[:-cut])
    runs.run(runs.job(stopped, texts, steps=5), resume=True)
    runs.same(runs.outcome(stopped), runs.outcome(whole))


@pytest.mark.parametrize("tail", ['{"step": 5, "phase": "}', "\0" * 30 + "}", "[1, 2}", '{"step": 5}{"step": 6}'])
def test_rubbish_at_the_end_of_the_metrics_is_forgotten(
    runs: Any, texts: Path, stopped: Path, whole: Path, tail: str
) -> None:
    with (stopped / "metrics.jsonl").open("a") as stream:
        stream.write(tail)
    runs.run(runs.job(stopped, texts, steps=5), resume=True)
    runs.same(runs.outcome(stopped), runs.outcome(whole))


# A full disk.


def no_space(*given: Any, **how: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk(patch: pytest.MonkeyPatch, where: str) -> None:
    """Let one kind of writing fail as on a full disk."""
    import ivcore.adapter
    import train.run_folder

    if where == "state":
        patch.setattr(train.run_folder, "save_file", no_space)
    elif where == "adapter":
        patch.setattr(ivcore.adapter, "header_bytes", no_space)
    elif where == "flush":
        patch.setattr(train.run_folder, "_sync", no_space)
    elif where == "rename":
        patch.setattr(train.run_folder.os, "rename", no_space)
    else:
        write = Path.write_text

        def refuse(file: Path, *given: Any, **how: Any) -> Any:
            return (no_space if file.name == "position.json" else write)(file, *given, **how)

        patch.setattr(Path, "write_text", refuse)


@pytest.mark.parametrize("where", ["state", "adapter", "position", "flush", "rename"])
def test_a_disk_that_is_full_while_saving_leaves_the_last_good_checkpoint(
    runs: Any, texts: Path, early: Path, whole: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = runs.job(early, texts, steps=5)
    good = runs.files(job.out / "checkpoints")
    with monkeypatch.context() as patch:
        full_disk(patch, where)
        sentence = runs.refused(job, resume=True)
    assert "step-000002" in sentence and "No space left on device" in sentence and "step 4" in sentence
    runs.same(runs.files(job.out / "checkpoints"), good)
    assert names(job.out / "checkpoints") == ["step-000002"]
    runs.run(job, resume=True)
    runs.same(runs.outcome(job.out), runs.outcome(whole))


def test_files_that_may_not_grow_are_like_a_full_disk(runs: Any, texts: Path, early: Path, whole: Path) -> None:
    """The system's own refusal, in the middle of the state's file, which is not written by Python."""
    job = runs.job(early, texts, steps=5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    good = runs.files(job.out / "checkpoints")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        sentence = runs.refused(job, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step-000002" in sentence and "File too large" in sentence
    runs.same(runs.files(job.out / "checkpoints"), good)
    runs.run(job, resume=True)
    runs.same(runs.outcome(job.out), runs.outcome(whole))


@pytest.mark.parametrize("how", ["lora", "full"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "tokenizer.json", "rejected.jsonl"])
def test_a_disk_that_is_full_elsewhere_is_one_sentence(
    runs: Any, tmp_path: Path, name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = runs.write_rows(tmp_path / "rows.jsonl", [*runs.text_rows(3), "{"])
    job = runs.job(tmp_path / "run", data, steps=2, full=how == "full")
    opened = Path.open

    def refuse(file: Path, mode: str = "r", *given: Any, **more: Any) -> Any:
        if file.name.removesuffix(".part") == name and job.out in file.parents and set(mode) & set("wa"):
            no_space()
        return opened(file, mode, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        if how == "full" or name != "tokenizer.json":
            assert "No space left on device" in runs.refused(job)
    if job.out.exists():
        runs.run(job, resume=True)


# Refused.


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"lora": {"rank": 4}}, "rank"),
        ({"learning_rate": {"peak": 2e-2}}, "peak"),
        ({"steps": 6}, "steps"),
        ({"seed": 1}, "seed"),
        ({"weighting": "token"}, "weighting"),
        ({"data": {"fps": 2.0}}, "fps"),
        ({"data": {"mix": {"rows": 1.0}}}, "mix"),
        ({"optimizer": {"multipliers": {"lora_B": 2.0}}}, "multipliers"),
        ({"stage": "cpt"}, "stage"),
        ({"steps": 5, "phases": [{"name": "all", "steps": 5}]}, "phases"),
    ],
)
def test_another_recipe_is_refused_naming_what_differs(
    runs: Any, texts: Path, stopped: Path, changes: dict[str, Any], word: str
) -> None:
    before = runs.files(stopped)
    if "phases" not in changes:
        changes = {"steps": 5, **changes}
    sentence = runs.refused(runs.job(stopped, texts, **changes), resume=True)
    assert word in sentence and str(stopped) in sentence and "more lines" not in sentence and "``" not in sentence
    assert not any(other in sentence for other in ("max_tokens", "betas", "window") if other not in word)
    runs.same(runs.files(stopped), before)


def test_another_recipe_with_less_in_it_is_refused_naming_what_differs(runs: Any, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(runs.Stopped):
        runs.run(runs.job(tmp_path / "run", texts, data={"fps": 2.0}), stop=1)
    sentence = runs.refused(runs.job(tmp_path / "run", texts), resume=True)
    assert "fps" in sentence and "max_tokens" not in sentence


def test_another_model_data_backend_or_dtype_is_refused_naming_both(
    runs: Any, texts: Path, stopped: Path, tmp_path: Path
) -> None:
    before = runs.files(stopped)
    job = runs.job(stopped, texts, steps=5)
    copied = runs.copy(runs.MICRO, tmp_path / "copied")
    other = runs.write_rows(tmp_path / "other.jsonl", runs.text_rows(5))
    for change, then, now in (
        ({"model": str(copied)}, str(runs.MICRO), str(copied)),
        ({"data": str(other)}, str(texts), str(other)),
        ({"backend": "mlx"}, "torch", "mlx"),
        ({"dtype": "bfloat16"}, "float32", "bfloat16"),
    ):
        sentence = runs.refused(replace(job, **change), resume=True)
        assert then in sentence and now in sentence and str(stopped) in sentence, change
        runs.same(runs.files(stopped), before)


def test_rows_that_have_changed_under_the_same_name_are_refused(
    runs: Any, stopped: Path, texts: Path, tmp_path: Path
) -> None:
    """As many rows, other words: going on would be a run of neither."""
    mine = runs.write_rows(tmp_path / "mine.jsonl", runs.text_rows(5))
    job = runs.job(tmp_path / "mine", mine)
    with pytest.raises(runs.Stopped):
        runs.run(job, stop=2)
    runs.write_rows(mine, [*runs.text_rows(4), runs.said("Quite another?", "Yes.")])
    assert str(mine) in runs.refused(job, resume=True)


def test_the_same_model_and_data_by_another_spelling_are_the_same(
    runs: Any, texts: Path, stopped: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(texts.parent)
    model = os.path.relpath(runs.MICRO)
    runs.run(runs.job(stopped, Path(texts.name), model=model, steps=5), resume=True)
    assert runs.metrics(stopped) == runs.metrics(whole)


def test_a_folder_that_is_no_run_is_not_resumed(runs: Any, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("other", "empty", "absent"):
        sentence = runs.refused(runs.job(tmp_path / name, texts), resume=True)
        assert str(tmp_path / name) in sentence and "--resume" in sentence
    assert names(tmp_path / "other") == ["notes.txt"] and not names(tmp_path / "empty")
    assert not (tmp_path / "absent").exists()


def test_a_folder_that_exists_is_not_begun_in(runs: Any, texts: Path, tmp_path: Path, stopped: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("run", "other", "file"):
        assert str(tmp_path / name) in runs.refused(runs.job(tmp_path / name, texts, steps=5))
    assert names(tmp_path / "other") == ["notes.txt"] and (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    runs.run(runs.job(tmp_path / "empty", texts, steps=1))


def test_a_folder_that_exists_is_refused_before_the_model_is_read(
    runs: Any, texts: Path, tmp_path: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading 16 GB first, to say that a path is taken, is a minute of somebody's life."""
    import train.loop

    monkeypatch.setattr(train.loop, "load", lambda *given: pytest.fail("the model was loaded"))
    runs.refused(runs.job(stopped, texts, steps=5))
    runs.refused(runs.job(stopped, texts, steps=6), resume=True)
    runs.refused(runs.job(tmp_path / "absent", texts, steps=6), resume=True)


@pytest.mark.parametrize("name", ["run.json", "recipe.toml"])
@pytest.mark.parametrize("spoil", [empty, half, Path.unlink])
def test_a_run_whose_own_files_are_damaged_is_one_sentence(
    runs: Any, texts: Path, stopped: Path, name: str, spoil: Any
) -> None:
    spoil(stopped / name)
    sentence = runs.refused(runs.job(stopped, texts, steps=5), resume=True)
    assert str(stopped) in sentence and "download" not in sentence


def test_a_state_of_other_shapes_is_one_sentence(runs: Any, texts: Path, stopped: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"steps": np.zeros(())}, stopped / "checkpoints" / "step-000004" / "state.safetensors")
    assert "state" in runs.refused(runs.job(stopped, texts, steps=5), resume=True)


# Another process.


@contextmanager
def another_process(folder: Path, how: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has come as far in a run's folder as `how` says, and stays there."""
    act = {
        "begin": "folder.begin('', {})",
        "check_free": "folder.check_free()",
        "check_same": "folder.check_same('', {})",
    }
    code = (
        "import sys\nfrom train.run_folder import RunFolder\nfolder = RunFolder(sys.argv[1])\n"
        f"try: {act[how]}\nexcept Exception as error: print(error)\nelse: print('in')\n"
        "sys.stdout.flush()\nsys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        said = process.stdout.readline()
        assert said == "in\n" or "recipe" in said, said  # of another recipe it is, but there it is
        yield process
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("how", ["begin", "check_free"])
def test_a_folder_in_which_another_process_begins_is_refused_until_that_ends(
    runs: Any, texts: Path, tmp_path: Path, how: str
) -> None:
    out = tmp_path / "run"
    if how == "check_free":
        out.mkdir()
    job = runs.job(out, texts, steps=1)
    with another_process(out, how):
        for resume in (False, True) if how == "begin" else (False,):
            sentence = runs.refused(job, resume=resume)
            assert "nother process" in sentence and str(out) in sentence
        found = names(out)
    assert names(out) == found  # it lies nothing in the folder, and takes nothing away
    shutil.rmtree(out)
    runs.run(job)


def test_a_run_that_another_process_goes_on_with_is_refused_before_the_model_is_read(
    runs: Any, texts: Path, early: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train.loop

    job, before = runs.job(early, texts, steps=5), runs.files(early)
    with another_process(early, "check_same") as process:
        with monkeypatch.context() as patch:
            patch.setattr(train.loop, "load", lambda *given: pytest.fail("the model was loaded"))
            for resume in (False, True):
                assert "nother process" in runs.refused(job, resume=resume)
        runs.same(runs.files(early), before)
        process.kill()
        process.wait()
        runs.run(job, resume=True)
    runs.same(runs.outcome(early), runs.outcome(whole))


def test_two_processes_that_begin_at_once_do_not_both_train(
    runs: Any, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find that the folder is not there yet, and load the model; the other one is then first to make it."""
    import train.loop

    load, out = train.loop.load, tmp_path / "run"
    with ExitStack() as stack:

        def slowly(*given: Any) -> Any:
            stack.enter_context(another_process(out, "begin"))
            return load(*given)

        monkeypatch.setattr(train.loop, "load", slowly)
        assert "nother process" in runs.refused(runs.job(out, texts))
        assert names(out) == ["checkpoints", "recipe.toml", "run.json"] and not (out / "recipe.toml").read_text()


def test_the_same_process_goes_on_with_its_own_run_whatever_still_refers_to_it(
    runs: Any, texts: Path, stopped: Path, whole: Path
) -> None:
    from train.run_folder import RunFolder

    job = runs.job(stopped, texts, steps=5)
    before = RunFolder(stopped)
    before.check_same((stopped / "recipe.toml").read_text(), {})
    runs.run(job, resume=True)
    runs.same(runs.outcome(stopped), runs.outcome(whole))


def test_a_folder_is_free_again_when_nothing_refers_to_the_run(runs: Any, texts: Path, tmp_path: Path) -> None:
    runs.run(runs.job(tmp_path / "run", texts, steps=1))
    with another_process(tmp_path / "run", "check_same"):
        pass


def test_a_file_system_without_locks_keeps_nobody_from_training(
    runs: Any, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", refuse)
    runs.run(runs.job(tmp_path / "run", texts, steps=1))
