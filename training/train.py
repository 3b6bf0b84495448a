"""Trains the model: plain PyTorch loops over what the generator writes, on CPU.

There are two stages. `learn_gist` teaches the embeddings which answer a question asks for, from the mean of its
tokens alone: a few minutes where whole blocks would need hours. `train` goes on from there with the whole model,
which learns the rest: what the order of words says, conversations, and to write the answers out.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from random import Random

import torch
from torch.nn.functional import cross_entropy, rms_norm
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from petals_chat.head.precision import cpu_computes_bfloat16
from training.chat_format import CONTEXT_TOKENS, Example, encode
from training.dialogues import DialogueWriter

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
    gist_steps: int = 6000
    questions_per_gist_step: int = 128
    gist_learning_rate: float = 2e-2
    """Of the embeddings."""
    gist_matrix_learning_rate: float = 2e-2
    gist_scale: float = 4.0
    """What the mean of a question's tokens is multiplied by before it is added to the last of them."""
    steps: int = 4000
    last_round_steps: int = 2200
    """Steps of the last round, in which more of the answers are whole."""
    tokens_per_step: int = 2048
    learning_rate: float = 2e-3
    """Of embeddings, norms and head."""
    matrix_learning_rate: float = 1e-2
    """Of the blocks' matrices, which Muon trains."""
    warmup_steps: int = 100
    final_learning_rate: float = 0.02
    """As a share of the highest one."""
    weight_decay: float = 0.1
    last_round_rate: float = 0.6
    """Learning rates of the last round, as a share of those before."""
    begun_share: float = 0.8
    """Share of the dialogues that are cut in their last answer. Which answer it is shows in its first words;
    how it goes on is learnt by heart from the others."""
    last_round_begun_share: float = 0.4
    begun_tokens: int = 4
    """How much of the last answer such a dialogue keeps."""
    first_words_weight: float = 4.0
    """How much more the first words of an answer count than the others, which follow from them."""
    first_words_tokens: int = 3
    blind_share: float = 0.7
    """Share of the dialogues whose questions only the first block sees. The others then rely on the gist that it
    hands on, where they could learn the wordings by heart."""
    seed: int = 2026
    report_every: int = 50

    def last_round(self) -> Recipe:
        """The recipe of the last round: the model has learnt how answers begin, and learns how they go on."""
        return dataclasses.replace(
            self,
            steps=self.last_round_steps,
            learning_rate=self.learning_rate * self.last_round_rate,
            matrix_learning_rate=self.matrix_learning_rate * self.last_round_rate,
            begun_share=self.last_round_begun_share,
            seed=self.seed + 5,
        )


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
        tie_word_embeddings=False,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


def questions(
    writer: DialogueWriter, tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> Iterator[list[Example]]:
    """Endless batches of single questions, each with the first tokens of its answer."""
    while True:
        yield [
            encode(writer.shortest(), tokenizer).begun(recipe.begun_tokens)
            for _ in range(recipe.questions_per_gist_step)
        ]


def learn_gist(
    model: LlamaForCausalLM, answers: AnswerHead, batches: Iterator[list[Example]], recipe: Recipe
) -> None:
    """Train the model to begin the answer that the mean of a question's tokens asks for.

    The first block is made to hand on this mean, and the attention of the others to add nothing. So blocks are
    computed only where answers begin, and a step costs a small part of one of `train`, which goes on from here.
    """
    _hand_on_the_mean(model, recipe)
    blocks = model.model.layers
    matrices = [parameter for block in blocks for parameter in block.mlp.parameters()]
    norms = [block.post_attention_layernorm.weight for block in blocks]
    muon = torch.optim.Muon(matrices, lr=recipe.gist_matrix_learning_rate, weight_decay=recipe.weight_decay)
    adam = torch.optim.AdamW(
        [
            {
                "params": [model.model.embed_tokens.weight, *answers.parameters()],
                "lr": recipe.gist_learning_rate,
            },
            {"params": [model.lm_head.weight, model.model.norm.weight, *norms], "lr": recipe.learning_rate},
        ],
        weight_decay=0.0,
        fused=True,
    )
    _descend(
        [muon, adam],
        batches,
        lambda batch: gist_loss(model, answers, batch, recipe),
        recipe.gist_steps,
        recipe,
    )


def gist_loss(
    model: LlamaForCausalLM, answers: AnswerHead, batch: list[Example], recipe: Recipe
) -> torch.Tensor:
    """The mean cross-entropy of the answers' first tokens, and that of the answers as wholes."""
    token_ids, _, is_said = _padded(batch)
    embeddings = model.model.embed_tokens(token_ids)
    means = rms_norm(embeddings, embeddings.shape[-1:], eps=model.config.rms_norm_eps).cumsum(dim=1)
    means = means / torch.arange(1, token_ids.shape[1] + 1)[None, :, None]
    gist = embeddings + recipe.gist_scale * means
    rows, said = is_said.nonzero(as_tuple=True)
    hidden = gist[rows, said - 1]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cpu_computes_bfloat16()):
        for block in model.model.layers:
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        hidden = model.model.norm(hidden)
        loss = cross_entropy(model.lm_head(hidden).float(), token_ids[rows, said])
        begins = torch.tensor([example.answers[0][0] for example in batch])
        return loss + answers.loss(
            hidden[said - 1 == begins[rows]], [example.answers[0][1] for example in batch]
        )


