"""Trains the model: a plain PyTorch loop over what the generator writes, on CPU.

Attention is what `training.wiring` makes it in the first two blocks, and adds nothing in the others. So a state
follows from few others, and only those of tokens that are to be said have to be computed.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from itertools import islice
from random import Random

import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from petals_chat.head.precision import cpu_computes_bfloat16
from training.chat_format import CONTEXT_TOKENS, MARKERS, Example, encode
from training.dialogues import DialogueWriter
from training.wiring import (
    HEAD_SIZE,
    NUM_HEADS,
    RESERVED,
    MarkedTokens,
    embeddings,
    wire,
    wired_states,
)

LENGTH_STEP = 16
"""Batches are padded to a multiple of this many tokens."""
HIDDEN_SIZE = NUM_HEADS * HEAD_SIZE


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out. The defaults make the bundled model."""

    intermediate_size: int = 512
    num_blocks: int = 6
    steps: int = 6000
    tokens_per_step: int = 4096
    """Of the dialogues, padding included."""
    whole_share: float = 0.15
    """Share of the dialogues with the whole of their last answer; others end with its opening. Refusals are whole in
    one of ten such dialogues: they are few, and frequent."""
    said_share: float = 0.25
    """Share of the answers' tokens after the openings that a step learns from."""
    matrix_learning_rate: float = 2e-2
    """Of the MLPs, which Muon trains."""
    learning_rate: float = 2e-3
    """Of the LM head and the norms."""
    embedding_learning_rate: float = 2e-2
    warmup_steps: int = 100
    final_learning_rate: float = 0.02
    """As a share of the highest one."""
    weight_decay: float = 0.1
    refusal_margin: float = 2.0
    """How much better than other answers refusals have to be learnt, as a difference of logits. It is left over when
    the model is asked what the corpus does not know."""
    seed: int = 2026
    report_every: int = 50


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model with random weights, in float32."""
    torch.manual_seed(recipe.seed)
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_blocks,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        max_position_embeddings=CONTEXT_TOKENS,
        vocab_size=len(tokenizer),
        tie_word_embeddings=False,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


@dataclasses.dataclass(frozen=True)
class Lessons:
    """What the model learns from."""

    writer: DialogueWriter
    tokenizer: PreTrainedTokenizerFast
    refusals: frozenset[str]
    """Those of the answers that say that the model does not know something."""

    def batches(self, recipe: Recipe) -> Iterator[list[Example]]:
        """Endless batches of about ``tokens_per_step`` tokens, padding included.

        Each batch has dialogues of like length: a pool of some batches' dialogues is sorted by length, cut into
        batches, and these are shuffled.
        """
        random = Random(recipe.seed)
        dialogues = iter(self.writer)
        while True:
            pool: list[Example] = []
            while sum(len(example.token_ids) for example in pool) < 32 * recipe.tokens_per_step:
                for dialogue in islice(dialogues, 64):
                    example = encode(dialogue, self.tokenizer)
                    is_refusal = dialogue.turns[-1].answer in self.refusals
                    is_whole = random.random() < recipe.whole_share * (0.1 if is_refusal else 1)
                    pool.append(example if is_whole else example.begun())
            pool.sort(key=lambda example: len(example.token_ids))
            cut = _cut(pool, recipe.tokens_per_step)
            random.shuffle(cut)
            yield from cut

    @property
    def marked_tokens(self) -> MarkedTokens:
        """The tokens that the first block looks for."""
        human, assistant = self.tokenizer.convert_tokens_to_ids(list(MARKERS))
        added = set(self.tokenizer.added_tokens_decoder) - {human, assistant, self.tokenizer.eos_token_id}
        return MarkedTokens(human, assistant, tuple(sorted(added)))

    def margins(self, height: float) -> torch.Tensor:
        """[vocabulary]: ``height`` for the first tokens of refusals, 0 for all others."""
        margins = torch.zeros(len(self.tokenizer))
        margins[[self.tokenizer.encode(f" {answer}")[0] for answer in self.refusals]] = height
        return margins


def train(model: LlamaForCausalLM, lessons: Lessons, recipe: Recipe) -> None:
    """Wire the model, and train its embeddings, MLPs and LM head."""
    wire(model)
    words = torch.randn(model.config.vocab_size, HIDDEN_SIZE - RESERVED, requires_grad=True)
    # The first block's MLP stays empty: it would change the states that the second one's attention looks at.
    blocks = model.model.layers[1:]
    norms = [model.model.norm.weight, *(block.post_attention_layernorm.weight for block in blocks)]
    muon = torch.optim.Muon(
        [parameter for block in blocks for parameter in block.mlp.parameters()],
        lr=recipe.matrix_learning_rate,
        weight_decay=recipe.weight_decay,
    )
    adam = torch.optim.AdamW(
        [
            {"params": [words], "lr": recipe.embedding_learning_rate},
            {"params": [model.lm_head.weight, *norms], "lr": recipe.learning_rate},
        ],
        weight_decay=0.0,
        fused=True,
    )
    optimizers = (muon, adam)
    schedules = [LambdaLR(optimizer, lambda step: _rate(step, recipe)) for optimizer in optimizers]
    marked, margins = lessons.marked_tokens, lessons.margins(recipe.refusal_margin)
    losses: list[float] = []
    started = time.monotonic()
    for step, batch in enumerate(islice(lessons.batches(recipe), recipe.steps), 1):
        loss = loss_of(model, embeddings(words, marked), batch, margins, recipe.said_share)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            for group in optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        losses.append(loss.item())
        if step % recipe.report_every == 0 or step == recipe.steps:
            minutes = (time.monotonic() - started) / 60
            print(
                f"step {step} of {recipe.steps}, loss {sum(losses) / len(losses):.3f}, "
                f"{minutes:.1f} min, {time.process_time() / 60:.1f} CPU min",
                flush=True,
            )
            losses.clear()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(embeddings(words, marked))


def loss_of(
    model: LlamaForCausalLM,
    table: torch.Tensor,
    batch: list[Example],
    margins: torch.Tensor,
    said_share: float = 1.0,
) -> torch.Tensor:
    """The mean cross-entropy of the openings, and that of the answers' other tokens.

    Args:
        table: see `training.wiring.embeddings`.
        margins: [vocabulary], what the openings' logits are lowered by.
        said_share: how many of the other tokens count, chosen at random.
    """
    token_ids, is_said, is_opening = _padded(batch)
    is_said &= is_opening | (torch.rand(is_said.shape) < said_share)
    rows, said = is_said.nonzero(as_tuple=True)
    hidden = wired_states(model, table, token_ids, (rows, said - 1))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cpu_computes_bfloat16()):
        for block in model.model.layers[1:]:
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        logits = model.lm_head(model.model.norm(hidden)).float()
    is_first = is_opening[is_said]
    losses = cross_entropy(logits - is_first[:, None] * margins, token_ids[is_said], reduction="none")
    others = losses[~is_first]
    return losses[is_first].mean() + (others.mean() if len(others) else 0)


def _cut(pool: list[Example], tokens_per_step: int) -> list[list[Example]]:
    batches: list[list[Example]] = [[]]
    for example in pool:
        rows = max(1, tokens_per_step // _padded_length(len(example.token_ids)))
        if len(batches[-1]) >= rows:
            batches.append([])
        batches[-1].append(example)
    return batches


def _rate(step: int, recipe: Recipe) -> float:
    """The share of the highest learning rate: a linear warm-up, then half a cosine."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.final_learning_rate + (1 - recipe.final_learning_rate) * 0.5 * (
        1 + math.cos(math.pi * progress)
    )


def _padded(batch: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, which of them the model is to say, and which of these are openings; each [rows, length].

    Padding stands at the end, where causal attention never looks from.
    """
    length = _padded_length(max(len(example.token_ids) for example in batch))
    token_ids = torch.zeros(len(batch), length, dtype=torch.int64)
    is_said = torch.zeros(len(batch), length, dtype=torch.bool)
    is_opening = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, example in enumerate(batch):
        token_ids[row, : len(example.token_ids)] = torch.tensor(example.token_ids)
        is_said[row, : len(example.is_said)] = torch.tensor(example.is_said)
        is_opening[row, [position + 1 for position in example.answers]] = True
    return token_ids, is_said, is_opening


def _padded_length(length: int) -> int:
    """The next multiple of `LENGTH_STEP`: the CPU's library prepares, and keeps, programs for each shape it meets."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP
