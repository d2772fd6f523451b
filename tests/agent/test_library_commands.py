"""`iv3 index`, `iv3 search` and `iv3 library` as a user runs them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from train.toyworld.compose import make_script
from train.toyworld.render import write_clip as write_film
from train.toyworld.script import Script

pytest.importorskip("lancedb")
pytest.importorskip("scenedetect")

ROOT = Path(__file__).resolve().parents[2]
MICRO = ROOT / "tests/data/reference/iv3-micro"
Run = Callable[..., tuple[int, str, str]]
Failure = Callable[..., str]


@pytest.fixture(scope="module")
def script() -> Script:
    return make_script(3, "said", 4.0)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory, script: Script) -> Path:
    """A folder of one film, `films`, and what `iv3 index` makes of it, `library`."""
    folder = tmp_path_factory.mktemp("indexed")
    (folder / "films").mkdir()
    write_film(folder / "films/film.mp4", script)
    from agent.indexing import IndexOptions
    from agent.library_view import index

    options = IndexOptions(max_frames=2, caption_tokens=2)
    failed = index(
        [str(folder / "films")], str(folder / "library"), str(MICRO), backend="torch", dtype=None, options=options,
        as_json=False,
    )  # fmt: skip
    assert failed == 0
    return folder


@pytest.fixture
def library(indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the library, which is the one that commands use."""
    copy = Path(shutil.copytree(indexed / "library", tmp_path / "library"))
    monkeypatch.setenv("IV3_LIBRARY", str(copy))
    return copy


def test_index_says_a_line_a_video_names_what_failed_and_goes_on(
    run: Run, indexed: Path, script: Script, tmp_path: Path
) -> None:
    junk = tmp_path / "junk.mp4"
    junk.write_bytes(b"no film")
    film, place = indexed / "films/film.mp4", tmp_path / "new"
    command = ("index", junk, film, "--library", place, "-m", MICRO, "--backend", "torch", "--max-frames", 2)
    code, out, err = run(*command)
    assert code == 1
    assert (len(script.scenes), len(script.lines)) == (1, 2)
    assert out.splitlines() == [f"indexed        {film}  (1 shot in 1 scene, 2 passages)"]
    assert err.startswith(f"iv3: {junk} is not a video") and len(err.splitlines()) == 1
    code, out, err = run(*command, "--json")
    report = json.loads(out)
    assert code == 1 and report["model"] == str(MICRO)
    assert [(each["path"], each["status"]) for each in report["videos"]] == [
        (str(junk), "failed"), (str(film), "already there")
    ]  # fmt: skip


