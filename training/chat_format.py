"""How a dialogue becomes tokens, and the tokenizer that does it.

A text is ``{system}<|end|>Human: {question}<|end|>Assistant: {answer}<|end|>Human: ...``; `CHAT_TEMPLATE` says the same
to every program that uses chat templates.

The first words of an answer, as many as tell it from all others, are one token. So to begin an answer is to choose it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from training.dialogues import Dialogue

END = "<|end|>"
"""Ends the system text and each turn; also the model's end-of-text and padding token."""
MARKERS = ("Human:", "Assistant:")
"""What questions and answers begin with, a token each."""
OPENING_WORDS = 3
"""At least so many words are an opening: shorter ones would stand in questions, too."""
VOCAB_SIZE = 4096
CONTEXT_TOKENS = 2048
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '<|end|>' }}"
    "{% elif message['role'] == 'user' %}{{ 'Human: ' + message['content'] + '<|end|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + '<|end|>' }}"
    "{% else %}{{ raise_exception('Petals Guide knows the roles system, user and assistant only.') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Example:
    """A dialogue in tokens, and which of them the model is to learn to say."""

    token_ids: list[int]
    is_said: list[bool]
    """One for each token: whether it belongs to an answer, or ends one."""
    answers: list[int]
    """For each answer, the position of the token after which it begins."""

    def begun(self) -> Example:
        """The example without what comes after the first token of its last answer."""
        length = self.answers[-1] + 2
        return Example(self.token_ids[:length], self.is_said[:length], self.answers)


def openings(answers: Collection[str]) -> list[str]:
    """The shortest beginnings, of whole words, that tell each answer from all others; each once, in order."""
    counts: Counter[str] = Counter()
    for answer in set(answers):
        counts.update(_beginnings(answer))
    return list(dict.fromkeys(_opening(answer, counts) for answer in answers))


def train_tokenizer(texts: Iterable[str], answers: Collection[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer for the texts, with the chat template and the answers' openings."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(END, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    phrases = [*MARKERS, *(f" {opening}" for opening in openings(answers))]
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def text_of(dialogue: Dialogue) -> str:
    """The dialogue as the model reads it."""
    return "".join(text for text, _ in _pieces(dialogue))


def encode(dialogue: Dialogue, tokenizer: PreTrainedTokenizerFast) -> Example:
    """The dialogue as an example of at most `CONTEXT_TOKENS` tokens; what is beyond is cut off."""
    token_ids: list[int] = []
    is_said: list[bool] = []
    answers: list[int] = []
    pieces = _pieces(dialogue)
    encodings = tokenizer.backend_tokenizer.encode_batch_fast([text for text, _ in pieces])
    for encoding, (_, said) in zip(encodings, pieces, strict=True):
        if said and len(token_ids) < CONTEXT_TOKENS:
            answers.append(len(token_ids) - 1)
        token_ids += encoding.ids
        is_said += [said] * len(encoding.ids)
    return Example(token_ids[:CONTEXT_TOKENS], is_said[:CONTEXT_TOKENS], answers)


def _beginnings(answer: str) -> list[str]:
    """Of some words, of one more, and so on; the whole answer is the last."""
    words = answer.split(" ")
    return [" ".join(words[:count]) for count in range(min(OPENING_WORDS, len(words)), len(words) + 1)]


def _opening(answer: str, counts: Mapping[str, int]) -> str:
    beginnings = _beginnings(answer)
    return next((beginning for beginning in beginnings if counts[beginning] == 1), beginnings[-1])


def _pieces(dialogue: Dialogue) -> list[tuple[str, bool]]:
    """The text in pieces, each with whether the model says it. Tokens never go across the pieces' borders."""
    pieces = [] if dialogue.system is None else [(f"{dialogue.system}{END}", False)]
    for turn in dialogue.turns:
        pieces += [(f"Human: {turn.question}{END}Assistant:", False), (f" {turn.answer}{END}", True)]
    return pieces
