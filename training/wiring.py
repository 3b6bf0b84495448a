"""The attention of the model's first two blocks, made by hand.

To say which answer is asked for, the mean of a question's token embeddings is nearly enough; to go on with an answer,
its opening, the last three tokens, and what has been said are. To find these would be most of what a model has to
learn. So it is given:

- In the first block, a token learns from the nearest of `chat_format.MARKERS` before it whether it is part of a
  question or of an answer, and gets codes of the nearest opening and of the two tokens before it.
- In the second, it looks at the tokens of the latest question, at all of them nearly alike, and adds their mean. One
  head looks at the tokens of the latest answer in the same way, and gets a code of what has been said.

For this the first `RESERVED` places of a hidden state have a meaning; the rest, the word, is learnt. Rotary position
embeddings make the attention score of constant queries and keys a sum of cosines of the distance.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch.nn.functional import normalize, rms_norm
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

HEAD_SIZE = 64
NUM_HEADS = 4
"""In the first block: one each for kinds, openings, the token before, and the one before that."""
WIRED_BLOCKS = 2
MARK = 4.0
"""How large a mark is in an embedding; all its places together have a mean square of 1."""

CONSTANT, HUMAN, ASSISTANT, OPENING = range(4)
"""Places of marks: 1 in every token; `MARK` in the markers and in openings."""
IN_QUESTION, IN_ANSWER = 4, 5
"""`MARK`, from the first block on, in tokens of questions and of answers."""
CODES = (slice(6, 30), slice(30, 54), slice(54, 78))
"""Of the nearest opening, of the token before, and of the one before that; from the first block on."""
SAID_CODE = slice(78, 102)
"""Of what has been said of the answer; from the second block on."""
RESERVED = 102
"""Where the word begins. It has no place in the first head's values, so that head is free for `SAID_CODE`."""

_NEAREST_WAVES = range(9, 26)
_NEAREST_HEIGHT = 12.0
"""Cosines of these frequencies add up to a score that falls with the logarithm of the distance: the nearest mark
outweighs all others, up to a thousand tokens away."""
_STEP_WAVES = range(12)
_STEP_HEIGHT = 8.0
"""These add up to one with a peak at a certain distance."""
_RECENT_WAVES = (12, 15, 18)
_RECENT_HEIGHT = 3.5
"""These add up to one that is flat for 20 tokens, and falls until 60: the latest question outweighs others."""
_KIND_WAVE = 31
_KIND_HEIGHT = 8.0
"""The slowest wave hardly depends on the distance. It keeps out what is not part of a question."""
_CODE_SCALE = 0.5
_MEAN_SCALE = 4.0
"""What the mean of a question's tokens is multiplied by."""


@dataclasses.dataclass(frozen=True)
class MarkedTokens:
    """Token ids of "Human:", "Assistant:" and of the openings."""

    human: int
    assistant: int
    openings: tuple[int, ...]


def wire(model: LlamaForCausalLM) -> None:
    """Set the first two blocks' attention, and make that of the others, and all MLPs, add nothing yet."""
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        first, second = (block.self_attn for block in model.model.layers[:WIRED_BLOCKS])
        for attention in (first, second):
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.weight.zero_()
        for marker, kind in ((HUMAN, IN_QUESTION), (ASSISTANT, IN_ANSWER)):
            _look(first, 0, _NEAREST_WAVES, marker, _NEAREST_HEIGHT / MARK)
            first.v_proj.weight[kind, marker] = 1
            first.o_proj.weight[kind, kind] = 1
        _look(first, 1, _NEAREST_WAVES, OPENING, _NEAREST_HEIGHT / MARK)
        _look(first, 2, _STEP_WAVES, CONSTANT, _STEP_HEIGHT, distance=1)
        _look(first, 3, _STEP_WAVES, CONSTANT, _STEP_HEIGHT, distance=2)
        for head, code in enumerate(CODES, 1):
            _write(first, head, code, _CODE_SCALE)
        for head in range(NUM_HEADS):
            wanted, other = (IN_ANSWER, IN_QUESTION) if head == 0 else (IN_QUESTION, IN_ANSWER)
            _look(second, head, _RECENT_WAVES, CONSTANT, _RECENT_HEIGHT)
            _look(second, head, (_KIND_WAVE,), wanted, _KIND_HEIGHT / MARK)
            _look(second, head, (_KIND_WAVE,), other, -_KIND_HEIGHT / MARK)
        second.v_proj.weight.fill_diagonal_(1)[:RESERVED] = 0
        second.o_proj.weight.fill_diagonal_(_MEAN_SCALE)
        second.o_proj.weight[:RESERVED] = 0
        _write(second, 0, SAID_CODE, _MEAN_SCALE)


