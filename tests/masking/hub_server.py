"""A stand-in for the hub's API on this machine: repositories in memory, with the requests that mftctl makes."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_secret_of_the_test"


class Hub(ThreadingHTTPServer):
    """Repositories by name; `private` ones and all writing need the token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def revision(self, repo: str) -> str:
        """A commit that changes with the files."""
        files = sorted(self.repositories[repo].items())
        return hashlib.sha1(repr(files).encode(), usedforsecurity=False).hexdigest()


class _Requests(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._is_known():
            self._answer(401, {"error": "Invalid credentials"})
            return
        parts = self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(filter(None, (asked.get("organization") or "me", asked["name"])))
            if repo in self.server.repositories:
                self._answer(409, {"error": "exists", "url": f"{self.server.url}/{repo}"})
                return
            self.server.repositories[repo] = {}
            if asked.get("private") or asked.get("visibility") == "private":
                self.server.private.add(repo)
            self._answer(200, {"url": f"{self.server.url}/{repo}"})
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif parts[4:5] == ["preupload"]:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif parts[4:5] == ["commit"]:
            repo = "/".join(parts[2:4])
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.server.repositories[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.server.commits += 1
            url = f"{self.server.url}/{repo}/commit/{self.server.revision(repo)}"
            self._answer(200, {"success": True, "commitUrl": url, "commitOid": self.server.revision(repo)})
        else:
            self._answer(404, {"error": self.path})

    def do_HEAD(self) -> None:
        self._file(with_body=False)

    def do_GET(self) -> None:
        self._file(with_body=True)

    def _file(self, *, with_body: bool) -> None:
        owner, name, *rest = unquote(self.path).strip("/").split("/")
        repo = f"{owner}/{name}"
        hidden = repo in self.server.private and not self._is_known()
        if repo not in self.server.repositories or hidden:
            self._answer(401 if hidden else 404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
            return
        if rest[:1] != ["resolve"]:
            self._answer(404, {"error": self.path})
            return
        known = ("main", self.server.revision(repo))
        if rest[1] not in known:
            self._answer(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
            return
        content = self.server.repositories[repo].get("/".join(rest[2:]))
        if content is None:
            self._answer(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": known[1]})
            return
        etag = hashlib.sha256(content).hexdigest()
        self.send_response(200)
        for header, value in {"X-Repo-Commit": known[1], "ETag": f'"{etag}"', "Content-Length": len(content)}.items():
            self.send_header(header, str(value))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _answer(self, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        for header, value in {
            "Content-Type": "application/json",
            "Content-Length": len(body),
            **(headers or {}),
        }.items():
            self.send_header(header, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    with Hub() as hub:
        thread = Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
