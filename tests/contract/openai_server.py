"""A server whose models call functions in each way there is, for tests of the OpenAI-compatible API."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from petals_chat.swarm.host_options import HostReady
from tests.contract.conftest import CONFIGURATION
from tests.contract.serving import Server, running_server

SESSION_TOKENS = 400

_BEGIN = "{% for tool in tools or [] %}{{ tool.function.name }}: {{ tool.function.parameters | tojson }}\n{% endfor %}"
_MESSAGES = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}CALL{% endfor %}\n{% endfor %}assistant: "
)
TEMPLATES = {
    "hermes": _BEGIN
    + _MESSAGES.replace(
        "CALL",
        '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
        "</tool_call>",
    ),
    "llama3": _BEGIN
    + _MESSAGES.replace(
        "CALL", '{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}'
    ),
    "mistral": _BEGIN + _MESSAGES.replace("CALL", "[TOOL_CALLS][{{ call.function | tojson }}]"),
    "plain": _MESSAGES.replace("CALL", ""),
}
"""By model: what is essential of the templates of such models."""


@contextmanager
def running_openai_server(
    checkpoint: Path, host: HostReady, directory: Path, *, more: str = ""
) -> Iterator[Server]:
    """The server, with one model for each of the `TEMPLATES`.

    Args:
        checkpoint: with the byte-level tokenizer.
        more: TOML in front of the models.
    """
    checkpoint = shutil.copytree(checkpoint, directory / "checkpoint")
    # With the ends that the random checkpoint has, it could not write JSON.
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [0]}))
    entries = [
        f"[models.{name}]\n"
        f"repository = {json.dumps(str(checkpoint))}\n"
        f"initial_peers = {json.dumps(host.peers)}\n"
        f"dht_prefix = {json.dumps(host.dht_prefix)}\n"
        f"chat.template = {json.dumps(template)}\n"
        f"chat.max_session_length = {SESSION_TOKENS}\n"
        for name, template in TEMPLATES.items()
    ]
    config = directory / "petals-chat.toml"
    config.write_text("\n".join([CONFIGURATION, more, *entries]))
    with running_server(config) as server:
        yield server
