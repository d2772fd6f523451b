"""Names become folders or descriptions: with a small hub on this machine, a cache made by hand, and no hub at all."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open

from ivcore.errors import CheckpointError, ConfigError
from ivcore.hub import describe, resolve

MICRO = Path(__file__).resolve().parents[1] / "data" / "reference" / "iv3-micro"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "model.safetensors"


StartHub = Callable[..., "Hub"]
Use = Callable[[str], object]


class Hub:
    """The part of the hub's HTTP interface that its client uses to read a repository `owner/name`."""

    def __init__(self, files: dict[str, bytes], refuse: tuple[int, str] | None, refuse_files: bool) -> None:
        self.files, self.refuse, self.refuse_files = files, refuse, refuse_files
        self.fetched: list[str] = []
        self.bytes_of_weights = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlparse(request.path).path)
        is_file = "/resolve/" in path
        if self.refuse and (is_file or not self.refuse_files):
            return self.send(request, self.refuse[0], b"", {"X-Error-Code": self.refuse[1]})
        if is_file:
            name = path.split("/resolve/")[1].split("/", 1)[1]
            if name not in self.files:
                return self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
            return self.send_file(request, name, body)
        if "/tree/" in path:
            listing = [
                {"type": "file", "path": name, "size": len(content), "oid": f"{number:040x}"}
                for number, (name, content) in enumerate(self.files.items())
            ]
            return self.send(request, 200, json.dumps(listing).encode())
        siblings = [{"rfilename": name} for name in self.files]
        about = {"id": "owner/name", "modelId": "owner/name", "sha": COMMIT, "siblings": siblings}
        self.send(request, 200, json.dumps(about).encode())

    def send_file(self, request: BaseHTTPRequestHandler, name: str, body: bool) -> None:
        content, status = self.files[name], 200
        headers = {"ETag": f'"{sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        asked = request.headers.get("Range")
        if asked and asked.startswith("bytes=") and not asked.endswith("-"):
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        if body:
            self.fetched.append(name)
            self.bytes_of_weights += len(content) if name == WEIGHTS else 0
        self.send(request, status, content, headers, body=body)

    @staticmethod
    def send(request: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str] | None = None,
             *, body: bool = True) -> None:  # fmt: skip
        request.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            request.send_header(key, value)
        request.end_headers()
        if body and request.command != "HEAD":
            request.wfile.write(content)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return cache


@pytest.fixture
def start_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StartHub]:
    started: list[Hub] = []

    def start(files: dict[str, bytes], refuse: tuple[int, str] | None = None, refuse_files: bool = False) -> Hub:
        hub = Hub(files, refuse, refuse_files)
        threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        started.append(hub)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        return hub

    yield start
    for hub in started:
        hub.server.shutdown()
        hub.server.server_close()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that nothing listens on: the connection is refused, as it is without a network."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_HUB_OFFLINE=1 sets."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def micro_files() -> dict[str, bytes]:
    return {name: (MICRO / name).read_bytes() for name in ("config.json", WEIGHTS, "tokenizer.json")}


def fill_cache(cache: Path, revision: str = "main", names: tuple[str, ...] = ("config.json", WEIGHTS)) -> Path:
    """The client's cache layout, written by hand: a ref, blobs, and a snapshot that links to them."""
    repository = cache / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "refs", repository / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / revision).write_text(COMMIT)
    for name in names:
        shutil.copy(MICRO / name, repository / "blobs" / f"blob-{name}")
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / f"blob-{name}")
    return snapshot


def reference_specs() -> dict[str, tuple[tuple[int, ...], str]]:
    with safe_open(MICRO / WEIGHTS, framework="np") as file:
        return {name: (file.get_tensor(name).shape, "F32") for name in file.keys()}  # noqa: SIM118