def embeddings(words: torch.Tensor, marked: MarkedTokens) -> torch.Tensor:
    """The embedding table, [vocabulary, hidden_size].

    Args:
        words: [vocabulary, hidden_size - `RESERVED`], what is learnt; only its rows' directions count.
    """
    reserved = torch.zeros(len(words), RESERVED)
    reserved[:, CONSTANT] = 1
    reserved[marked.human, HUMAN] = MARK
    reserved[marked.assistant, ASSISTANT] = MARK
    reserved[list(marked.openings), OPENING] = MARK
    hidden_size = RESERVED + words.shape[1]
    length = (hidden_size - reserved.square().sum(dim=1, keepdim=True)).sqrt()
    return torch.cat([reserved, normalize(words, dim=1) * length], dim=1)


def wired_states(
    model: LlamaForCausalLM,
    table: torch.Tensor,
    token_ids: torch.Tensor,
    places: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """The hidden states that the second block's attention leaves at some places, [places, hidden_size].

    The same as the model's, as long as the first block's MLP adds nothing, for a fraction of the cost: scores depend on
    the reserved places of the hidden states only.

    Args:
        table: see `embeddings`; gradients flow to it.
        token_ids: [rows, length].
        places: rows and positions.
    """
    first, second = (block.self_attn for block in model.model.layers[:WIRED_BLOCKS])
    hidden = table[token_ids]
    with torch.no_grad():
        rotary = model.model.rotary_emb(hidden, torch.arange(token_ids.shape[1])[None])
        weights = _weights(first, hidden, rotary, range(NUM_HEADS))
        kinds = weights[:, 0] @ hidden[..., [HUMAN, ASSISTANT]]
    words = hidden[..., RESERVED:]
    codes = []
    for head, code in enumerate(CODES, 1):
        codes.append(_CODE_SCALE * weights[:, head] @ (words @ _projection(first, head, code).T))
    nothing_said = words.new_zeros(*words.shape[:-1], SAID_CODE.stop - SAID_CODE.start)
    hidden = torch.cat([hidden[..., :IN_QUESTION], kinds, *codes, nothing_said, words], dim=-1)
    normed = rms_norm(hidden, hidden.shape[-1:], eps=model.config.rms_norm_eps)
    with torch.no_grad():
        weights = _weights(second, normed, rotary, range(2))
    words = normed[..., RESERVED:]
    said = (weights[:, 0] @ (words @ _projection(second, 0, SAID_CODE).T))[places]
    means = (weights[:, 1] @ words)[places]
    added = torch.cat([said, means], dim=-1)
    return hidden[places] + _MEAN_SCALE * torch.nn.functional.pad(added, (SAID_CODE.start, 0))


def _look(
    attention: LlamaAttention, head: int, waves: Sequence[int], place: int, height: float, distance: int = 0
) -> None:
    """Let a head look at tokens with a mark in ``place``, most of all at those at the distance.

    The mark is multiplied by a sum of cosines, each ``height`` high.
    """
    size = abs(height * HEAD_SIZE**0.5) ** 0.5
    for wave in waves:
        angle = distance * attention.config.rope_parameters["rope_theta"] ** (-2 * wave / HEAD_SIZE)
        row = head * HEAD_SIZE + wave
        attention.q_proj.weight[row, CONSTANT] = size * math.cos(angle)
        attention.q_proj.weight[row + HEAD_SIZE // 2, CONSTANT] = -size * math.sin(angle)
        attention.k_proj.weight[row, place] = math.copysign(size, height)


def _write(attention: LlamaAttention, head: int, code: slice, scale: float) -> None:
    """Let a head add ``scale`` times a random projection of the words it looks at, in the places of ``code``."""
    projection = _projection(attention, head, code)
    torch.nn.init.orthogonal_(projection)
    rows = slice(head * HEAD_SIZE, head * HEAD_SIZE + len(projection))
    attention.o_proj.weight[code, rows] = scale * torch.eye(len(projection))


def _projection(attention: LlamaAttention, head: int, code: slice) -> torch.Tensor:
    """What a head makes a code of words with: a view of its weights, [places of the code, word size]."""
    start = head * HEAD_SIZE
    weights: torch.Tensor = attention.v_proj.weight.detach()
    return weights[start : start + code.stop - code.start, RESERVED:]


def _weights(
    attention: LlamaAttention, states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], heads: range
) -> torch.Tensor:
    """Attention weights of the block's first heads, [rows, heads, length, length].

    Args:
        states: [rows, length, hidden_size], normed.
    """
    rows = slice(0, len(heads) * HEAD_SIZE)
    marks = states[..., : IN_ANSWER + 1]
    query, key = (
        (marks @ projection.weight[rows, : IN_ANSWER + 1].T).unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    scores = query @ key.mT * HEAD_SIZE**-0.5
    is_later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(diagonal=1)
    weights: torch.Tensor = scores.masked_fill(is_later, -torch.inf).softmax(dim=-1)
    return weights
