"""Models by name: a folder, or a Hugging Face id that is downloaded, or described from its headers alone.

Only data is fetched, from the top of a repository: JSON, templates, text and safetensors; never code, never a pickle.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivcore.errors import CheckpointError
from ivcore.files import read_json
from ivcore.shards import Checkpoint, TensorSpec

PACKAGED = "iv3-tiny"
"""The model that comes with the package; a folder of that name in the working directory goes first."""

_PACKAGED_FOLDER = Path(__file__).with_name(PACKAGED)
_MODEL_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[A-Za-z0-9][\w./-]*))?", re.ASCII)
_WANTED = ["*.json", "*.jinja", "*.txt", "*.safetensors"]
# Repositories keep other formats, and whole second copies of the weights, in folders.
_UNWANTED = ["*/*"]


@dataclass(frozen=True)
class ModelId:
    """A repository on Hugging Face; revision: a branch, tag or commit, None for its main branch."""

    id: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id


@dataclass(frozen=True)
class Description:
    """A checkpoint as config.json's content and its tensors' specs; nbytes: bytes of all tensors."""

    source: str
    config: dict[str, Any]
    specs: dict[str, TensorSpec]
    nbytes: int


def resolve(model: str | Path) -> Path:
    """The folder of a model: an existing one as it is, that of an id `owner/name[@revision]` after downloading it.

    PACKAGED names the model that comes with the package.

    Raises CheckpointError when there is no such folder or model, or it is neither in the cache nor to be downloaded.
    """
    found = _locate(model)
    if isinstance(found, Path):
        return found
    try:
        return _download(found)
    except CheckpointError:
        if folder := _cached(found):
            return folder
        raise


def describe(model: str | Path) -> Description:
    """Config and tensor specs of a folder or an id; of an id only config.json and the safetensors headers are read.

    Raises CheckpointError or ConfigError where one of them cannot be had.
    """
    found = _locate(model)
    if isinstance(found, Path):
        return _describe_folder(found, str(found))
    try:
        return _describe_remote(found)
    except CheckpointError:
        if folder := _cached(found):
            return _describe_folder(folder, str(found))
        raise


def _locate(model: str | Path) -> Path | ModelId:
    try:
        path = Path(model).expanduser()
    except RuntimeError:  # ~ of somebody who is not there
        path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; name the folder of a checkpoint.")
    if str(model) == PACKAGED and _PACKAGED_FOLDER.is_dir():
        return _PACKAGED_FOLDER
    if match := _MODEL_ID.fullmatch(str(model)):
        return ModelId(match["id"], match["revision"])
    raise CheckpointError(
        f"{model} does not exist; name the folder of a checkpoint or a Hugging Face id (owner/name@revision)."
    )


def _describe_folder(folder: Path, source: str) -> Description:
    config = read_json(folder / "config.json")
    checkpoint = Checkpoint(folder)
    return Description(source, config, checkpoint.specs, checkpoint.nbytes())


def _download(model: ModelId) -> Path:
    with _one_sentence(model):
        _commit(model)
    folder = _snapshot(model, local_files_only=False)
    if not Checkpoint.present(folder):
        raise CheckpointError(f"{model} has no safetensors weights; choose a repository that has them.")
    return folder


def _snapshot(model: ModelId, *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    with _one_sentence(model):
        return Path(
            snapshot_download(
                model.id,
                revision=model.revision,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
                local_files_only=local_files_only,
            )
        )


def _commit(model: ModelId) -> str | None:
    """The commit that a revision is now.

    Asked before anything else, because other requests are retried for half a minute where there is no network.
    """
    from huggingface_hub import HfApi

    return HfApi().model_info(model.id, revision=model.revision).sha


def _describe_remote(model: ModelId) -> Description:
    from huggingface_hub import HfApi

    api = HfApi()
    with _one_sentence(model):
        commit = _commit(model)
        config = api.hf_hub_download(model.id, "config.json", revision=commit)
        files = api.get_safetensors_metadata(model.id, revision=commit).files_metadata.values()
        tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
        specs = {name: TensorSpec(tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()}
        nbytes = sum(tensor.data_offsets[1] - tensor.data_offsets[0] for tensor in tensors.values())
    return Description(str(model), read_json(Path(config)), specs, nbytes)


def _cached(model: ModelId) -> Path | None:
    """The cached snapshot of a model, if it is there with its weights."""
    try:
        folder = _snapshot(model, local_files_only=True)
        Checkpoint(folder)
    except CheckpointError:
        return None
    return folder


@contextmanager
def _one_sentence(model: ModelId) -> Iterator[None]:
    """Turn whatever the hub's client raises into one CheckpointError."""
    try:
        yield
    # Beside its own, the client lets errors through of an HTTP library that differs from version to version.
    except Exception as error:
        raise _explain(error, model) from None


def _explain(error: BaseException, model: ModelId) -> CheckpointError:
    from huggingface_hub import errors

    page = f"https://huggingface.co/{model.id}"
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # the hub did answer, but with an error
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    # A class of httpx or httpx2, by the client's version.
    cut_off = type(error).__name__ in ("ConnectError", "ConnectTimeout")
    match error:
        case errors.GatedRepoError():
            return CheckpointError(
                f"{model} is gated; accept its terms on {page} and log in with `hf auth login`, then run this again."
            )
        case errors.RevisionNotFoundError():
            return CheckpointError(f"{model.id} has no revision {model.revision!r}; see {page} for those it has.")
        case errors.RepositoryNotFoundError():
            return CheckpointError(
                f"There is no folder {model}, and no model of that name on Hugging Face; check the spelling, or log in "
                "with `hf auth login` if it is private."
            )
        case _ if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError) or cut_off:
            return CheckpointError(
                f"There is no folder {model}, it is not (wholly) in the local Hugging Face cache, and the hub cannot "
                "be reached; connect to the network or name the folder of a checkpoint."
            )
        case errors.EntryNotFoundError():
            return CheckpointError(f"{model} has no config.json; choose a repository with a whole checkpoint.")
        case errors.NotASafetensorsRepoError():
            return CheckpointError(f"{model} has no safetensors weights; choose a repository that has them.")
        case errors.SafetensorsParsingError():
            return CheckpointError(f"{model} has a damaged safetensors header; choose another revision.")
        case errors.HFValidationError():
            return CheckpointError(f"There is no folder {model}, and {model.id} is not a valid Hugging Face id.")
        case errors.HfHubHTTPError() if status in (401, 403):
            return CheckpointError(f"Hugging Face denies access to {model} ({status}); log in with `hf auth login`.")
        case errors.HfHubHTTPError():
            return CheckpointError(f"Hugging Face answered {status} for {model}; try again later.")
        case OSError(strerror=str(reason)):
            return CheckpointError(f"{model} could not be written to the Hugging Face cache ({reason}); see HF_HOME.")
    return CheckpointError(
        f"{model} could not be fetched from Hugging Face ({type(error).__name__}: {error}); check the network and run "
        "this again, or name the folder of a checkpoint."
    )
