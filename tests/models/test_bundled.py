"""The built-in model: a standard checkpoint, as good as its card says."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from petals_chat.engine.chat_prompts import separated_turns
from petals_chat.models.bundled import DIRECTORY, bundled_settings
from training.__main__ import LocalChat
from training.evaluate import judge, load_off_topic, load_questions

MAX_MEGABYTES = 20
CHAT = [
    {"role": "system", "content": "Answer shortly."},
    {"role": "user", "content": "What is a swarm?"},
    {"role": "assistant", "content": "A group of machines."},
    {"role": "user", "content": "How large?"},
]


def test_it_is_a_small_standard_checkpoint() -> None:
    files = {file.name: file.stat().st_size for file in DIRECTORY.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= set(files)
    assert {"tokenizer.json", "tokenizer_config.json", "README.md"} <= set(files)
    assert sum(files.values()) < MAX_MEGABYTES * 1_000_000
    config = AutoConfig.from_pretrained(DIRECTORY)
    assert config.model_type == "llama"
    assert config.num_hidden_layers >= 6
    assert config.max_position_embeddings >= 1024
    assert bundled_settings().chat.max_session_length <= config.max_position_embeddings
    assert GenerationConfig.from_pretrained(DIRECTORY).do_sample is False


def test_its_chat_template_says_the_same_as_the_separators() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    chat = bundled_settings().chat
    by_template = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    by_separators = tokenizer.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True, chat_template=separated_turns(chat.sep_token)
    )
    assert by_template == by_separators
    assert tokenizer.eos_token == chat.stop_token
    assert tokenizer.decode(tokenizer("Grüße, 世界! \N{SLIGHTLY SMILING FACE}")["input_ids"]) == (
        "Grüße, 世界! \N{SLIGHTLY SMILING FACE}"
    )


def test_it_says_what_it_said_when_it_was_made() -> None:
    """The shares of right answers that the model card tells, found again in a part of the questions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    questions, off_topic = load_questions()[::2], load_off_topic()[::2]
    verdicts = judge(LocalChat(DIRECTORY), [*questions, *off_topic])
    torch.set_num_threads(threads)
    about = [v.is_right for v in verdicts if v.question.area not in ("off_topic", "small_talk")]
    refused = [v.is_right for v in verdicts if v.question.area == "off_topic"]
    card = (DIRECTORY / "README.md").read_text()
    of_questions, of_off_topic = (int(share) for share in re.findall(r"^- (\d+)%", card, re.MULTILINE)[:2])
    assert 100 * sum(about) / len(about) == pytest.approx(of_questions, abs=6)
    assert 100 * sum(refused) / len(refused) == pytest.approx(of_off_topic, abs=6)


def test_its_weights_are_those_of_its_configuration() -> None:
    model, info = AutoModelForCausalLM.from_pretrained(DIRECTORY, output_loading_info=True)
    assert not any(info.values())
    assert json.loads((DIRECTORY / "config.json").read_text())["dtype"] == "bfloat16"
    assert sum(parameter.numel() for parameter in model.parameters()) < 10_000_000
