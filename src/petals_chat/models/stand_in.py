"""A tiny Llama with random weights: something to serve where no model is configured.

It answers every question with words in random order. It exists so that the first start needs no download, and
goes through the same swarm, engine and APIs as a real model. Written with numpy, because the gateway process,
which builds it, loads no torch.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from petals_chat.settings import ChatSettings, GenerationDefaults, ModelSettings

Weights = npt.NDArray[np.float32]

KEY = "petals-chat/stand-in"
_END_OF_TEXT = "<|endoftext|>"
_NUM_BLOCKS = 6
_HIDDEN_SIZE = 128
_INTERMEDIATE_SIZE = 384
_NUM_HEADS = 4
_NUM_KEY_VALUE_HEADS = 2
_CONTEXT_TOKENS = 2048
_SEED = 2026

_VOCABULARY = """
petals swarm machine model block token layer memory host gateway session answer question word network
garden river morning evening light shadow small large quiet bright green golden simple many several every
another together alone carries holds opens follows keeps sends waits begins ends turns grows learns
speaks listens remembers forgets finds the a of in on with from under over between because while when
where if so and but or not it we they you she he
"""


def stand_in_settings(directory: Path) -> ModelSettings:
    """The model's entry; builds its checkpoint in ``directory`` unless it is there."""
    if not (directory / "config.json").exists():  # written last
        _build(directory)
    return ModelSettings(
        key=KEY,
        repository=str(directory),
        name="Stand-in (random words)",
        family="Built in",
        chat=ChatSettings(
            max_session_length=_CONTEXT_TOKENS,
            stop_token=_END_OF_TEXT,
            extra_stop_sequences=(),
            generation=GenerationDefaults(temperature=1.0, top_p=1.0, repetition_penalty=1.2),
        ),
    )


def _build(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _build_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    save_file(_build_weights(tokenizer), directory / "model.safetensors", metadata={"format": "pt"})
    end_of_text = tokenizer.token_to_id(_END_OF_TEXT)
    _write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END_OF_TEXT},
    )
    _write_json(directory / "generation_config.json", {"eos_token_id": end_of_text})
    _write_json(
        directory / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": _HIDDEN_SIZE,
            "intermediate_size": _INTERMEDIATE_SIZE,
            "num_hidden_layers": _NUM_BLOCKS,
            "num_attention_heads": _NUM_HEADS,
            "num_key_value_heads": _NUM_KEY_VALUE_HEADS,
            "max_position_embeddings": _CONTEXT_TOKENS,
            "rms_norm_eps": 1e-5,
            "vocab_size": tokenizer.get_vocab_size(),
            "bos_token_id": end_of_text,
            "eos_token_id": end_of_text,
            "tie_word_embeddings": False,
            "dtype": "float32",
        },
    )


def _build_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [f" {word}" for word in _VOCABULARY.split()],
        trainers.BpeTrainer(
            vocab_size=2048,
            min_frequency=1,
            special_tokens=[AddedToken(_END_OF_TEXT, special=True)],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def _build_weights(tokenizer: Tokenizer) -> dict[str, Weights]:
    random = np.random.default_rng(_SEED)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Weights:
        return np.asarray(random.standard_normal((rows, columns)) * scale / columns**0.5, dtype=np.float32)

    def ones() -> Weights:
        return np.ones(_HIDDEN_SIZE, dtype=np.float32)

    vocab_size = tokenizer.get_vocab_size()
    key_value_size = _HIDDEN_SIZE // _NUM_HEADS * _NUM_KEY_VALUE_HEADS
    # Only whole words are spoken, never half a character: dimension 0 is the same for all tokens, no block
    # changes it, and the head reads from it that words are likely.
    embeddings = matrix(vocab_size, _HIDDEN_SIZE, scale=_HIDDEN_SIZE**0.5)
    embeddings[:, 0] = 8.0
    spoken = [tokenizer.encode(f" {word}").ids[0] for word in _VOCABULARY.split()]
    spoken += tokenizer.encode(_END_OF_TEXT).ids
    head = np.zeros((vocab_size, _HIDDEN_SIZE), dtype=np.float32)
    head[spoken] = matrix(len(spoken), _HIDDEN_SIZE, scale=2.0)
    head[spoken, 0] = 8.0
    weights = {
        "model.embed_tokens.weight": embeddings,
        "model.norm.weight": ones(),
        "lm_head.weight": head,
    }
    for block in range(_NUM_BLOCKS):
        prefix = f"model.layers.{block}"
        weights |= {
            f"{prefix}.input_layernorm.weight": ones(),
            f"{prefix}.post_attention_layernorm.weight": ones(),
            f"{prefix}.self_attn.q_proj.weight": matrix(_HIDDEN_SIZE, _HIDDEN_SIZE),
            f"{prefix}.self_attn.k_proj.weight": matrix(key_value_size, _HIDDEN_SIZE),
            f"{prefix}.self_attn.v_proj.weight": matrix(key_value_size, _HIDDEN_SIZE),
            f"{prefix}.self_attn.o_proj.weight": matrix(_HIDDEN_SIZE, _HIDDEN_SIZE),
            f"{prefix}.mlp.gate_proj.weight": matrix(_INTERMEDIATE_SIZE, _HIDDEN_SIZE),
            f"{prefix}.mlp.up_proj.weight": matrix(_INTERMEDIATE_SIZE, _HIDDEN_SIZE),
            f"{prefix}.mlp.down_proj.weight": matrix(_HIDDEN_SIZE, _INTERMEDIATE_SIZE),
        }
        for output in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"{prefix}.{output}.weight"][0] = 0.0
    return weights


def _write_json(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
