"""What the API answers is what /openapi.json says: Schemathesis asks what the document allows, and what it does not."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

from tests.gateway.gateways import Gateway

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
OURS = r"^(/v1/.*|/tokenize|/detokenize|/tokenizer_info)$"
EXAMPLES = 25
"""For each operation, besides those that cover its schema one by one."""


async def test_schemathesis_finds_no_reply_that_the_document_does_not_allow(
    gateway: Gateway, tmp_path: Path
) -> None:
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name("schemathesis"),
        "run",
        f"http://{gateway.address}/openapi.json",
        f"--include-path-regex={OURS}",
        f"--checks={CHECKS}",
        "--phases=coverage,fuzzing",
        f"--max-examples={EXAMPLES}",
        "--suppress-health-check=all",
        "--request-timeout=100",
        "--no-color",
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    printed = (await process.communicate())[0].decode()
    assert process.returncode == 0, printed
    assert re.search(r"Tested: *8\b", printed), printed
    assert re.search(r"(\d+) generated, \1 passed", printed), printed