def test_text_is_searched_without_a_model(
    run: Run, library: Path, script: Script, indexed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.library_view.load", pytest.fail)
    line = script.lines[0]
    code, out, err = run("search", line.text, "-k", 1)
    assert (code, err) == (0, "")
    clock = "-".join(f"00:{second:04.1f}" for second in line.span)
    assert out.splitlines() == [f"[{clock}] {indexed / 'films/film.mp4'}", f"    passage: {line.text}"]


@pytest.mark.parametrize("mode", ["vector", "both"])
def test_a_query_in_a_lines_own_words_finds_it_with_the_model_that_the_library_names(
    run: Run, library: Path, script: Script, mode: str
) -> None:
    line = script.lines[-1]
    code, out, _ = run("search", line.text, "--mode", mode, "-k", 2, "--backend", "torch", "--json")
    found = json.loads(out)
    assert code == 0 and len(found) == 2 and found[0]["text"] == line.text
    assert found[0]["span"] == pytest.approx(line.span) and found[0]["model"] == str(MICRO)
    assert found[0]["score"] > found[1]["score"] and "vector" not in found[0]


def test_a_search_can_be_narrowed_to_kinds_and_to_a_video_by_path_name_or_hash(
    run: Run, library: Path, script: Script, indexed: Path, tmp_path: Path, failure: Failure
) -> None:
    film = indexed / "films/film.mp4"
    copy = Path(shutil.copy(film, tmp_path / "copy.mp4"))
    [video] = json.loads(run("library", "list", "--json")[1])
    for name in (film, "film.mp4", video["video"], video["video"][:12], copy):
        assert len(json.loads(run("search", "the", "--video", name, "--json")[1])) == len(script.lines)
    assert "means no video of this library" in failure("search", "the", "--video", "other.mp4")
    assert run("search", "the", "--kind", "note")[:2] == (0, "")
    assert run("search", "the", "--kind", "song")[0] == 2


def test_a_sheet_has_a_thumbnail_a_hit(run: Run, library: Path, script: Script, tmp_path: Path) -> None:
    code, out, err = run("search", "the", "--sheet", tmp_path / "sheet.png")
    assert (code, err) == (0, "") and out.splitlines()[-1] == str(tmp_path / "sheet.png")
    assert len(script.lines) == 2 and Image.open(tmp_path / "sheet.png").width == 16 + 2 * (320 + 16)


def test_nothing_found_is_no_error_and_says_what_else_to_try(run: Run, library: Path) -> None:
    code, out, err = run("search", "xylophone")
    assert (code, out) == (0, "") and "--mode both" in err
    assert json.loads(run("search", "xylophone", "--json")[1]) == []


def test_several_models_are_searched_by_text_together_and_by_vector_one_at_a_time(
    run: Run, library: Path, script: Script, failure: Failure
) -> None:
    import numpy as np

    from agent.library import Entry, Library

    vector = np.ones(8, np.float32)
    line = script.lines[0]
    other = Library(library).collection("owner/other", lambda texts: np.ones((len(texts), 8), np.float32))
    same = Entry("passage", line.span, line.text, "stream", vector)
    [video] = json.loads(run("library", "list", "--json")[1])
    other.replace(video["video"], video["path"], {}, [same, Entry("passage", (0, 1), "a xylophone", "asr", vector)])
    assert [each["text"] for each in json.loads(run("search", "xylophone", "--json")[1])] == ["a xylophone"]
    found = json.loads(run("search", line.text, "--json")[1])
    assert [each["text"] for each in found].count(line.text) == 1
    assert "several models" in failure("search", "the", "--mode", "vector")
    assert json.loads(run("search", "xylophone", "--json", "-m", MICRO)[1]) == []
    assert len(json.loads(run("search", "the", "--mode", "both", "--json", "-m", MICRO, "--kind", "passage")[1])) == 2
    assert "holds nothing of who/what" in failure("search", "the", "-m", "who/what")
    code, out, _ = run("library", "list")
    assert code == 0 and [text for text in out.splitlines() if not text.startswith(" ")] == [str(MICRO), "owner/other"]


def test_a_removed_video_is_gone_and_its_file_is_not(run: Run, library: Path, indexed: Path, failure: Failure) -> None:
    assert "means no video" in failure("library", "remove", "film.mp4", "other.mp4")
    assert json.loads(run("library", "list", "--json")[1])
    code, out, _ = run("library", "remove", "film.mp4")
    assert code == 0 and out.startswith(f"removed  {indexed / 'films/film.mp4'}")
    assert run("library", "list") == (0, "", f"iv3: {library} holds no videos yet; iv3 index puts some into it.\n")
    assert (indexed / "films/film.mp4").exists()


def test_a_damaged_library_is_said_so_and_begun_anew_only_when_asked(run: Run, library: Path, indexed: Path) -> None:
    assert run("library", "verify", "--rebuild") == (0, f"{library} is whole.\n", "")
    for file in library.glob("*.lance/data/*"):
        file.write_bytes(b"damaged")
    code, out, err = run("library", "verify")
    assert (code, out) == (1, "") and str(library) in err and "iv3 library verify --rebuild" in err
    code, out, err = run("library", "verify", "--rebuild")
    kept = next(library.parent.glob("library.old-*"))
    assert code == 0 and str(kept) in out
    assert {file.read_bytes() for file in kept.glob("*.lance/data/*")} == {b"damaged"}
    assert run("library", "verify")[0] == 0 and json.loads(run("library", "list", "--json")[1]) == []


@pytest.mark.parametrize(
    "command", [("search", "the"), ("library", "list"), ("library", "verify"), ("index", "x.mp4", "-m", "DIR")]
)
def test_a_folder_that_lancedb_cannot_read_is_one_sentence_that_names_the_way_out(
    failure: Failure, library: Path, command: tuple[str, ...]
) -> None:
    for file in library.glob("*.lance/_versions/*"):
        file.write_bytes(b"damaged")
    message = failure(*command)
    assert f"The library at {library} cannot be used" in message and "run iv3 library verify --rebuild" in message


def test_a_library_of_a_newer_version_is_refused_in_a_sentence_and_never_begun_anew(
    failure: Failure, library: Path, indexed: Path
) -> None:
    import lancedb

    from agent.library.schema import SCHEMA_VERSION, table_schema

    newer = table_schema("newer model", 8)
    about = {**newer.metadata, b"ivmlx.library.version": str(SCHEMA_VERSION + 1).encode()}
    lancedb.connect(str(library)).create_table("records_newer", schema=newer.with_metadata(about))
    before = sorted(library.rglob("*"))
    for command in (("search", "the"), ("library", "list"), ("library", "verify"), ("library", "verify", "--rebuild"),
                    ("library", "remove", "film.mp4"), ("index", indexed / "films", "-m", MICRO)):  # fmt: skip
        message = failure(*command)
        assert "was written by a newer version of this program" in message and "update the program" in message
    assert sorted(library.rglob("*")) == before and not list(library.parent.glob("library.old-*"))


def test_a_database_of_another_program_is_not_set_aside(failure: Failure, tmp_path: Path) -> None:
    import lancedb
    import pyarrow as pa

    lancedb.connect(str(tmp_path / "recipes")).create_table("soups", schema=pa.schema([("text", pa.string())]))
    message = failure("library", "verify", "--rebuild", "--library", tmp_path / "recipes")
    assert "that is not of a video library" in message and (tmp_path / "recipes/soups.lance").is_dir()


def test_requests_that_cannot_be_met_are_one_sentence(
    failure: Failure, library: Path, tmp_path: Path, indexed: Path
) -> None:
    (tmp_path / "nothing").mkdir()
    assert "no library yet" in failure("search", "the", "--library", tmp_path / "nowhere")
    assert "query is empty" in failure("search", " ")
    assert "there is no video here" in failure("index", tmp_path / "nothing", "-m", MICRO)
    assert "holds other files" in failure("index", indexed / "films", "-m", MICRO, "--library", indexed / "films")
    assert "does not exist" in failure("index", indexed / "films", "-m", tmp_path / "no-model")
    message = failure("index", indexed / "films", "-m", MICRO, "--speech-model", tmp_path / "no-model")
    assert "There is no folder" in message or "pip install" in message


@pytest.mark.parametrize("command", [("search", "the"), ("library", "list"), ("library", "verify")])
def test_without_lancedb_one_sentence_says_what_to_install(
    failure: Failure, library: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lancedb" else find(name, *a))
    for name in [name for name in sys.modules if name.startswith(("agent.library", "agent.indexing"))]:
        monkeypatch.delitem(sys.modules, name)
    assert failure(*command) == "iv3: The library needs LanceDB: run pip install 'ivmlx[agent]'."


def test_help_loads_nothing_heavy() -> None:
    heavy = ("lancedb", "pyarrow", "numpy", "torch", "mlx", "av", "PIL")
    program = f"import sys, agent.cli; print([name for name in {heavy} if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout == "[]\n"


@pytest.mark.parametrize("command", ["index", "search", "library", "library list", "library remove", "library verify"])
def test_every_command_shows_examples(run: Run, command: str) -> None:
    code, out, _ = run(*command.split(), "--help")
    assert code == 0 and f"iv3 {command}" in out.partition("Examples:")[2]
