"""Ready entries for known models, so that one line in the configuration switches a model on.

An entry is what could stand in the model's table of the configuration file; the configuration's own values
are laid over it. To add a model, add a row. Nothing here says which swarm serves a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

Table = Mapping[str, object]


@dataclasses.dataclass(frozen=True)
class _Row:
    """A model, as far as it differs from its family."""

    key: str
    name: str
    more: Table = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Family:
    """Models that share a heading, a licence and a way to end an answer."""

    name: str
    license: str
    """URL; "{key}" is replaced by the model's key."""
    chat: Table
    rows: tuple[_Row, ...]

    def entries(self) -> Iterator[tuple[str, Table]]:
        for row in self.rows:
            yield (
                row.key,
                {
                    "repository": row.key,
                    "name": row.name,
                    "family": self.name,
                    "model_card": f"https://huggingface.co/{row.key}",
                    "license": self.license.format(key=row.key),
                    "chat": self.chat,
                    **row.more,
                },
            )


def _chat(
    stop_token: str,
    *extra: str,
    sep_token: str | None = None,
    max_session_length: int = 8192,
    **generation: object,
) -> Table:
    """How answers end, and, as ``generation``, what differs from temperature 0.6 and top_p 0.9.

    ``stop_token`` is the end-of-turn token of the model's chat template, if it has one.
    """
    return {
        "max_session_length": max_session_length,
        "sep_token": stop_token if sep_token is None else sep_token,
        "stop_token": stop_token,
        "extra_stop_sequences": list(extra),
        "generation": generation,
    }


_REPOSITORY_LICENSE = "https://huggingface.co/{key}/blob/main/LICENSE"
_APACHE_LICENSE = "https://www.apache.org/licenses/LICENSE-2.0"
_LLAMA_2_LICENSE = "https://ai.meta.com/llama/license/"

_HASHES = _chat("###", "</s>")  # for models without a chat template
_INSTRUCTION_TAGS = _chat("</s>")  # [INST] ... [/INST] answer </s>
_LLAMA_3_HEADERS = _chat("<|eot_id|>", "<|end_of_text|>")
_CHATML = ("<|im_end|>", "<|endoftext|>")