def train(
    model: LlamaForCausalLM, answers: AnswerHead, batches: Iterator[list[Example]], recipe: Recipe
) -> None:
    """Train the model in place, but for what `learn_gist` taught it."""
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].self_attn.requires_grad_(False)
    trained = [parameter for parameter in model.model.layers.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() == 2]
    norms = [model.model.norm.weight, *(parameter for parameter in trained if parameter.dim() == 1)]
    tables = [model.lm_head.weight, *answers.parameters()]
    muon = torch.optim.Muon(matrices, lr=recipe.matrix_learning_rate, weight_decay=recipe.weight_decay)
    adam = torch.optim.AdamW(
        [{"params": tables, "weight_decay": recipe.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    model.train()
    random = Random(recipe.seed)
    _descend(
        [muon, adam],
        batches,
        lambda batch: _loss(model, answers, batch, recipe, random),
        recipe.steps,
        recipe,
    )
    model.eval()


def _descend(
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Iterator[list[Example]],
    loss_of: Callable[[list[Example]], torch.Tensor],
    steps: int,
    recipe: Recipe,
) -> None:
    """Take the steps, one batch each, and print how it goes."""
    schedules = [LambdaLR(optimizer, lambda step: _rate(step, steps, recipe)) for optimizer in optimizers]
    losses: list[float] = []
    tokens, started = 0, time.monotonic()
    for step, batch in enumerate(islice(batches, steps), 1):
        loss = loss_of(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            for group in optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        losses.append(loss.item())
        tokens += sum(len(example.token_ids) for example in batch)
        if step % recipe.report_every == 0 or step == steps:
            minutes = (time.monotonic() - started) / 60
            print(
                f"step {step} of {steps}, loss {sum(losses) / len(losses):.3f}, "
                f"{tokens / 1e6:.2f} million tokens, {minutes:.1f} min, {time.process_time() / 60:.1f} CPU min",
                flush=True,
            )
            losses.clear()


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
    return example.begun(recipe.begun_tokens)


def _cut(pool: list[Example], tokens_per_step: int) -> list[list[Example]]:
    batches: list[list[Example]] = [[]]
    for example in pool:
        rows = max(1, tokens_per_step // _padded_length(len(example.token_ids)))
        if len(batches[-1]) >= rows:
            batches.append([])
        batches[-1].append(example)
    return batches


def _rate(step: int, steps: int, recipe: Recipe) -> float:
    """The share of the highest learning rate: a linear warm-up, then half a cosine."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
    return recipe.final_learning_rate + (1 - recipe.final_learning_rate) * 0.5 * (
        1 + math.cos(math.pi * progress)
    )


class AnswerHead(torch.nn.Module):
    """Names the answer from the hidden state of the token after which it begins; used in training only.

    Few of an answer's tokens tell it from other answers, so the language model's own loss is slow to teach which
    answer a question asks for. This one teaches it directly.
    """

    def __init__(self, hidden_size: int, max_answers: int = 1024) -> None:
        super().__init__()
        self._linear = torch.nn.Linear(hidden_size, max_answers)
        self._numbers: dict[str, int] = {}

    def loss(self, hidden: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        """The mean cross-entropy of the answers ``texts``, each told from a row of ``hidden``."""
        numbers = torch.tensor([self._number(text) for text in texts])
        return cross_entropy(self._linear(hidden).float(), numbers)

    def _number(self, answer: str) -> int:
        number = self._numbers.setdefault(answer, len(self._numbers))
        if number >= self._linear.out_features:
            raise ValueError(f"the corpus has more than {self._linear.out_features} answers")
        return number


def _hand_on_the_mean(model: LlamaForCausalLM, recipe: Recipe) -> None:
    """Make the model's hidden states those of `gist_loss`.

    The first block's attention looks at all tokens alike and adds their mean; nothing else adds anything yet.
    """
    first = model.model.layers[0].self_attn
    with torch.no_grad():
        torch.nn.init.normal_(model.model.embed_tokens.weight)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        first.q_proj.weight.zero_()
        torch.nn.init.eye_(first.v_proj.weight)
        torch.nn.init.eye_(first.o_proj.weight).mul_(recipe.gist_scale)


def _loss(
    model: LlamaForCausalLM, answers: AnswerHead, batch: list[Example], recipe: Recipe, random: Random
) -> torch.Tensor:
    """The mean cross-entropy of the tokens that the model is to say, and that of the answers as wholes."""
    token_ids, _, is_said = _padded(batch)
    weights = is_said.float()
    for row, example in enumerate(batch):
        for at, _ in example.answers:
            weights[row, at + 1 : at + 1 + recipe.first_words_tokens] *= recipe.first_words_weight
    is_seen = is_said.clone()
    for row, example in enumerate(batch):
        is_seen[row, [at for at, _ in example.answers]] = True
        if random.random() >= recipe.blind_share:
            is_seen[row] = True
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cpu_computes_bfloat16()):
        hidden = _hidden_states(model, token_ids, is_seen)
        logits = model.lm_head(hidden[:, :-1][is_said[:, 1:]])
        places = [(row, at) for row, example in enumerate(batch) for at, _ in example.answers]
        rows, positions = torch.tensor(places).unbind(dim=1)
        names = [text for example in batch for _, text in example.answers]
        answer_loss = answers.loss(hidden[rows, positions], names)
    losses = cross_entropy(logits.float(), token_ids[:, 1:][is_said[:, 1:]], reduction="none")
    weights = weights[:, 1:][is_said[:, 1:]]
    return (losses * weights).sum() / weights.sum() + answer_loss


def _hidden_states(model: LlamaForCausalLM, token_ids: torch.Tensor, is_seen: torch.Tensor) -> torch.Tensor:
    """The normed output of the last block, [rows, length, hidden_size].

    Args:
        token_ids: [rows, length].
        is_seen: [rows, length]; which tokens the blocks after the first may look at from later ones.
    """
    length = token_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = (causal & is_seen[:, None, :] | torch.eye(length, dtype=torch.bool))[:, None]
    hidden = model.model.embed_tokens(token_ids)
    positions = torch.arange(length)[None]
    rotary = model.model.rotary_emb(hidden, positions)
    for number, block in enumerate(model.model.layers):
        mask = seen if number > 0 else causal[None, None]
        hidden = block(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
    return model.model.norm(hidden)  # type: ignore[no-any-return]


def _padded(batch: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, which of them are no padding, and which of them the model is to say; each [rows, length].

    Padding stands at the end, where causal attention never looks from.
    """
    length = _padded_length(max(len(example.token_ids) for example in batch))
    token_ids = torch.zeros(len(batch), length, dtype=torch.int64)
    is_token = torch.zeros(len(batch), length, dtype=torch.bool)
    is_said = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, example in enumerate(batch):
        token_ids[row, : len(example.token_ids)] = torch.tensor(example.token_ids)
        is_token[row, : len(example.token_ids)] = True
        is_said[row, : len(example.is_said)] = torch.tensor(example.is_said)
    return token_ids, is_token, is_said


def _padded_length(length: int) -> int:
    """The next multiple of `LENGTH_STEP`: the CPU's library prepares, and keeps, programs for each shape it meets."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP
