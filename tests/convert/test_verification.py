"""`verify` finds a single flipped bit and names its tensor, and lists all that is missing, extra, cut or altered."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.plan import Options
from convert.run import convert
from convert.verification import Verification, verify
from ivcore.errors import CheckpointError
from ivcore.shards import INDEX, SINGLE

some = settings(max_examples=30)
KINDS = {
    "one shard": Options(),
    "many shards": Options(shard_bytes=60_000),
    "packed": Options(bits=4, group_size=32, shard_bytes=30_000),
}


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Shards are hashed in many pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("convert.verification.BLOCK", 1_000)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, checkpoints: Any) -> dict[str, Path]:
    """Converted folders, not to be changed."""
    root = tmp_path_factory.mktemp("verify")
    source = checkpoints.make(root / "source", shards=2, num_hidden_layers=1)
    for kind, options in KINDS.items():
        convert(source, root / kind, options)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path) -> Path:
    """A converted folder to spoil."""
    return Path(shutil.copytree(folders[request.param], tmp_path / "model"))


@pytest.fixture
def many(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["many shards"], tmp_path / "model"))


@contextmanager
def spoiled(file: Path, change: Callable[[bytearray], Any]) -> Iterator[None]:
    """A file with other content, put back in the end."""
    content = file.read_bytes()
    altered = bytearray(content)
    change(altered)
    file.write_bytes(altered)
    try:
        yield
    finally:
        file.write_bytes(content)


def flip(place: int, bit: int) -> Callable[[bytearray], Any]:
    def change(content: bytearray) -> None:
        content[place] ^= 1 << bit

    return change


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def found(folder: Path) -> list[tuple[str, str, str | None]]:
    return [(problem.kind, problem.file, problem.tensor) for problem in verify(folder).problems]


def header_end(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_what_was_converted_is_whole(folder: Path, checkpoints: Any) -> None:
    seen: list[tuple[int, int]] = []
    verification = verify(folder, lambda done, total: seen.append((done, total)))
    total = sum(file.stat().st_size for file in shards(folder))
    tensors = len(checkpoints.read(folder))
    assert verification == Verification(str(folder), True, len(shards(folder)), tensors, total, ())
    assert verification.ok and seen[-1] == (total, total) and seen == sorted(seen)


@pytest.mark.parametrize("kind", KINDS)
@some
@given(data=st.data())
def test_a_single_flipped_bit_of_a_tensor_is_found_and_nothing_else_is_reported(
    folders: dict[str, Path], checkpoints: Any, kind: str, data: st.DataObject
) -> None:
    file = data.draw(st.sampled_from(shards(folders[kind])))
    place = data.draw(st.integers(header_end(file), file.stat().st_size - 1))
    at = place - header_end(file)
    header = checkpoints.header(file)[0]
    tensor = next(name for name, entry in header.items()
                  if name != "__metadata__" and entry["data_offsets"][0] <= at < entry["data_offsets"][1])  # fmt: skip
    with spoiled(file, flip(place, data.draw(st.integers(0, 7)))):
        assert found(folders[kind]) == [("altered", file.name, tensor)]


def test_the_first_and_the_last_bit_of_every_tensor_are_found(folders: dict[str, Path], checkpoints: Any) -> None:
    for file in shards(folders["packed"]):
        header = checkpoints.header(file)[0]
        header.pop("__metadata__")
        for name, entry in header.items():
            begin, end = (header_end(file) + offset for offset in entry["data_offsets"])
            with spoiled(file, flip(begin, 7)), spoiled(file, flip(end - 1, 0)):
                assert found(folders["packed"]) == [("altered", file.name, name)]


@pytest.mark.parametrize("kind", KINDS)
@some
@given(data=st.data())
def test_a_flipped_bit_of_a_header_is_found_and_only_its_file_is_reported(
    folders: dict[str, Path], kind: str, data: st.DataObject
) -> None:
    file = data.draw(st.sampled_from(shards(folders[kind])))
    place = data.draw(st.integers(0, header_end(file) - 1))
    with spoiled(file, flip(place, data.draw(st.integers(0, 7)))):
        problems = verify(folders[kind]).problems
        assert problems and {problem.file for problem in problems} == {file.name}, list(map(str, problems))


@pytest.mark.parametrize(
    "name", ["conversion.json", "config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", INDEX]
)
@some
@given(data=st.data())
def test_a_flipped_bit_of_any_other_file_is_found(folders: dict[str, Path], name: str, data: st.DataObject) -> None:
    file = folders["packed"] / name
    place, bit = data.draw(st.integers(0, file.stat().st_size - 1)), data.draw(st.integers(0, 7))
    with spoiled(file, flip(place, bit)):
        assert ("altered", name, None) in found(folders["packed"])


def test_every_bit_of_the_record_counts(folders: dict[str, Path]) -> None:
    file = folders["one shard"] / "conversion.json"
    for place in range(0, file.stat().st_size, 41):
        with spoiled(file, flip(place, place % 7)):
            assert ("altered", "conversion.json", None) in found(folders["one shard"]), place


@pytest.mark.parametrize("kind", KINDS)
@some
@given(data=st.data())
def test_a_file_cut_at_any_length_is_found(folders: dict[str, Path], kind: str, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(shards(folders[kind])))
    length = data.draw(st.integers(0, file.stat().st_size - 1))
    with spoiled(file, lambda content: content.__delitem__(slice(length, None))):
        assert found(folders[kind]) == [("truncated", file.name, None)]


@pytest.mark.parametrize("name", ["conversion.json", "config.json", "tokenizer.json", INDEX])
@pytest.mark.parametrize("length", [0, 1, 20, -2])
def test_a_text_that_was_cut_is_found(many: Path, name: str, length: int) -> None:
    os.truncate(many / name, length % (many / name).stat().st_size)
    assert ("altered", name, None) in found(many)


def test_bytes_after_the_end_are_found(folder: Path) -> None:
    with shards(folder)[-1].open("ab") as stream:
        stream.write(b"\0")
    assert found(folder) == [("altered", shards(folder)[-1].name, None)]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", INDEX])
def test_an_absent_file_is_reported_once(many: Path, name: str) -> None:
    (many / name).unlink()
    assert found(many) == [("missing", name, None)]


def test_absent_shards_are_reported_once_each(many: Path) -> None:
    first, *_, last = shards(many)
    first.unlink()
    last.unlink()
    assert found(many) == [("missing", first.name, None), ("missing", last.name, None)]


@pytest.mark.parametrize("spoil", ["a folder", "a link to nothing", "a loop"])
def test_a_shard_that_is_no_file_is_reported(many: Path, spoil: str) -> None:
    file = shards(many)[1]
    file.unlink()
    if spoil == "a folder":
        file.mkdir()
    else:
        file.symlink_to("gone.safetensors" if spoil == "a link to nothing" else file.name)
    problems = found(many)
    assert len(problems) == 1 and problems[0][0] in ("missing", "altered") and problems[0][1:] == (file.name, None)


def test_an_extra_shard_is_reported(folder: Path, checkpoints: Any) -> None:
    checkpoints.write_file(folder / "model-old.safetensors", {"a": checkpoints.store(np.ones(3, np.float32))})
    assert found(folder) == [("extra", "model-old.safetensors", None)]
    (folder / "model-old.safetensors").unlink()
    (folder / "model-old.safetensors").symlink_to("nowhere")
    assert found(folder) == [("extra", "model-old.safetensors", None)]


def test_extra_absent_and_misshapen_tensors_are_reported(many: Path, checkpoints: Any) -> None:
    file = shards(many)[1]
    header, _ = checkpoints.header(file)
    names = [name for name in header if name != "__metadata__"]
    stored = {name: tensor for name, tensor in checkpoints.read(many).items() if name in names}
    gone, reshaped = names[0], next(name for name in names[1:] if len(stored[name].shape) == 2)
    del stored[gone]
    stored["model.more"] = checkpoints.store(np.ones(3, np.float32))
    stored[reshaped] = stored[reshaped]._replace(shape=stored[reshaped].shape[::-1])
    checkpoints.write_file(file, stored)
    problems = found(many)
    assert ("missing", file.name, gone) in problems and ("extra", file.name, "model.more") in problems
    assert {tensor for _, _, tensor in problems} <= {None, gone, "model.more", reshaped}
    assert any(reshaped in str(problem) for problem in verify(many).problems) or len(problems) > 2


def test_shards_that_were_swapped_are_both_reported(many: Path) -> None:
    one, two = shards(many)[:2]
    one.rename(many / "aside")
    two.rename(one)
    (many / "aside").rename(two)
    assert {file for _, file, _ in found(many)} >= {one.name, two.name}


def test_a_tensor_in_two_shards_is_reported_in_the_wrong_one(many: Path, checkpoints: Any) -> None:
    one, two = shards(many)[:2]
    name = next(name for name in checkpoints.header(one)[0] if name != "__metadata__")
    tensors = checkpoints.read(many)
    own = [other for other in checkpoints.header(two)[0] if other != "__metadata__"]
    checkpoints.write_file(two, {other: tensors[other] for other in [*own, name]})
    assert ("extra", two.name, name) in found(many)


def test_a_shard_smuggled_in_by_an_index_is_reported(
    folders: dict[str, Path], tmp_path: Path, checkpoints: Any
) -> None:
    folder = Path(shutil.copytree(folders["one shard"], tmp_path / "model"))
    tensors = checkpoints.read(folder)
    tensors["lm_head.weight"] = checkpoints.store(np.zeros(tensors["lm_head.weight"].shape, np.float32))
    checkpoints.write_file(folder / "better.safetensors", tensors)
    weight_map = dict.fromkeys(tensors, "better.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    files = {file for _, file, _ in found(folder)}
    assert files & {"better.safetensors", INDEX}


def test_everything_that_is_wrong_is_listed_at_once(many: Path, checkpoints: Any) -> None:
    first, second, third, *_ = shards(many)
    first.unlink()
    content = bytearray(second.read_bytes())
    content[-1] ^= 1
    second.write_bytes(content)
    os.truncate(third, third.stat().st_size - 1)
    (many / "tokenizer.json").write_text("{}")
    (many / "LICENSE").unlink()
    checkpoints.write_file(many / "more.safetensors", {})
    last = [*checkpoints.header(second)[0]][-1]
    assert set(found(many)) == {
        ("missing", first.name, None),
        ("altered", second.name, last),
        ("truncated", third.name, None),
        ("altered", "tokenizer.json", None),
        ("missing", "LICENSE", None),
        ("extra", "more.safetensors", None),
    }


def test_a_problem_is_one_line_that_names_kind_file_and_tensor(many: Path) -> None:
    flip_last = bytearray(shards(many)[0].read_bytes())
    flip_last[-1] ^= 1
    shards(many)[0].write_bytes(flip_last)
    (problem,) = verify(many).problems
    assert problem.tensor is not None
    assert all(word in str(problem) for word in ("altered", shards(many)[0].name, problem.tensor))
    assert "\n" not in str(problem)
    said = verify(many).to_dict()
    assert json.loads(json.dumps(said)) == json.loads(json.dumps(said)) and said["ok"] is False
    assert said["problems"][0]["kind"] == "altered" and said["problems"][0]["tensor"] == problem.tensor


# Without a record.


@pytest.mark.parametrize("shards", [1, 3])
def test_a_download_is_whole_as_far_as_headers_say(tmp_path: Path, checkpoints: Any, shards: int) -> None:
    verification = verify(checkpoints.make(tmp_path / "model", shards=shards))
    assert verification.ok and not verification.hashed and verification.shards == shards


def test_the_links_of_the_hugging_face_cache_are_followed_and_lost_blobs_reported(
    tmp_path: Path, checkpoints: Any
) -> None:
    source = checkpoints.make(tmp_path / "model", shards=2)
    snapshot = tmp_path / "cache" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for file in source.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert verify(snapshot).ok
    lost = shards(source)[1]
    lost.unlink()
    assert found(snapshot) == [("missing", lost.name, None)]


@some
@given(data=st.data())
def test_without_a_record_a_cut_shard_is_found(checkpoints: Any, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = checkpoints.make(Path(name) / "model", shards=2, num_hidden_layers=1)
        file = shards(folder)[1]
        os.truncate(file, data.draw(st.integers(0, file.stat().st_size - 1)))
        problems = found(folder)
        assert len(problems) == 1 and problems[0][0] in ("truncated", "altered") and problems[0][1] == file.name


def test_without_a_record_tensors_that_do_not_fit_the_config_are_all_named(tmp_path: Path, checkpoints: Any) -> None:
    folder = checkpoints.make(tmp_path / "model")
    config = checkpoints.config(num_hidden_layers=3)
    (folder / "config.json").write_text(json.dumps(config))
    (problem,) = verify(folder).problems
    assert problem.kind == "unfit" and "model.language_model.layers.2.mlp.down_proj.weight" in problem.detail


def test_without_a_record_the_index_is_held_against_the_headers(tmp_path: Path, checkpoints: Any) -> None:
    folder = checkpoints.make(tmp_path / "model", shards=2)
    index = json.loads((folder / INDEX).read_text())
    one, two = sorted(set(index["weight_map"].values()))
    moved = next(name for name, file in index["weight_map"].items() if file == one)
    index["weight_map"][moved] = two
    index["weight_map"]["model.absent"] = two
    index["weight_map"]["model.outside"] = "../x.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    problems = found(folder)
    assert ("altered", INDEX, moved) in problems and ("missing", two, "model.absent") in problems
    assert ("altered", INDEX, None) in problems


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"weight_map": 3}', b"\xff"])
def test_an_index_that_cannot_be_read_is_reported(tmp_path: Path, checkpoints: Any, content: bytes) -> None:
    folder = checkpoints.make(tmp_path / "model", shards=2)
    (folder / INDEX).write_bytes(content)
    assert ("altered", INDEX, None) in found(folder)


def test_shards_without_an_index_and_an_index_without_shards_are_reported(tmp_path: Path, checkpoints: Any) -> None:
    folder = checkpoints.make(tmp_path / "model", shards=2)
    (folder / INDEX).rename(tmp_path / "index")
    assert ("missing", INDEX, None) in found(folder)
    names = [file.name for file in shards(folder)]
    for name in names:
        (folder / name).unlink()
    (tmp_path / "index").rename(folder / INDEX)
    assert found(folder) == [("missing", name, None) for name in names]


def test_no_config_is_reported(tmp_path: Path, checkpoints: Any) -> None:
    folder = checkpoints.make(tmp_path / "model")
    (folder / "config.json").unlink()
    assert [problem[1] for problem in found(folder)] == ["config.json"]


@pytest.mark.parametrize("name", ["absent", "file", "empty"])
def test_where_there_is_no_checkpoint_one_sentence_says_so(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=str(tmp_path / name)):
        verify(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"format": 2},
        {"format": 1},
        {"format": 1, "sources": {}, "shards": {}, "files": {}},
        {"format": 1, "sources": {"a": 1}, "shards": {"b": {"x": 2}}, "files": []},
    ],
)
def test_a_record_of_something_else_is_reported(many: Path, content: Any) -> None:
    (many / "conversion.json").write_text(json.dumps(content))
    assert ("altered", "conversion.json", None) in found(many)


def test_verifying_changes_nothing(many: Path, checkpoints: Any) -> None:
    os.truncate(shards(many)[0], 50)
    before = checkpoints.listing(many)
    assert not verify(many).ok
    assert checkpoints.listing(many) == before
    assert SINGLE not in before
