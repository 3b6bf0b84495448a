"""What a checkpoint holds: its config.json, its tensors, and which of them the gateway's machine needs.

Only headers are read until tensors are fetched. There is no torch here: `petals_chat.head` loads the tensors.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from petals_chat.errors import ConfigurationError
from petals_chat.models.repositories import Repository, TensorInfo, open_repository, read_json

__all__ = ["Checkpoint", "ClientTensors", "TensorInfo", "client_tensors", "open_checkpoint"]

_CONFIG_FILE = "config.json"
_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model's checkpoint, in safetensors, in one file or in shards."""

    config: dict[str, Any]
    """What config.json says."""
    tensors: Mapping[str, TensorInfo]
    """By name. The names are known; a file's header is read when a tensor of it is asked for."""
    _repository: Repository
    _files: Mapping[str, str]

    @property
    def model_type(self) -> str:
        """The architecture, in the words of transformers: "llama", "bloom", ..."""
        return str(self.config["model_type"])

    @property
    def num_blocks(self) -> int:
        """Number of transformer blocks."""
        return int(self.config[_blocks_key(self.config)])

    @property
    def short_context(self) -> int | None:
        """Tokens up to which a context has other rotary frequencies than a longer one (LongRoPE); None = never.

        Beyond, all positions change. Hosts choose by the room that a session reserves.
        """
        rope = self.config.get("rope_scaling") or self.config.get("rope_parameters")
        if not isinstance(rope, dict):
            return None
        names = {"longrope"}
        if self.model_type == "phi3":
            names |= {"su", "yarn"}  # as it was called at first
        if rope.get("rope_type", rope.get("type")) not in names:
            return None
        key = "original_max_position_embeddings"
        length = rope.get(key, self.config.get(key))
        return length if isinstance(length, int) else None

    def fetch(self, names: Iterable[str]) -> dict[str, Path]:
        """The file of each of these tensors, after downloading those files that are not on this machine yet.

        Raises:
            KeyError: there is no such tensor.
            ConfigurationError: a file is missing, or the hub does not give it.
        """
        files = {name: self._files[name] for name in names}
        paths = {file: self._repository.path(file) for file in dict.fromkeys(files.values())}
        return {name: paths[file] for name, file in files.items()}


def open_checkpoint(repository: str, revision: str | None = None) -> Checkpoint:
    """Read what the checkpoint holds, without its weights.

    Args:
        repository: a local directory, or the name of a repository on the hub.
        revision: branch, tag or commit on the hub; None = its main branch.

    Raises:
        ConfigurationError: the checkpoint cannot be had or used; the message says what to do.
    """
    source = open_repository(repository, revision)
    if _CONFIG_FILE not in source.files:
        raise ConfigurationError(f"{repository} has no {_CONFIG_FILE}: it is not the checkpoint of a model")
    config = read_json(source.path(_CONFIG_FILE))
    if "model_type" not in config or not isinstance(config.get(_blocks_key(config)), int):
        raise ConfigurationError(
            f"{repository}: {_CONFIG_FILE} does not say the model's type and number of blocks"
        )
    if _SINGLE_FILE in source.files:
        header = source.header(_SINGLE_FILE)
        return Checkpoint(config, header, source, dict.fromkeys(header, _SINGLE_FILE))
    if _INDEX_FILE in source.files:
        files = read_json(source.path(_INDEX_FILE)).get("weight_map")
        if not isinstance(files, dict):
            raise ConfigurationError(
                f"{repository}: {_INDEX_FILE} has no weight_map. Copy or download it again"
            )
        return Checkpoint(config, _ShardedTensors(source, files), source, files)
    raise ConfigurationError(_no_weights(repository, source.files))


@dataclasses.dataclass(frozen=True)
class ClientTensors:
    """Names of the tensors that are needed outside the blocks."""

    embeddings: str
    """[vocabulary, hidden size]"""
    embeddings_norm_weight: str | None
    embeddings_norm_bias: str | None
    final_norm_weight: str
    final_norm_bias: str | None
    """None = an RMSNorm, which has no bias."""
    head: str | None
    """[vocabulary, hidden size]; None = the embeddings are the head too."""

    def names(self) -> list[str]:
        """All that there are."""
        return [name for name in dataclasses.astuple(self) if name is not None]


