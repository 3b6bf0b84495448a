"""Trains the model: a plain PyTorch loop over generated dialogues, on CPU."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from itertools import islice
from random import Random

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from petals_chat.head.precision import cpu_computes_bfloat16
from training.chat_format import CONTEXT_TOKENS, Example, encode
from training.dialogues import DialogueWriter

MAX_ANSWERS = 1024
LENGTH_STEP = 16
"""Batches are padded to a multiple of this many tokens."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out. The defaults make the bundled model."""

    hidden_size: int = 192
    intermediate_size: int = 512
    num_blocks: int = 6
    num_heads: int = 3
    num_key_value_heads: int = 3
    steps: int = 6000
    tokens_per_step: int = 2048
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    final_learning_rate: float = 5e-5
    weight_decay: float = 0.1
    begun_share: float = 0.75
    """Share of the dialogues that are cut in their last answer. Which answer it is shows in its first words;
    how it goes on is learnt by heart from the others."""
    begun_tokens: int = 12
    """How much of the last answer such a dialogue keeps."""
    seed: int = 2026
    report_every: int = 50


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model with random weights, in float32."""
    torch.manual_seed(recipe.seed)
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_blocks,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        max_position_embeddings=CONTEXT_TOKENS,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, batches: Iterator[list[Example]], recipe: Recipe) -> None:
    """Train the model in place, one batch a step. Prints its progress."""
    answer_head = AnswerHead(recipe.hidden_size, MAX_ANSWERS)
    trained = [*model.parameters(), *answer_head.parameters()]
    decayed = [parameter for parameter in trained if parameter.dim() >= 2]
    others = [parameter for parameter in trained if parameter.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    model.train()
    losses, tokens, started = [], 0, time.monotonic()
    for step, batch in enumerate(islice(batches, recipe.steps), 1):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, recipe)
        loss = _loss(model, answer_head, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tokens += sum(len(example.token_ids) for example in batch)
        if step % recipe.report_every == 0 or step == recipe.steps:
            minutes = (time.monotonic() - started) / 60
            print(
                f"step {step} of {recipe.steps}, loss {sum(losses) / len(losses):.3f}, "
                f"{tokens / 1e6:.2f} million tokens, {minutes:.1f} min, {time.process_time() / 60:.1f} CPU min",
                flush=True,
            )
            losses.clear()
    model.eval()


def batches(
    writer: DialogueWriter, tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> Iterator[list[Example]]:
    """Endless batches of about ``tokens_per_step`` tokens, padding included.

    Each batch has dialogues of like length: a pool of some batches' dialogues is sorted by length, cut into
    batches, and these are shuffled.
    """
    random = Random(recipe.seed)
    dialogues = iter(writer)
    while True:
        pool: list[Example] = []
        while sum(len(example.token_ids) for example in pool) < 32 * recipe.tokens_per_step:
            pool += [
                _maybe_begun(encode(dialogue, tokenizer), recipe, random)
                for dialogue in islice(dialogues, 64)
            ]
        pool.sort(key=lambda example: len(example.token_ids))
        cut = _cut(pool, recipe.tokens_per_step)
        random.shuffle(cut)
        yield from cut


def _maybe_begun(example: Example, recipe: Recipe, random: Random) -> Example:
    if random.random() >= recipe.begun_share:
        return example
    answer = len(example.is_said) - example.is_said[::-1].index(False)  # where the last one begins
    length = answer + recipe.begun_tokens
    return Example(example.token_ids[:length], example.is_said[:length], example.answers)


def _cut(pool: list[Example], tokens_per_step: int) -> list[list[Example]]:
    batches: list[list[Example]] = [[]]
    for example in pool:
        rows = max(1, tokens_per_step // _padded(len(example.token_ids), LENGTH_STEP))
        if len(batches[-1]) >= rows:
            batches.append([])
        batches[-1].append(example)
    return batches


def _padded(length: int, step: int) -> int:
    """The next multiple of ``step``: the CPU's library prepares, and keeps, programs for each shape it meets."""
    return -(-length // step) * step


def _learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * step / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    span = recipe.learning_rate - recipe.final_learning_rate
    return recipe.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * progress))


class AnswerHead(torch.nn.Module):
    """Names the answer from the hidden state of the token after which it begins; used in training only.

    Few of an answer's tokens tell it from other answers, so the language model's own loss is slow to teach which
    answer a question asks for. This one teaches it directly.
    """

    def __init__(self, hidden_size: int, max_answers: int) -> None:
        super().__init__()
        self._linear = torch.nn.Linear(hidden_size, max_answers)
        self._numbers: dict[str, int] = {}

    def loss(self, hidden: torch.Tensor, batch: list[Example]) -> torch.Tensor:
        """The mean cross-entropy over all answers of the batch; ``hidden``: [rows, length, hidden_size]."""
        places = [
            (row, at, self._number(text)) for row, example in enumerate(batch) for at, text in example.answers
        ]
        rows, positions, numbers = torch.tensor(places).unbind(dim=1)
        return cross_entropy(self._linear(hidden[rows, positions]).float(), numbers)

    def _number(self, answer: str) -> int:
        number = self._numbers.setdefault(answer, len(self._numbers))
        if number >= self._linear.out_features:
            raise ValueError(f"the corpus has more than {self._linear.out_features} answers")
        return number


def _loss(model: LlamaForCausalLM, answer_head: AnswerHead, batch: list[Example]) -> torch.Tensor:
    """The mean cross-entropy of the tokens that the model is to say, and that of the answers as wholes.

    Shorter dialogues are padded at their ends, where causal attention never looks from.
    """
    longest = _padded(max(len(example.token_ids) for example in batch), LENGTH_STEP)
    token_ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    is_said = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, example in enumerate(batch):
        token_ids[row, : len(example.token_ids)] = torch.tensor(example.token_ids)
        is_said[row, : len(example.is_said)] = torch.tensor(example.is_said)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cpu_computes_bfloat16()):
        hidden = model.model(token_ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][is_said[:, 1:]])
        answer_loss = answer_head.loss(hidden, batch)
    return cross_entropy(logits.float(), token_ids[:, 1:][is_said[:, 1:]]) + answer_loss
