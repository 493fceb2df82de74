"""A stand-in for the Hugging Face Hub: the few endpoints that its client calls to push and fetch.

Repositories are kept in memory: branch -> (commit, files by path). Only the token `good` may write,
and only to owners other than `other`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]
LARGE = (".safetensors", ".zst")


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, tuple[str, Files]]] = {}
        self.commits: dict[str, Files] = {}
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, repo: str, branch: str, files: Files) -> str:
        oid = hashlib.sha1(f"{repo}{branch}{len(self.commits)}".encode()).hexdigest()
        self.repos.setdefault(repo, {})[branch] = (oid, files)
        self.commits[oid] = files
        return oid

    def files(self, repo: str, revision: str = "main") -> tuple[str, Files] | None:
        if revision in self.commits:
            return revision, self.commits[revision]
        return self.repos.get(repo, {}).get(revision)


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    @property
    def path_parts(self) -> list[str]:
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def may_write(self, owner: str) -> bool:
        if self.headers.get("Authorization") != "Bearer good":
            self.refuse(401, "Unauthorized")
        elif owner == "other":
            self.refuse(403, "Forbidden")
        else:
            return True
        return False

    # --- reading --------------------------------------------------------------------------------

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        match self.path_parts:
            case ["api", "models", owner, name]:
                self.info(f"{owner}/{name}", "main")
            case ["api", "models", owner, name, "revision", revision]:
                self.info(f"{owner}/{name}", revision)
            case ["api", "models", owner, name, "tree", revision]:
                self.tree(f"{owner}/{name}", revision)
            case [owner, name, "resolve", revision, *path]:
                self.resolve(f"{owner}/{name}", revision, "/".join(path))
            case _:
                self.refuse(404, "EntryNotFound")

    def found(self, repo: str, revision: str) -> tuple[str, Files] | None:
        if repo not in self.server.repos:
            self.refuse(401, "RepoNotFound")  # as the hub answers for what may be private
            return None
        if (found := self.server.files(repo, revision)) is None:
            self.refuse(404, "RevisionNotFound")
        return found

    def info(self, repo: str, revision: str) -> None:
        if found := self.found(repo, revision):
            siblings = [{"rfilename": name} for name in found[1]]
            about = {"id": repo, "sha": found[0], "siblings": siblings, "tags": []}
            self.answer(200, about | {"private": repo in self.server.private, "downloads": 0})

    def tree(self, repo: str, revision: str) -> None:
        if found := self.found(repo, revision):
            self.answer(200, [_entry(name, data) for name, data in sorted(found[1].items())])

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if found := self.found(repo, revision):
            if path not in found[1]:
                self.refuse(404, "EntryNotFound")
                return
            data = found[1][path]
            etag = hashlib.sha256(data).hexdigest()
            self.answer(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": found[0]})

    # --- writing --------------------------------------------------------------------------------

    def do_PUT(self) -> None:
        self.server.large[self.path_parts[-1]] = self.body()
        self.answer(200)

    def do_POST(self) -> None:
        self.server.asked.append(f"POST {self.path}")
        data = self.body()
        match self.path_parts:
            case ["api", "repos", "create"]:
                self.create(json.loads(data))
            case ["api", "validate-yaml"]:
                self.answer(200, {"errors": [], "warnings": []})
            case ["api", "models", owner, name, "branch", branch]:
                if self.may_write(owner):
                    branches = self.server.repos[f"{owner}/{name}"]
                    branches.setdefault(branch, branches["main"])
                    self.answer(200)
            case ["api", "models", owner, _, "preupload", _]:
                if self.may_write(owner):
                    files = json.loads(data)["files"]
                    self.answer(200, {"files": [_upload_mode(file["path"]) for file in files]})
            case [_, git, "info", "lfs", "objects", "batch"] if git.endswith(".git"):
                objects = json.loads(data)["objects"]
                self.answer(
                    200, {"transfer": "basic", "objects": [self.put_at(o) for o in objects]}
                )
            case ["api", "models", owner, name, "commit", branch]:
                if self.may_write(owner):
                    self.take(f"{owner}/{name}", branch, data)
            case _:
                self.refuse(404, "EntryNotFound")

    def create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if not self.may_write(asked["organization"]):
            return
        if repo in self.server.repos:
            self.answer(409, {"error": "exists", "url": f"{self.server.url}/{repo}"})
            return
        self.server.commit(repo, "main", {".gitattributes": b"*.zst filter=lfs\n"})
        if asked.get("visibility") == "private" or asked.get("private"):
            self.server.private.add(repo)
        self.answer(200, {"url": f"{self.server.url}/{repo}", "id": repo})

    def put_at(self, wanted: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.server.url}/large/{wanted['oid']}"}
        return wanted | {"actions": {"upload": upload}}

    def take(self, repo: str, branch: str, data: bytes) -> None:
        files = dict((self.server.files(repo, branch) or ("", {}))[1])
        for line in data.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                held = self.server.large[value["oid"]]
                assert hashlib.sha256(held).hexdigest() == value["oid"]
                files[value["path"]] = held
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        oid = self.server.commit(repo, branch, files)
        self.answer(200, {"commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"})


def _entry(name: str, data: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": oid}
    if re.search("|".join(re.escape(end) + "$" for end in LARGE), name):
        digest = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
    return entry


def _upload_mode(path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith(LARGE) else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False}
