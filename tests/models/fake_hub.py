"""A hub on loopback: the few endpoints through which huggingface_hub finds, reads and downloads files.

Repositories are directories under ``root``. A directory's hub behaviour can be changed by its name: see
`FakeHub.failures`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40


class FakeHub:
    """What is served, what fails, and what was downloaded."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = ""
        self.failures: dict[str, tuple[int, dict[str, str]]] = {}
        """Status and headers with which each file of a repository is refused; its description is public."""
        self.downloads: list[str] = []
        """Files sent as a whole."""
        self.tokens: set[str] = set()
        """Values of the Authorization header."""

    def environment(self, cache: Path) -> dict[str, str]:
        """For a process that is to use this hub, with a cache and logins of its own."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}


@contextmanager
def running_hub(root: Path) -> Iterator[FakeHub]:
    """Serve ``root`` until the block ends."""
    hub = FakeHub(root)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        path = self.path.partition("?")[0]
        if described := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/(.+))?", path):
            self._describe(described[1], described[2] or "main")
        elif resolved := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            self._send_file(resolved[1], resolved[3], with_body=with_body)
        else:
            self._send(404, {}, b"")

    def _describe(self, name: str, revision: str) -> None:
        directory = self.hub.root / name
        if not directory.is_dir():
            self._send(401, {"X-Error-Code": "RepoNotFound"}, b"{}")
        elif revision not in ("main", COMMIT):
            self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
        elif self.hub.failures.get(name, (0,))[0] >= 500:
            self._send(self.hub.failures[name][0], {}, b"")
        else:
            siblings = [{"rfilename": path.name} for path in directory.iterdir()]
            self._send(200, {}, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())

    def _send_file(self, name: str, file: str, *, with_body: bool) -> None:
        if name in self.hub.failures:
            self._send(*self.hub.failures[name], b"")
            return
        path = self.hub.root / name / file
        if not path.is_file():
            self._send(404, {"X-Error-Code": "EntryNotFound"}, b"")
            return
        content = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2]), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._send(206, headers, content[first : last + 1])
            return
        if with_body:
            self.hub.downloads.append(f"{name}/{file}")
        self._send(200, headers, content, with_body=with_body)

    def _send(self, status: int, headers: dict[str, str], body: bytes, *, with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body and self.command != "HEAD":
            self.wfile.write(body)