_FAMILIES = (
    _Family(
        "Llama 2",
        _LLAMA_2_LICENSE,
        _HASHES,
        (
            _Row(
                "petals-team/StableBeluga2",
                "Stable Beluga 2 (70B)",
                {
                    "aliases": ["stabilityai/StableBeluga2"],
                    "model_card": "https://huggingface.co/stabilityai/StableBeluga2",
                    "license": "https://huggingface.co/stabilityai/StableBeluga2/blob/main/LICENSE.txt",
                },
            ),
            _Row("meta-llama/Llama-2-70b-hf", "Llama 2 (70B)"),
            _Row("meta-llama/Llama-2-70b-chat-hf", "Llama 2 Chat (70B)", {"chat": _INSTRUCTION_TAGS}),
            _Row(
                "codellama/CodeLlama-34b-Instruct-hf",
                "Code Llama Instruct (34B)",
                {"chat": _INSTRUCTION_TAGS},
            ),
        ),
    ),
    _Family(
        "Llama",
        "https://bit.ly/llama-license",
        _HASHES,
        (
            _Row(
                "timdettmers/guanaco-65b",
                "Guanaco (65B)",
                {"repository": "huggyllama/llama-65b", "adapter": "timdettmers/guanaco-65b"},
            ),
            _Row("huggyllama/llama-65b", "Llama (65B)", {"aliases": ["enoch/llama-65b-hf"]}),
        ),
    ),
    _Family(
        "BLOOM",
        "https://huggingface.co/spaces/bigscience/license",
        # Trained on sequences of 2048 tokens, and to end an answer with </s>.
        _chat("</s>", "\n\nHuman", sep_token="\n\n", max_session_length=2048, temperature=0.75),  # noqa: S106
        (
            _Row("bigscience/bloomz", "BLOOMZ (176B)", {"aliases": ["bigscience/bloomz-petals"]}),
            _Row("bigscience/bloom", "BLOOM (176B)", {"aliases": ["bigscience/bloom-petals"]}),
        ),
    ),
    _Family(
        "Falcon",
        "https://huggingface.co/spaces/tiiuae/falcon-180b-license/blob/main/LICENSE.txt",
        # Its chat format is lines of "User: ..." and "Falcon: ...".
        _chat(
            "\n",
            *("<|endoftext|>", "\nFalcon:", " Falcon:", "\nUser:", " User:", "###"),
            temperature=0.75,
            repetition_penalty=1.2,
        ),
        (
            # The licence asks for a separate agreement before others may use the model through an API.
            _Row("tiiuae/falcon-180B-chat", "Falcon Chat (180B)", {"public_api": False}),
            _Row("tiiuae/falcon-180B", "Falcon (180B)", {"public_api": False}),
        ),
    ),
    _Family(
        "Mixtral",
        _APACHE_LICENSE,
        _INSTRUCTION_TAGS,
        (
            _Row("mistralai/Mixtral-8x7B-Instruct-v0.1", "Mixtral Instruct (8x7B)"),
            _Row("mistralai/Mixtral-8x22B-Instruct-v0.1", "Mixtral Instruct (8x22B)"),
        ),
    ),
    _Family(
        "Llama 3.1",
        "https://www.llama.com/llama3_1/license/",
        _LLAMA_3_HEADERS,
        (
            _Row("meta-llama/Llama-3.1-8B-Instruct", "Llama 3.1 Instruct (8B)"),
            _Row("meta-llama/Llama-3.1-70B-Instruct", "Llama 3.1 Instruct (70B)"),
            _Row("meta-llama/Llama-3.1-405B-Instruct", "Llama 3.1 Instruct (405B)"),
        ),
    ),
    _Family(
        "Llama 3.2",
        "https://www.llama.com/llama3_2/license/",
        _LLAMA_3_HEADERS,
        (
            _Row("meta-llama/Llama-3.2-1B-Instruct", "Llama 3.2 Instruct (1B)"),
            _Row("meta-llama/Llama-3.2-3B-Instruct", "Llama 3.2 Instruct (3B)"),
        ),
    ),
    _Family(
        "Llama 3.3",
        "https://www.llama.com/llama3_3/license/",
        _LLAMA_3_HEADERS,
        (_Row("meta-llama/Llama-3.3-70B-Instruct", "Llama 3.3 Instruct (70B)"),),
    ),
    _Family(
        "Qwen 2.5",
        _REPOSITORY_LICENSE,
        # Generation values are those of the models' generation_config.json.
        _chat(*_CHATML, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05),
        (
            _Row("Qwen/Qwen2.5-7B-Instruct", "Qwen 2.5 Instruct (7B)"),
            _Row("Qwen/Qwen2.5-32B-Instruct", "Qwen 2.5 Instruct (32B)"),
            _Row("Qwen/Qwen2.5-72B-Instruct", "Qwen 2.5 Instruct (72B)"),
        ),
    ),
    _Family(
        "Qwen 3",
        _REPOSITORY_LICENSE,
        _chat(*_CHATML, temperature=0.6, top_p=0.95, top_k=20),
        (
            _Row("Qwen/Qwen3-4B", "Qwen 3 (4B)"),
            _Row("Qwen/Qwen3-8B", "Qwen 3 (8B)"),
            _Row("Qwen/Qwen3-14B", "Qwen 3 (14B)"),
            _Row("Qwen/Qwen3-32B", "Qwen 3 (32B)"),
        ),
    ),
    _Family(
        "Mistral",
        _APACHE_LICENSE,
        _INSTRUCTION_TAGS,
        (
            _Row("mistralai/Mistral-7B-Instruct-v0.3", "Mistral Instruct (7B)"),
            _Row(
                "mistralai/Mistral-Small-24B-Instruct-2501",
                "Mistral Small Instruct (24B)",
                {"chat": _chat("</s>", temperature=0.15)},  # what its model card asks for
            ),
            _Row(
                "mistralai/Mistral-Large-Instruct-2411",
                "Mistral Large Instruct (123B)",
                {"license": "https://mistral.ai/licenses/MRL-0.1.md"},
            ),
        ),
    ),
)

CATALOG: Mapping[str, Table] = {key: entry for family in _FAMILIES for key, entry in family.entries()}
"""By key, in the order in which the documentation lists them."""


def aliases_of(entry: Table) -> tuple[str, ...]:
    """Other names of an entry of the catalog."""
    aliases = entry.get("aliases", [])
    assert isinstance(aliases, list)
    return tuple(aliases)