def test_a_folder_is_returned_as_it_is(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path


def test_a_path_that_is_no_folder_is_refused_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(CheckpointError, match=r"model\.gguf is a file; name the folder of a checkpoint\.$"):
        resolve(file)
    for missing in (tmp_path / "nowhere", "./nowhere", "nowhere", "a/b/c", "owner/name@", "../owner/name"):
        with pytest.raises(CheckpointError, match=r"does not exist; name the folder .* or a Hugging Face id"):
            resolve(missing)


def test_only_data_at_the_top_of_a_repository_is_downloaded(start_hub: StartHub, empty_cache: Path) -> None:
    wanted = {**micro_files(), "chat_template.jinja": b"{{ messages }}", "merges.txt": b"a b"}
    unwanted = {
        "modeling_internvideo3.py": b"raise SystemExit",
        "pytorch_model.bin": b"pickle",
        "consolidated.pth": b"pickle",
        "weights.pt": b"pickle",
        "original/model.safetensors": b"a second copy",
        "README.md": b"words",
    }
    hub = start_hub(wanted | unwanted)
    folder = resolve("owner/name")
    assert {path.name for path in folder.iterdir()} == set(wanted)
    assert set(hub.fetched) == set(wanted)
    assert (folder / WEIGHTS).read_bytes() == wanted[WEIGHTS]
    assert folder.is_relative_to(empty_cache)


def test_an_id_is_described_from_its_headers_alone(start_hub: StartHub) -> None:
    hub = start_hub(micro_files())
    described = describe("owner/name")
    assert {name: (spec.shape, spec.dtype) for name, spec in described.specs.items()} == reference_specs()
    assert described.config == json.loads((MICRO / "config.json").read_text())
    assert described.source == "owner/name"
    assert set(hub.fetched) == {"config.json", WEIGHTS}
    assert hub.bytes_of_weights < described.nbytes / 10
    local = describe(MICRO)
    assert (local.specs, local.config, local.nbytes) == (described.specs, described.config, described.nbytes)


@pytest.mark.parametrize(
    ("refuse", "says"),
    [
        ((404, "RepoNotFound"), r"^There is no folder owner/name@v2, and no model of that name on Hugging Face; check"),
        ((401, "RepoNotFound"), r"^There is no folder owner/name@v2, and no model of that name on Hugging Face; check"),
        ((404, "RevisionNotFound"), r"^owner/name has no revision 'v2'; see https://huggingface\.co/owner/name for"),
        ((403, "GatedRepo"), r"^owner/name@v2 is gated; accept its terms on https://huggingface\.co/owner/name and"),
        ((401, ""), r"^Hugging Face denies access to owner/name@v2 \(401\); log in"),
        ((403, ""), r"^Hugging Face denies access to owner/name@v2 \(403\); log in"),
        ((418, ""), r"^Hugging Face answered 418 for owner/name@v2; try again later\.$"),
    ],
)
@pytest.mark.parametrize("use", [resolve, describe])
def test_what_the_hub_refuses_is_one_sentence(
    start_hub: StartHub, refuse: tuple[int, str], says: str, use: Use
) -> None:
    start_hub(micro_files(), refuse)
    with pytest.raises(CheckpointError, match=says) as raised:
        use("owner/name@v2")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("use", [resolve, describe])
def test_a_gated_model_shows_itself_when_its_files_are_asked_for(start_hub: StartHub, use: Use) -> None:
    start_hub(micro_files(), (403, "GatedRepo"), refuse_files=True)
    with pytest.raises(CheckpointError, match=r"^owner/name is gated; accept its terms"):
        use("owner/name")


@pytest.mark.parametrize("use", [resolve, describe])
def test_a_repository_without_safetensors_is_refused(start_hub: StartHub, use: Use) -> None:
    start_hub({"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(CheckpointError, match=r"^owner/name has no safetensors weights"):
        use("owner/name")


def test_a_repository_without_a_config_is_refused(start_hub: StartHub) -> None:
    start_hub({WEIGHTS: b""})
    with pytest.raises(CheckpointError, match=r"^owner/name has no config\.json; choose"):
        describe("owner/name")


def test_a_damaged_remote_header_is_one_sentence(start_hub: StartHub) -> None:
    start_hub({"config.json": b"{}", WEIGHTS: (1 << 60).to_bytes(8, "little") + b"{"})
    with pytest.raises(CheckpointError, match=r"^owner/name has a damaged safetensors header"):
        describe("owner/name")


def test_a_damaged_remote_config_is_one_sentence(start_hub: StartHub) -> None:
    start_hub({"config.json": b"not json", WEIGHTS: (2).to_bytes(8, "little") + b"{}"})
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON .*; download it again\.$"):
        describe("owner/name")


@pytest.mark.parametrize("state", ["no_network", "offline"])
@pytest.mark.parametrize("use", [resolve, describe])
def test_an_id_that_is_not_cached_needs_the_network(state: str, use: Use, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(state)
    with pytest.raises(
        CheckpointError, match=r"^There is no folder owner/name, .* cannot be reached; connect"
    ) as raised:
        use("owner/name")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("state", ["no_network", "offline"])
def test_a_cached_model_needs_no_network(state: str, empty_cache: Path, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(state)
    snapshot = fill_cache(empty_cache, revision="v2")
    assert resolve("owner/name@v2") == snapshot
    assert resolve(f"owner/name@{COMMIT}") == snapshot
    described = describe("owner/name@v2")
    assert described.source == "owner/name@v2"
    assert {name: (spec.shape, spec.dtype) for name, spec in described.specs.items()} == reference_specs()
    with pytest.raises(CheckpointError, match="cannot be reached"):
        resolve("owner/name")


def test_a_cached_model_is_used_when_the_hub_refuses(start_hub: StartHub, empty_cache: Path) -> None:
    snapshot = fill_cache(empty_cache)
    start_hub(micro_files(), (503, ""))
    assert resolve("owner/name") == snapshot
    assert describe("owner/name").specs.keys() == reference_specs().keys()


@pytest.mark.parametrize("state", ["no_network", "offline"])
def test_a_half_cached_model_is_not_taken_for_a_whole_one(
    state: str, empty_cache: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(state)
    fill_cache(empty_cache, names=("config.json",))
    for use in (resolve, describe):
        with pytest.raises(CheckpointError, match=r"not \(wholly\) in the local Hugging Face cache"):
            use("owner/name")


def test_a_full_disk_and_a_broken_download_are_one_sentence(
    start_hub: StartHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_hub(micro_files())

    def fail_with(error: Exception) -> None:
        def fail(*arguments: object, local_files_only: bool, **options: object) -> str:
            raise LocalEntryNotFoundError("not cached") if local_files_only else error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)

    fail_with(OSError(28, "No space left on device"))
    with pytest.raises(CheckpointError, match=r"^owner/name could not be written .* \(No space left on device\)"):
        resolve("owner/name")
    fail_with(RuntimeError("peer closed connection"))
    with pytest.raises(CheckpointError, match=r"^owner/name could not be fetched .* \(RuntimeError: peer closed"):
        resolve("owner/name")
