"""The parts of a model that the gateway's machine computes: embeddings, final norm and LM head.

Only these tensors of the checkpoint are read, through memory-mapped safetensors. On a CPU, 16-bit embeddings and
heads stay in the page cache, shared by all processes that map them, also where it computes in float32: they are
converted as they are used, which changes no value.
The formulas are those of ``transformers``' model code, in the same order of casts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from safetensors import safe_open

from petals_chat.errors import ConfigurationError
from petals_chat.models.checkpoint import Checkpoint, client_tensors

_GEMMA = ("gemma2", "gemma3_text")
_GEMMA2_LOGIT_CAP = 30.0
"""What transformers takes ``final_logit_softcapping`` to be where config.json is silent."""
_HALVES = (torch.bfloat16, torch.float16)
HEAD_BLOCK = 256
"""Rows of a 16-bit head that are converted at once; they stay in the CPU's cache until they are multiplied."""


@dataclasses.dataclass(frozen=True)
class Norm:
    """RMSNorm, or LayerNorm if there is a bias. ``weight``, ``bias``: [hidden_size]."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    epsilon: float
    adds_one: bool = False
    """Whether one is added to the weights, as in Gemma's RMSNorm."""

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension; any shape [..., hidden_size]."""
        if self.bias is not None:
            return F.layer_norm(hidden_states, self.weight.shape, self.weight, self.bias, self.epsilon)
        # LlamaRMSNorm: the mean in float32, the product in the model's dtype
        exact = F.rms_norm(hidden_states.float(), self.weight.shape, eps=self.epsilon)
        if self.adds_one:
            return (exact * (1.0 + self.weight.float())).to(hidden_states.dtype)
        return self.weight * exact.to(hidden_states.dtype)


@dataclasses.dataclass(frozen=True)
class ClientModules:
    """Everything between token ids and the first block, and between the last block and logits."""

    embeddings: torch.Tensor
    """[vocab_size, hidden_size]"""
    embeddings_norm: Norm | None
    final_norm: Norm
    head: torch.Tensor
    """[vocab_size, hidden_size]; the embeddings again if the model ties them."""
    embedding_scale: torch.Tensor | None = None
    """What embeddings are multiplied with; a scalar of their dtype, as its rounding is part of the model."""
    logit_cap: float | None = None
    """Soft limit of the logits' absolute value."""
    short_context: int | None = None
    """See `Checkpoint.short_context`."""

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states; embeddings and head may be 16-bit where this is float32."""
        return self.final_norm.weight.dtype

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.head.shape[0]

    def embed(self, tokens: Sequence[int]) -> torch.Tensor:
        """Token ids to the input of block 0: [1, len(tokens), hidden_size]."""
        if len(tokens) == 1:  # the most frequent case; no index has to be made for it
            rows = self.embeddings[tokens[0]][None, None]
        else:
            rows = F.embedding(torch.tensor([tokens], device=self.embeddings.device), self.embeddings)
        hidden_states = rows.to(self.dtype)
        if self.embedding_scale is not None:
            hidden_states = hidden_states * self.embedding_scale
        return self.embeddings_norm(hidden_states) if self.embeddings_norm else hidden_states

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Output of the last block, [rows, hidden_size], to logits, float32 [rows, vocab_size]."""
        normed = self.final_norm(hidden_states)
        is_native = self.head.dtype is normed.dtype
        logits = F.linear(normed, self.head) if is_native else _linear_by_blocks(normed, self.head)
        if self.logit_cap is not None:
            logits = torch.tanh(logits / self.logit_cap) * self.logit_cap
        return logits.float()


def _linear_by_blocks(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """float32 [rows, hidden_size] times 16-bit [vocab_size, hidden_size]: [rows, vocab_size]."""
    result = rows.new_empty(rows.shape[0], weight.shape[0])
    for start in range(0, weight.shape[0], HEAD_BLOCK):
        block = weight[start : start + HEAD_BLOCK]
        result[:, start : start + HEAD_BLOCK] = rows @ block.to(rows.dtype).T
    return result


def load_client_modules(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> ClientModules:
    """Read the gateway's share of ``checkpoint``, downloading only the files that hold it.

    Raises:
        ConfigurationError: the checkpoint lacks a tensor, or its architecture is not known.
    """
    names = client_tensors(checkpoint.config, checkpoint.tensors)
    files = checkpoint.fetch([name for name in dataclasses.astuple(names) if name is not None])

    def read(name: str, *, may_stay_mapped: bool = False) -> torch.Tensor:
        with safe_open(files[name], framework="pt", device="cpu") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        if may_stay_mapped and device.type == "cpu" and dtype is torch.float32 and tensor.dtype in _HALVES:
            return tensor
        return tensor.to(device=device, dtype=dtype)

    is_gemma = checkpoint.model_type in _GEMMA

    def read_norm(weight: str, bias: str | None) -> Norm:
        return Norm(read(weight), read(bias) if bias else None, _norm_epsilon(checkpoint.config), is_gemma)

    embeddings = read(names.embeddings, may_stay_mapped=True)
    final_norm = read_norm(names.final_norm_weight, names.final_norm_bias)
    return ClientModules(
        embeddings=embeddings,
        embeddings_norm=(
            read_norm(names.embeddings_norm_weight, names.embeddings_norm_bias)
            if names.embeddings_norm_weight
            else None
        ),
        final_norm=final_norm,
        head=read(names.head, may_stay_mapped=True) if names.head else embeddings,
        embedding_scale=final_norm.weight.new_tensor(embeddings.shape[1] ** 0.5) if is_gemma else None,
        logit_cap=_logit_cap(checkpoint.config),
        short_context=checkpoint.short_context,
    )


def _norm_epsilon(config: dict[str, object]) -> float:
    """Of RMSNorm ("rms_norm_eps") or LayerNorm ("layer_norm_epsilon"), with the defaults of transformers."""
    epsilon = config.get("rms_norm_eps", config.get("layer_norm_epsilon", 1e-5))
    if not isinstance(epsilon, int | float):
        raise ConfigurationError(f"config.json: the norm's epsilon must be a number, not {epsilon!r}")
    return float(epsilon)


def _logit_cap(config: dict[str, object]) -> float | None:
    default = _GEMMA2_LOGIT_CAP if config.get("model_type") == "gemma2" else None
    cap = config.get("final_logit_softcapping", default)
    if cap is not None and (not isinstance(cap, int | float) or cap <= 0):
        raise ConfigurationError(
            f"config.json: final_logit_softcapping must be a number greater than 0, not {cap!r}"
        )
    return cap
