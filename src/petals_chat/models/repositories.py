"""The files of a checkpoint, in a directory or on the Hugging Face hub, and what can go wrong with them.

Safetensors files are known by their headers; a file on the hub is downloaded only when its path is asked for.
What the tensors mean is not known here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import HfApi, get_token, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.errors import HTTPError as HubTransportError  # type: ignore[attr-defined]

from petals_chat.errors import ConfigurationError

_HEADER_LIMIT_BYTES = 100_000_000  # as in the safetensors library
_LFS_POINTER = b"version "  # of the pointer's format, in its first bytes
_UNREACHABLE = (HubTransportError, LocalEntryNotFoundError, OfflineModeIsEnabled, TimeoutError)


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of a tensor."""

    dtype: str
    """In the words of safetensors: "F32", "F16", "BF16", ..."""
    shape: tuple[int, ...]
    file: str
    """Name of the file that holds it."""

    @property
    def num_elements(self) -> int:
        """Product of the shape; 1 for a scalar."""
        product = 1
        for size in self.shape:
            product *= size
        return product


class Repository(Protocol):
    """The files of one checkpoint. All methods raise `ConfigurationError` if a file cannot be had."""

    @property
    def name(self) -> str:
        """For messages: the hub name, or the directory."""

    @property
    def files(self) -> frozenset[str]:
        """Names of the files at the top level."""

    def path(self, file: str) -> Path:
        """The file on this machine, after downloading it if need be."""

    def header(self, file: str) -> dict[str, TensorInfo]:
        """The tensors of a safetensors file, by name; nothing but the header is read or downloaded."""


class LocalRepository:
    """A directory."""

    def __init__(self, directory: Path, name: str | None = None) -> None:
        self.name = name or str(directory)
        self._directory = directory
        if not directory.is_dir():
            raise ConfigurationError(f"the model directory {directory} does not exist")

    @property
    def files(self) -> frozenset[str]:
        """What is in the directory."""
        return frozenset(path.name for path in self._directory.iterdir())

    def path(self, file: str) -> Path:
        """The file, which is there already."""
        path = self._directory / file
        if not path.is_file():
            raise ConfigurationError(f"{self.name}: the file {file} is missing")
        return path

    def header(self, file: str) -> dict[str, TensorInfo]:
        """Of the file itself."""
        return read_header(self.path(file))


class HubRepository:
    """A repository on the hub, as it is at ``revision``; None = its main branch.

    The token is the environment's: ``HF_TOKEN``, or what a login has left on this machine.
    """

    def __init__(self, name: str, revision: str | None) -> None:
        self.name = name
        self._revision = revision
        with _explained(name, revision):
            info = HfApi().model_info(name, revision=revision, timeout=10)
        self.files = frozenset(sibling.rfilename for sibling in info.siblings or ())

    def path(self, file: str) -> Path:
        """The file in the hub's cache on this machine."""
        with _explained(self.name, self._revision):
            return Path(hf_hub_download(self.name, file, revision=self._revision))

    def header(self, file: str) -> dict[str, TensorInfo]:
        """Of the cached file, else the part of the file that holds it is read from the hub."""
        if isinstance(cached := try_to_load_from_cache(self.name, file, revision=self._revision), str):
            return read_header(Path(cached))
        with _explained(self.name, self._revision):
            metadata = HfApi().parse_safetensors_file_metadata(self.name, file, revision=self._revision)
        return {
            name: TensorInfo(info.dtype, tuple(info.shape), file) for name, info in metadata.tensors.items()
        }


def open_repository(name: str, revision: str | None) -> Repository:
    """The directory ``name`` if there is one, else the hub's repository of this name.

    If the hub is out of reach, what an earlier download left on this machine is used.

    Raises:
        ConfigurationError: there is none, or it may not be read, or the hub does not answer and there is no
            earlier download (then its data have ``hub_unreachable``).
    """
    if Path(name).is_absolute() or Path(name).is_dir():
        return LocalRepository(Path(name))
    try:
        return HubRepository(name, revision)
    except ConfigurationError as error:
        if not error.data.get("hub_unreachable"):
            raise
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(cached, str):
            return LocalRepository(Path(cached).parent, name)
        raise


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, by name, from its first bytes alone.

    Raises:
        ConfigurationError: it is no safetensors file, or shorter than its header says.
    """
    with _readable(path), path.open("rb") as file:
        size = path.stat().st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        header = file.read(length) if 0 < length <= min(size - 8, _HEADER_LIMIT_BYTES) else b""
    if start == _LFS_POINTER:
        raise ConfigurationError(
            f"{path}: this is a Git LFS pointer, not the file itself. Run `git lfs pull` in its directory"
        )
    try:
        table: dict[str, Any] = json.loads(header)
        table.pop("__metadata__", None)
        tensors = {
            name: TensorInfo(entry["dtype"], tuple(entry["shape"]), path.name)
            for name, entry in table.items()
        }
        data_bytes = max((entry["data_offsets"][1] for entry in table.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ConfigurationError(
            f"{path}: not a safetensors file, or a damaged one. Copy or download it again"
        ) from None
    if size < 8 + length + data_bytes:
        raise ConfigurationError(
            f"{path}: the file is cut off: it has {size} of {8 + length + data_bytes} bytes. "
            "Copy or download it again"
        )
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `ConfigurationError` if the file is none."""
    with _readable(path):
        content = path.read_bytes()
    try:
        table = json.loads(content)
    except ValueError as error:
        raise ConfigurationError(f"{path}: not valid JSON: {error}. Copy or download it again") from None
    if not isinstance(table, dict):
        raise ConfigurationError(f"{path}: a JSON object was expected")
    return table


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None


@contextlib.contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """Translate the hub's errors into what the person who configured ``name`` can do."""
    try:
        yield
    except GatedRepoError:
        accept = f"accept the licence of {name} at https://huggingface.co/{name}"
        if get_token():
            advice = f"{accept}, with the account to which the hub token of this machine belongs"
        else:
            advice = f"{accept}, then run `huggingface-cli login` (newer: `hf auth login`), or set HF_TOKEN"
        raise ConfigurationError(f"{name} is a gated model: {advice}") from None
    except RepositoryNotFoundError:
        raise ConfigurationError(
            f"the hub has no repository {name}, or it is private. Check the name; for a private one, "
            "run `huggingface-cli login` (newer: `hf auth login`), or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ConfigurationError(f"the repository {name} has no revision {revision!r}") from None
    except RemoteEntryNotFoundError as error:
        raise ConfigurationError(
            f"{name}: a file that the checkpoint names is not there ({error.response.url})"
        ) from None
    except HFValidationError:
        raise ConfigurationError(
            f"{name!r} is neither a directory nor a possible name of a hub repository"
        ) from None
    except SafetensorsParsingError as error:
        raise ConfigurationError(f"{name}: {error}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ConfigurationError(
                f"the hub refuses {name} to the hub token of this machine (HTTP status {status}). Run "
                "`huggingface-cli login` again (newer: `hf auth login`), or set HF_TOKEN to a valid one"
            ) from None
        raise ConfigurationError(
            f"the hub answered with HTTP status {status} when asked for {name}. Try again later",
            hub_unreachable=True,
        ) from None
    except _UNREACHABLE as error:
        reason = error.__cause__ or error
        raise ConfigurationError(
            f"the hub cannot be reached to read {name} ({reason}). Check the network, or download the model "
            "elsewhere and set repository to its directory",
            hub_unreachable=True,
        ) from None
    except OSError as error:
        raise ConfigurationError(
            f"{name} cannot be stored in the hub's cache on this machine: {error}"
        ) from None
