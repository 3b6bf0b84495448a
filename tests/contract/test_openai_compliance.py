"""The OpenAI-compatible API before the eyes of `llm-comply`, which knows the specification."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from petals_chat.gateway.clients import hash_of
from petals_chat.swarm.host_options import HostReady
from tests.contract.openai_server import running_openai_server
from tests.contract.serving import Server

KEY = "sk-contract"
COULD_NOT_PASS = {
    "chat-tool-calling": "a random model does not find the end of a text that the schema leaves free",
    "tool-calling": "a random model does not find the end of a text that the schema leaves free",
    "chat-image-input": "models here read text only",
    "image-input": "models here read text only",
    "compact-response": "nothing is kept that could be compacted",
    "compact-missing-model": "nothing is kept that could be compacted",
}


@pytest.fixture(scope="module")
def server_with_keys(
    checkpoints: dict[str, Path], random_host: HostReady, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """It needs a key, so that nothing depends on there being none."""
    keys = f'[[api.keys]]\nname = "contract"\nhash = "{hash_of(KEY)}"\n'
    with running_openai_server(
        checkpoints["byte_level"],
        random_host,
        tmp_path_factory.mktemp("compliance"),
        ends=[0, *_control_characters(checkpoints["byte_level"])],
        more=keys,
    ) as server:
        yield server


def _control_characters(checkpoint: Path) -> list[int]:
    """Tokens that no JSON has. They end a text here, so that a random model comes to an end soon."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    texts = {token: tokenizer.decode([token]) for token in range(len(tokenizer))}
    return [token for token, text in texts.items() if len(text) == 1 and text < " " and text not in "\t\n\r"]


@pytest.mark.parametrize("api", ["openai-chat", "open-responses"])
def test_llm_comply_finds_nothing_wrong(server_with_keys: Server, tmp_path: Path, api: str) -> None:
    options = [
        f"--base-url={server_with_keys.url}/v1",
        f"--api-key={KEY}",
        "--model=hermes",
        f"--format={api}",
        "--json",
    ]
    result = subprocess.run(
        [Path(sys.executable).with_name("llm-comply"), *options],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=400,
        check=False,
    )
    report = json.loads(result.stdout)
    failed = {
        result["id"]: result
        for result in report["results"]
        if result["status"] not in ("passed", "skipped") and result["id"] not in COULD_NOT_PASS
    }
    assert failed == {}
    assert len(report["results"]) > len(COULD_NOT_PASS)
