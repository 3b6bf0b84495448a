"""Every example of the API's documentation is run, as it is printed, against the server that a first start gives."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from petals_chat.errors import (
    CapacityError,
    ConfigurationError,
    PetalsChatError,
    ProtocolViolationError,
    RequestError,
    SwarmError,
    error_classes,
)
from petals_chat.gateway.error_responses import ErrorResponses
from tests.contract.serving import Server, running_server

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
API_DOCUMENTS = ("http-api.md", "websocket-api.md")
DOCUMENTS_WITH_EXAMPLES = (*API_DOCUMENTS, "openai.md")
PROGRAMS = {"sh": "bash", "python": sys.executable, "javascript": "node"}
"""What runs the blocks with this language tag. Blocks with other tags show what is sent and received."""
SUFFIXES = {".sh": "sh", ".py": "python", ".mjs": "javascript"}
BINARIES = Path(sys.executable).parent
"""Has `llm`, which keeps its settings where LLM_USER_PATH says."""
TIMEOUT_SECONDS = 60

BRANCHES = {PetalsChatError, RequestError, CapacityError, SwarmError}
"""Classes of errors that are never raised themselves."""
ERRORS = {kind.code: kind for kind in error_classes() if kind not in BRANCHES}


def blocks(document: str) -> Iterator[tuple[str, str]]:
    """Language and text of the document's examples that can be run."""
    text = (DOCS / document).read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if language in PROGRAMS:
            yield language, block


BLOCKS = [
    pytest.param(language, block, id=f"{document}-{number}-{language}")
    for document in DOCUMENTS_WITH_EXAMPLES
    for number, (language, block) in enumerate(blocks(document), 1)
]
FILES = sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in SUFFIXES)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """What `make run` starts: no configuration, the built-in model."""
    data_dir = tmp_path_factory.mktemp("data")
    with running_server(
        None, "--port=0", f"--set=engine.data_dir={data_dir}", "--set=engine.threads=1"
    ) as server:
        yield server


def run(server: Server, directory: Path, language: str, *arguments: str, typed: str = "") -> str:
    """What the program prints; it must succeed and say nothing on standard error."""
    program = shutil.which(PROGRAMS[language])
    if program is None:
        message = f"{PROGRAMS[language]} is not installed"
        if "CI" in os.environ:
            pytest.fail(message)
        pytest.skip(message)
    options = {"javascript": ["--no-warnings", "--experimental-websocket"], "sh": ["-eu"]}.get(language, [])
    result = subprocess.run(
        [program, *options, *arguments],
        cwd=directory,
        env=os.environ | {"PATH": f"{BINARIES}:{os.environ['PATH']}", "LLM_USER_PATH": str(directory)},
        input=typed,
        capture_output=True,
        encoding="utf-8",
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def assert_sensible(printed: str) -> None:
    """Words, and no sign of something that went wrong."""
    assert re.search(r"\w{2,}", printed)
    assert not re.search(r'"ok": ?false|Error|undefined|\[object', printed), printed


@pytest.mark.parametrize(("language", "block"), BLOCKS)
def test_an_example_in_the_text_runs(server: Server, tmp_path: Path, language: str, block: str) -> None:
    suffix = next(suffix for suffix, name in SUFFIXES.items() if name == language)
    block = block.replace("localhost:5000", server.address)
    if language == "sh":
        block = block.replace("curl ", "curl --silent --show-error ")
    (tmp_path / f"example{suffix}").write_text(block, encoding="utf-8")
    assert_sensible(run(server, tmp_path, language, f"example{suffix}"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_example_file_runs(server: Server, tmp_path: Path, path: Path) -> None:
    typed = "Hello\nWho are you?\n\n"
    printed = run(server, tmp_path, SUFFIXES[path.suffix], str(path), server.url, typed=typed)
    assert_sensible(printed)
    assert len(printed.splitlines()) >= 3


@pytest.mark.parametrize("language", ["sh", "python", "javascript"])
def test_the_http_api_has_examples_in_each_language(language: str) -> None:
    assert language in {language for language, _ in blocks("http-api.md")}


@pytest.mark.parametrize("document", API_DOCUMENTS)
def test_the_errors_of_an_api_are_listed_with_all_that_clients_go_by(document: str) -> None:
    """Code, whether trying again can help, and, over WebSocket, how the connection is closed."""
    text = (DOCS / document).read_text(encoding="utf-8")
    expected = set()
    for code, kind in ERRORS.items():
        again = "yes" if kind.retryable else "no"
        error = kind.__new__(kind)
        PetalsChatError.__init__(error, "")
        _, close_code, _ = ErrorResponses(debug=False).websocket(error)
        if kind is ConfigurationError or (kind is ProtocolViolationError and document == "http-api.md"):
            continue
        expected.add((code, again) if document == "http-api.md" else (code, str(close_code), again))
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \|(?: (\d+) \|)? (yes|no) \|$", text, re.MULTILINE)
    assert {tuple(filter(None, row)) for row in rows} == expected


def test_every_error_has_a_section_that_says_what_to_do() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert re.findall(r"^### `(\w+)`$", text, re.MULTILINE) == sorted(ERRORS)
