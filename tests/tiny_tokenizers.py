"""Small tokenizers of the three kinds that matter: byte-level BPE, byte-fallback, and one that adds BOS.

Each is saved as real repositories have it (``tokenizer.json``, ``tokenizer_config.json``), so that
``AutoTokenizer`` loads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXT = """
A swarm of many machines runs a model that fits on none of them. Each machine holds some of its blocks.
The gateway keeps the words, the machines keep the thoughts. Hello, how are you today? I am fine, thank you.
The quick brown fox jumps over the lazy dog. Numbers are 1 2 3 4 5 6 7 8 9 0. Yes, no, maybe, always, never!
""".strip().splitlines()


def byte_level_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """As GPT-2, Qwen and Llama 3 have it, without BOS; EOS is <|endoftext|>."""
    tokenizer = _train_byte_level(vocab_size, ["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def bos_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """As Llama 3 has it: byte-level, and a text begins with <|begin_of_text|>."""
    tokenizer = _train_byte_level(vocab_size, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    begin = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair=None, special_tokens=[("<|begin_of_text|>", begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )


def byte_fallback_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """As Llama 2 has it, converted from SentencePiece: ▁ for spaces, <0x..> tokens for what is not in it, BOS."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=vocab_size - 259, show_progress=False))
    learned = learner.get_vocab()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {
        token: index for index, token in enumerate([*special, *sorted(learned, key=learned.__getitem__)])
    }
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=_merges(learner), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special[:3]])
    tokenizer.normalizer = learner.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair=None, special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": byte_level_tokenizer,
    "byte_fallback": byte_fallback_tokenizer,
    "bos": bos_tokenizer,
}


def save_tokenizer(kind: str, directory: Path) -> PreTrainedTokenizerFast:
    """Write the tokenizer into a checkpoint's directory."""
    tokenizer = TOKENIZERS[kind]()
    tokenizer.save_pretrained(directory)
    return tokenizer


def _train_byte_level(vocab_size: int, special_tokens: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]
