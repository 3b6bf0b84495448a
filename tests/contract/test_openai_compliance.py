"""The OpenAI-compatible API before the eyes of `llm-comply`, which knows the specification."""

from __future__ import annotations

import json
import shutil
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
from tests.tiny_models import make_it_end

KEY = "sk-contract"
REQUEST_TIMEOUT_SECONDS = 200
"""Other servers of these tests may hold the host's room for some time."""
COULD_NOT_PASS = {
    "chat-image-input": "models here read text only",
    "image-input": "models here read text only",
    "compact-response": "nothing is kept that could be compacted",
    "compact-missing-model": "nothing is kept that could be compacted",
}


@pytest.fixture(scope="module")
def server_with_keys(
    checkpoints: dict[str, Path], random_host: HostReady, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """It needs a key, so that nothing depends on there being none. Its model comes to an end, also of calls."""
    keys = f'[[api.keys]]\nname = "contract"\nhash = "{hash_of(KEY)}"\n'
    directory = tmp_path_factory.mktemp("compliance")
    checkpoint = shutil.copytree(checkpoints["byte_level"], directory / "ending")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    quote, *brackets = tokenizer.convert_tokens_to_ids(['"', "}", "]"])
    make_it_end(checkpoint, quote=quote, brackets=brackets, end=tokenizer.eos_token_id)
    with running_openai_server(checkpoint, random_host, directory, more=keys) as server:
        yield server


@pytest.mark.parametrize("api", ["openai-chat", "open-responses"])
def test_llm_comply_finds_nothing_wrong(server_with_keys: Server, tmp_path: Path, api: str) -> None:
    options = [
        f"--base-url={server_with_keys.url}/v1",
        f"--api-key={KEY}",
        "--model=hermes",
        f"--format={api}",
        f"--timeout={REQUEST_TIMEOUT_SECONDS}",
        "--json",
    ]
    result = subprocess.run(
        [Path(sys.executable).with_name("llm-comply"), *options],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
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
