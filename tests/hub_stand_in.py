"""A stand-in for the Hugging Face hub on this machine: the part of its API that reading a dataset uses."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40
Datasets = Mapping[str, Mapping[str, bytes]]
"""Files by name, by dataset."""


class Hub(ThreadingHTTPServer):
    """A server of datasets.

    Attributes:
        endpoint: The value for HF_ENDPOINT.
        asked: The requests, such as `GET /api/datasets/owner/name`.
    """

    def __init__(self, datasets: Datasets) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.datasets = datasets
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[str] = []


@contextmanager
def hub_with(datasets: Datasets) -> Iterator[Hub]:
    """Serves datasets while the context is open."""
    hub = Hub(datasets)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        is_api = parts[0] == "api"
        _, owner, name, kind, _, *path = [*parts[is_api:], *[""] * 5]
        files = self.server.datasets.get(f"{owner}/{name}")
        place = "/".join(filter(None, path))
        if files is None:
            self._refuse("RepoNotFound")
        elif not is_api:
            self._file(files.get(place))
        elif kind == "tree":
            self._tree(files, place)
        else:
            self._reply(json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": []}).encode())

    def _file(self, content: bytes | None) -> None:
        if content is None:
            self._refuse("EntryNotFound")
        else:
            self._reply(content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})

    def _tree(self, files: Mapping[str, bytes], folder: str) -> None:
        within = {path: content for path, content in files.items() if path.rpartition("/")[0] == folder}
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in within.items()
        ]
        if not folder:
            names = sorted({path.partition("/")[0] for path in files if "/" in path})
            entries += [{"type": "directory", "path": name, "size": 0, "oid": "d" * 40} for name in names]
        self._reply(json.dumps(entries).encode()) if entries else self._refuse("EntryNotFound")

    def _refuse(self, code: str) -> None:
        self._reply(b"", {"X-Error-Code": code}, status=404)

    def _reply(self, content: bytes, headers: Mapping[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
