"""Libraries that are damaged, newer, or none; and entries that cannot be held."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.library import MODES, Collection, Embed, Entry, Library, LibraryError, rebuild
from agent.library.schema import SCHEMA_VERSION, table_name, table_schema

A, B = "a" * 64, "b" * 64
LINES = 20


def embed(texts: Sequence[str]) -> np.ndarray:
    return np.stack([np.full(16, 1 + len(text), np.float32) for text in texts])


def entries(count: int = LINES) -> list[Entry]:
    return [Entry("passage", (i, i + 1), f"line {i}", "asr") for i in range(count)]


def use(folder: Path) -> None:
    """All that a library is for."""
    library = Library(folder, create=True)
    held = library.collection("model", embed)
    for mode in MODES:
        assert len(held.search("line", mode, 100)) == LINES
    held.replace(B, "b.mp4", {}, entries(1))
    held.build_indices()
    assert library.remove(B) == 1
    assert [video.passages for video in library.videos()] == [LINES]
    assert library.verify() == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "library"
    held = Library(folder, create=True).collection("model", embed)
    held.replace(A, "a.mp4", {}, entries())
    held.build_indices()
    return folder


def files_of(folder: Path) -> list[Path]:
    return sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())


def one_sentence(error: pytest.ExceptionInfo[LibraryError]) -> str:
    message = str(error.value)
    assert "\n" not in message and ".rs:" not in message and message.endswith(".") and len(message) < 500
    return message


def table_of(folder: Path) -> Path:
    return folder / f"{table_name('model')}.lance"


def cut(part: str) -> Callable[[Path], None]:
    def damage(table: Path) -> None:
        for file in (table / part).rglob("*"):
            if file.is_file():
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return damage


def empty_versions(table: Path) -> None:
    for file in (table / "_versions").iterdir():
        file.write_bytes(b"")


def replace_by_a_file(table: Path) -> None:
    shutil.rmtree(table)
    table.write_text("x")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "versions cut": cut("_versions"),
    "versions lost": lambda table: shutil.rmtree(table / "_versions"),
    "versions empty": empty_versions,
    "rows cut": cut("data"),
    "rows lost": lambda table: shutil.rmtree(table / "data"),
    "a file in its place": replace_by_a_file,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_library_is_said_so_and_a_new_one_begun_with_the_old_one_kept(
    tmp_path: Path, whole: Path, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "library"
    shutil.copytree(whole, folder)
    damage(table_of(folder))
    with pytest.raises(LibraryError) as error:
        use(folder)
    assert f"The library at {folder} cannot be used" in one_sentence(error) and "--rebuild" in str(error.value)

    before = {file: (folder / file).read_bytes() for file in files_of(folder)}
    kept = rebuild(folder)
    assert kept.parent == tmp_path and kept.name.startswith("library.old-")
    assert {file: (kept / file).read_bytes() for file in files_of(kept)} == before
    Library(folder).collection("model", embed).replace(A, "a.mp4", {}, entries())
    use(folder)
    assert rebuild(folder) != kept and kept.exists()


@pytest.mark.parametrize("part", ["data", "_indices"])
def test_verify_finds_damage_that_opening_does_not(tmp_path: Path, whole: Path, part: str) -> None:
    folder = tmp_path / "library"
    shutil.copytree(whole, folder)
    cut(part)(table_of(folder))
    problems = Library(folder).verify()
    assert problems and all("cannot be used" in problem for problem in problems)


def flip(name: str, place: int) -> Callable[[Path], None]:
    """All bits of one byte in the largest file of this name."""

    def damage(table: Path) -> None:
        file = max(table.rglob(name), key=lambda file: file.stat().st_size)
        content = bytearray(file.read_bytes())
        content[place] ^= 0xFF
        file.write_bytes(content)

    return damage


@pytest.mark.parametrize("place", [230, 249])
def test_damage_over_which_lancedb_panics_is_said_in_a_sentence(tmp_path: Path, whole: Path, place: int) -> None:
    folder = tmp_path / "library"
    shutil.copytree(whole, folder)
    flip("bitmap_page_lookup.lance", place)(table_of(folder))
    said = next(problem for problem in Library(folder).verify() if "LanceDB stopped" in problem)
    assert "cannot be used" in said and "--rebuild" in said


def test_verify_finds_records_that_a_damaged_index_does_not_find(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "library"
    shutil.copytree(whole, folder)
    flip("part_0_docs.lance", 200)(table_of(folder))
    assert "the text of 1 records of" in Library(folder).verify()[0]


@given(number=st.integers(0, 10**6), keep=st.floats(0, 1))
@settings(max_examples=25)
def test_whatever_file_is_cut_short_the_library_works_or_says_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, whole: Path, number: int, keep: float
) -> None:
    folder = tmp_path_factory.mktemp("damaged") / "library"
    shutil.copytree(whole, folder)
    files = files_of(folder)
    file = folder / files[number % len(files)]
    content = file.read_bytes()
    file.write_bytes(content[: min(int(keep * len(content)), len(content) - 1)])
    works_or_says_so(folder)


# The same bytes in every run: over a few LanceDB never returns, see docs/library.md.
@given(number=st.integers(0, 10**6), place=st.floats(0, 1))
@settings(max_examples=15)
def test_whatever_byte_is_wrong_the_library_works_or_says_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, whole: Path, number: int, place: float
) -> None:
    folder = tmp_path_factory.mktemp("flipped") / "library"
    shutil.copytree(whole, folder)
    random_names = re.compile(r"[0-9a-f]{20,}|[0-9a-f]{8}-[0-9a-f-]{27}")
    files = sorted(files_of(folder), key=lambda each: (random_names.sub("", str(each)), (folder / each).stat().st_size))
    file = folder / files[number % len(files)]
    content = bytearray(file.read_bytes())
    content[min(int(place * len(content)), len(content) - 1)] ^= 0xFF
    file.write_bytes(content)
    works_or_says_so(folder)


def works_or_says_so(folder: Path) -> None:
    try:
        library = Library(folder)
        problems = library.verify()
        use(folder)
    except LibraryError as error:
        assert "\n" not in str(error) and ".rs:" not in str(error)
    except AssertionError:
        assert problems, "what is wrong with the answers was not found by verify"


def test_a_table_of_which_only_the_folder_was_made_is_made_again(tmp_path: Path) -> None:
    (table_of(tmp_path) / "_transactions").mkdir(parents=True)
    (table_of(tmp_path) / "_transactions/0-a.txn").write_bytes(b"half")
    library = Library(tmp_path, create=True)
    assert library.videos() == [] == library.verify()
    library.collection("model", embed).replace(A, "a.mp4", {}, entries())
    use(tmp_path)


def test_a_library_of_a_newer_version_is_refused_and_left_as_it_is(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "library"
    shutil.copytree(whole, folder)
    newer = table_schema("newer model", 16)
    about = {**newer.metadata, b"ivmlx.library.version": str(SCHEMA_VERSION + 1).encode()}
    lancedb.connect(str(folder)).create_table("records_newer", schema=newer.with_metadata(about))
    before = {file: (folder / file).read_bytes() for file in files_of(folder)}
    with pytest.raises(
        LibraryError, match=f"newer version of this program .its schema is {SCHEMA_VERSION + 1}"
    ) as error:
        Library(folder, create=True)
    one_sentence(error)
    assert {file: (folder / file).read_bytes() for file in files_of(folder)} == before


def test_a_collection_that_a_newer_version_took_over_meanwhile_is_refused(tmp_path: Path) -> None:
    held = Library(tmp_path, create=True).collection("model", embed)
    newer = table_schema("model", 16)
    about = {**newer.metadata, b"ivmlx.library.version": b"2"}
    lancedb.connect(str(tmp_path)).create_table(table_name("model"), schema=newer.with_metadata(about))
    for action in (lambda: held.search("line"), lambda: held.replace(A, "a.mp4", {}, entries())):
        with pytest.raises(LibraryError, match="newer version"):
            action()


def test_a_database_of_something_else_is_refused(tmp_path: Path) -> None:
    lancedb.connect(str(tmp_path)).create_table("recipes", schema=pa.schema([("text", pa.string())]))
    with pytest.raises(LibraryError, match="a LanceDB table, recipes, that is not of a video library"):
        Library(tmp_path)


@pytest.mark.parametrize(
    "location, said",
    [
        ("missing", "is no library yet"),
        ("film.mp4", "is a file, not a library"),
        ("film.mp4/inside", "no library yet|cannot be used"),
        ("a\0b", "cannot be used"),
    ],
)
def test_a_place_without_a_library_is_said_so(tmp_path: Path, location: str, said: str) -> None:
    (tmp_path / "film.mp4").write_bytes(b"film")
    with pytest.raises(LibraryError, match=said):
        Library(f"{tmp_path}/{location}")


@pytest.mark.parametrize("location, said", [("film.mp4", "is a file"), (".", r"holds other files \(film.mp4\)"),
                                            ("film.mp4/inside", "cannot be used")])  # fmt: skip
def test_a_library_is_not_made_where_something_else_is(tmp_path: Path, location: str, said: str) -> None:
    (tmp_path / "film.mp4").write_bytes(b"film")
    with pytest.raises(LibraryError, match=said):
        Library(tmp_path / location, create=True)
    assert files_of(tmp_path) == [Path("film.mp4")]


@pytest.mark.parametrize(
    "location, said",
    [("", "has no name"), ("db://mine", "LanceDB's cloud"), ("nonsense://mine/library", "cannot be used")],
)
def test_an_address_that_cannot_be_a_library_is_one_sentence(location: str, said: str) -> None:
    with pytest.raises(LibraryError, match=re.escape(said)) as error:
        Library(location, create=True)
    one_sentence(error)


def test_only_a_library_is_set_aside(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "library"
    shutil.copytree(whole, folder)
    (folder / "film.mp4").write_bytes(b"film")
    with pytest.raises(LibraryError, match=r"not just a library \(it holds film\.mp4\)"):
        rebuild(folder)
    assert (folder / "film.mp4").exists()
    with pytest.raises(LibraryError, match="no library yet"):
        rebuild(tmp_path / "missing")
    with pytest.raises(LibraryError, match="cannot be renamed"):
        rebuild("s3://bucket/library")


def test_a_library_in_a_folder_that_cannot_be_written_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("lance error: LanceError(IO): No space left on device, /src/local.rs:12:3\nmore")

    held = Library(tmp_path, create=True).collection("model", embed)
    held.replace(A, "a.mp4", {}, entries())
    monkeypatch.setattr("lancedb.merge.LanceMergeInsertBuilder.execute", full)
    with pytest.raises(LibraryError, match=r"No space left on device\)") as error:
        held.replace(A, "a.mp4", {}, entries())
    one_sentence(error)


def test_a_commit_that_another_process_came_before_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Library(tmp_path, create=True).collection("model", embed)
    held.replace(A, "a.mp4", {}, entries(1))
    execute, failures = lancedb.merge.LanceMergeInsertBuilder.execute, 2

    def contended(*arguments: object, **options: object) -> object:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise RuntimeError("lance error: Commit conflict for version 7: of another process")
        return execute(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("lancedb.merge.LanceMergeInsertBuilder.execute", contended)
    held.replace(A, "a.mp4", {}, entries())
    assert held.videos()[0].passages == LINES
    failures = 1000
    with pytest.raises(LibraryError, match="Commit conflict"):
        held.replace(A, "a.mp4", {}, entries(2))
    assert held.videos()[0].passages == LINES


NOT_VECTORS: dict[str, tuple[Embed, str]] = {
    "not a number": (lambda texts: np.full((len(texts), 16), np.nan, np.float32), "finite"),
    "infinite": (lambda texts: np.full((len(texts), 16), np.inf, np.float32), "finite"),
    "zero": (lambda texts: np.zeros((len(texts), 16), np.float32), "not all of them 0"),
    "one too few": (lambda texts: np.ones((len(texts) - 1, 16), np.float32), "of shape .19, 16. for 20 texts"),
    "one for all": (lambda texts: np.ones(16, np.float32), r"of shape \(16,\)"),
}


@pytest.mark.parametrize("function, said", NOT_VECTORS.values(), ids=NOT_VECTORS.keys())
def test_what_is_no_vector_is_refused_before_anything_is_written(tmp_path: Path, function: Embed, said: str) -> None:
    library = Library(tmp_path, create=True)
    with pytest.raises(LibraryError, match=said):
        library.collection("model", function).replace(A, "a.mp4", {}, entries())
    assert list(tmp_path.iterdir()) == []


def put(*given: Entry) -> Callable[[Collection], None]:
    return lambda held: held.replace(A, "a.mp4", {}, given)


@pytest.mark.parametrize(
    "action, said",
    [
        (put(Entry("note", (0, 1), "x", "agent")), "no part of a video's index"),
        (lambda held: held.add_notes(A, "a.mp4", entries(1)), "Only notes"),
        (lambda held: held.replace("film.mp4", "film.mp4", {}, []), "'film.mp4' is not the content hash"),
        (lambda held: held.remove("x' OR '1'='1"), "not the content hash"),
        (lambda held: held.replace(A, "a.mp4", {"rate": float("nan")}, []), "plain values"),
        (lambda held: held.replace(A, "a.mp4", {"path": Path()}, []), "plain values"),
        (lambda held: put(*entries(1), Entry("scene", (0, 1), "", "cut", np.ones(8)))(held), "one dimension"),
        (lambda _: Entry("passage", (0, 1), " \n", "asr"), "neither a text nor a vector"),
        (lambda _: Entry("passage", (2, 1), "x", "asr"), "2-1 is no span"),
        (lambda _: Entry("passage", (0, float("inf")), "x", "asr"), "is no span"),
        (lambda _: Entry("film", (0, 1), "x", "asr"), "'film' is no kind"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_held_is_one_sentence(tmp_path: Path, action: Callable[[Collection], None], said: str) -> None:
    held = Library(tmp_path, create=True).collection("model", embed)
    with pytest.raises(LibraryError, match=said) as error:
        action(held)
    one_sentence(error)