def client_tensors(config: Mapping[str, Any], tensor_names: Collection[str]) -> ClientTensors:
    """Find the tensors that are needed outside the blocks.

    As in transformers, a head in the checkpoint is used even if config.json says that it is tied to the
    embeddings: where both are there, they are equal or the config is wrong.

    Raises:
        ConfigurationError: the model's type is not supported, or a tensor is missing.
    """
    model_type = config.get("model_type")
    layout = _LAYOUTS.get(str(model_type))
    if layout is None:
        raise ConfigurationError(
            f"model type {model_type!r} is not supported; supported: {', '.join(_LAYOUTS)}"
        )

    def find(module: str, part: str = "weight") -> str:
        candidates = [f"{prefix}{module}.{part}" for prefix in layout.prefixes]
        for name in candidates:
            if name in tensor_names:
                return name
        raise ConfigurationError(
            f"the checkpoint has no tensor {' or '.join(candidates)}, which a {model_type} needs"
        )

    head = "lm_head.weight" if "lm_head.weight" in tensor_names else None
    if head is None and not config.get("tie_word_embeddings", layout.tied_by_default):
        raise ConfigurationError(
            "the checkpoint has no tensor lm_head.weight, and config.json does not tie it"
        )
    embeddings_norm = layout.embeddings_norm
    return ClientTensors(
        embeddings=find(layout.embeddings),
        embeddings_norm_weight=find(embeddings_norm) if embeddings_norm else None,
        embeddings_norm_bias=find(embeddings_norm, "bias") if embeddings_norm else None,
        final_norm_weight=find(layout.final_norm),
        final_norm_bias=find(layout.final_norm, "bias") if layout.has_biases else None,
        head=head,
    )


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Names of modules in an architecture's checkpoints."""

    prefixes: tuple[str, ...]
    """In front of the names; checkpoints of the bare model, like BLOOM's own, have none."""
    embeddings: str
    final_norm: str
    embeddings_norm: str | None = None
    has_biases: bool = False
    """Of the norms."""
    tied_by_default: bool = False
    """What transformers takes ``tie_word_embeddings`` to be where config.json is silent."""


_LLAMA = _Layout(("model.",), "embed_tokens", "norm")
_GEMMA = dataclasses.replace(_LLAMA, tied_by_default=True)
_BLOOM = _Layout(
    ("transformer.", ""),
    "word_embeddings",
    "ln_f",
    embeddings_norm="word_embeddings_layernorm",
    has_biases=True,
    tied_by_default=True,
)
_FALCON = _Layout(("transformer.", ""), "word_embeddings", "ln_f", has_biases=True, tied_by_default=True)
_LAYOUTS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": _LLAMA,
    "bloom": _BLOOM,
    "falcon": _FALCON,
}


class _ShardedTensors(Mapping[str, TensorInfo]):
    """The tensors of an index; each shard's header is read once, when it is needed first."""

    def __init__(self, repository: Repository, files: Mapping[str, str]) -> None:
        self._repository = repository
        self._files = files
        self._header = functools.cache(repository.header)

    def __getitem__(self, name: str) -> TensorInfo:
        file = self._files[name]
        tensor = self._header(file).get(name)
        if tensor is None:
            raise ConfigurationError(
                f"{self._repository.name}: {file} does not hold {name}, although the index says so. "
                "Copy or download the checkpoint again"
            )
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _blocks_key(config: Mapping[str, Any]) -> str:
    # BLOOM's and the first Falcon checkpoints' word is n_layer.
    return "num_hidden_layers" if "num_hidden_layers" in config else "n_layer"


def _no_weights(repository: str, files: Collection[str]) -> str:
    if any(file.endswith((".bin", ".bin.index.json")) for file in files):
        convert = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer; "
            f"[kind.from_pretrained('{repository}').save_pretrained('DIRECTORY') "
            "for kind in (AutoModelForCausalLM, AutoTokenizer)]"
        )
        return (
            f"{repository} has its weights only in PyTorch's .bin files, but safetensors are needed. On a "
            f'machine with memory for the whole model, run: python -c "{convert}"; then set repository to '
            "DIRECTORY"
        )
    return f"{repository} has neither {_SINGLE_FILE} nor {_INDEX_FILE}: no weights in safetensors"
