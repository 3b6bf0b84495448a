"""``python -m training``: make the bundled model from the corpus, and say how good it is."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from petals_chat.models import bundled
from training.chat_format import END, text_of, train_tokenizer
from training.corpus import Entry, load_corpus
from training.dialogues import DialogueWriter
from training.evaluate import (
    Verdict,
    as_third_questions,
    held_out_wordings,
    judge,
    load_off_topic,
    load_questions,
    overlap,
    report,
)
from training.model_card import write_model_card
from training.train import Lessons, Recipe, new_model, train

OUTPUT = bundled.DIRECTORY
_COST_FILE = "training.json"
_TOKENIZER_DIALOGUES = 20_000
_MAX_ANSWER_TOKENS = 128


def main() -> None:
    """Train, evaluate, or both."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("command", choices=["train", "evaluate"], nargs="?")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="directory of the checkpoint")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--validate", action="store_true", help="keep one in 20 wordings out, and ask those too"
    )
    parser.add_argument("--show", action="store_true", help="print wrong answers")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    entries = load_corpus()
    kept, left_out = split(entries) if arguments.validate else (entries, [])
    if arguments.command != "evaluate":
        make(kept, Recipe(), arguments.output)
    if arguments.command != "train":
        table, figures = assess(arguments.output, entries, left_out, arguments.show)
        cost = json.loads((arguments.output / _COST_FILE).read_text())
        write_model_card(arguments.output, entries, table, figures | cost)


def make(entries: Sequence[Entry], recipe: Recipe, output: Path) -> None:
    """Train the tokenizer and the model, and write the checkpoint and what it cost."""
    started, started_cpu = time.monotonic(), time.process_time()
    held_out = held_out_wordings([*load_questions(), *load_off_topic()])
    dialogues = islice(DialogueWriter(entries, recipe.seed + 1, held_out), _TOKENIZER_DIALOGUES)
    tokenizer = train_tokenizer(
        (text_of(dialogue) for dialogue in dialogues), [entry.answer for entry in entries]
    )
    model = new_model(recipe, tokenizer)
    print(
        f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(entries)} entries", flush=True
    )
    refusals = frozenset(entry.answer for entry in entries if entry.area == "off_topic")
    lessons = Lessons(DialogueWriter(entries, recipe.seed, held_out), tokenizer, refusals)
    train(model, lessons, recipe)
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=end, eos_token_id=end, pad_token_id=end
    )
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    cost = {
        "steps": recipe.steps,
        "minutes": round((time.monotonic() - started) / 60),
        "cpu_minutes": round((time.process_time() - started_cpu) / 60),
    }
    (output / _COST_FILE).write_text(json.dumps(cost) + "\n")


def split(entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """The entries without, and with only, one in 20 of their wordings, chosen at random."""
    kept, left_out = [], []
    for entry in entries:
        chosen = set(random.Random(entry.topic).sample(entry.questions, len(entry.questions) // 20))
        rest = tuple(question for question in entry.questions if question not in chosen)
        kept.append(dataclasses.replace(entry, questions=rest))
        if chosen and not entry.after:
            left_out.append(dataclasses.replace(entry, questions=tuple(sorted(chosen))))
    return kept, left_out


class LocalChat:
    """The checkpoint in plain transformers."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self._tokenizer.padding_side = "left"
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def answer(self, conversations: Sequence[Sequence[str]]) -> list[str]:
        """See `training.evaluate.Chat`."""
        answers: list[str] = []
        for start in range(0, len(conversations), 32):
            answers += self._answer(conversations[start : start + 32])
        return answers

    @torch.inference_mode()
    def _answer(self, conversations: Sequence[Sequence[str]]) -> list[str]:
        roles = ("user", "assistant")
        texts = [
            self._tokenizer.apply_chat_template(
                [{"role": roles[turn % 2], "content": text} for turn, text in enumerate(conversation)],
                tokenize=False,
                add_generation_prompt=True,
            )
            for conversation in conversations
        ]
        inputs = self._tokenizer(texts, return_tensors="pt", padding=True)
        outputs = self._model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=_MAX_ANSWER_TOKENS,
        )
        answers = self._tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :])
        return [answer.partition(END)[0].strip() for answer in answers]


def assess(
    directory: Path, entries: Sequence[Entry], left_out: Sequence[Entry], show: bool
) -> tuple[str, dict[str, float]]:
    """Evaluate the checkpoint, print what came out, and return the table and the shares of right answers."""
    chat = LocalChat(directory)
    started = time.monotonic()
    figures: dict[str, float] = {}
    if left_out:
        pairs = [(entry, question) for entry in left_out for question in entry.questions]
        answers = chat.answer([[question] for _, question in pairs])
        wrong = [(e.topic, q, a) for (e, q), a in zip(pairs, answers, strict=True) if a != e.answer]
        figures["validation"] = 1 - len(wrong) / len(pairs)
        if show:
            for topic, question, answer in wrong:
                print(f"[{topic}] {question}\n    {answer}")
    questions, off_topic = load_questions(), load_off_topic()
    verdicts = judge(chat, questions) + judge(chat, off_topic)
    table = report(verdicts)
    print(table)
    if show:
        for verdict in verdicts:
            if not verdict.is_right:
                print(
                    f"[{verdict.question.topic}] {' / '.join(verdict.question.questions)}\n    {verdict.answer}"
                )
    figures |= shares(verdicts)
    third = judge(chat, as_third_questions([*questions, *off_topic]))
    figures |= {f"third_{area}": share for area, share in shares(third).items()}
    figures["shared_5_grams"] = round(overlap([*questions, *off_topic], entries), 4)
    figures["seconds"] = round(time.monotonic() - started)
    print(json.dumps(figures))
    return table, figures


def shares(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The shares of right answers: to questions about Petals Chat, to small talk, and to all others."""
    groups: dict[str, list[bool]] = {}
    for verdict in verdicts:
        area = verdict.question.area
        group = area if area in ("off_topic", "small_talk") else "questions"
        groups.setdefault(group, []).append(verdict.is_right)
    return {group: sum(rights) / len(rights) for group, rights in groups.items()}


if __name__ == "__main__":
    main()
